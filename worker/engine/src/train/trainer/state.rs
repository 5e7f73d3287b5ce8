//! A trainer's state as others see it: named, copied, put back.

use std::ops::Range;

use tch::{Device, Tensor};
use xxhash_rust::xxh3::Xxh3Default;

use super::super::optimizer::AdamW;
use super::super::snapshot::{self, Part, Position, Snapshot};
use super::{Seat, Trainer, narrow};

/// Numbers that a fingerprint takes to the host at a time: 4 MiB.
const HASHED_AT_ONCE: usize = 1 << 20;

impl Trainer {
    /// The whole state but for [`Self::position`]: flat f32 buffers, each with its part, which has the values of the places
    /// that [`Self::places`] gives. Whoever writes into them calls [`Self::resume`] after.
    pub fn state(&self) -> Vec<(Part, Tensor)> {
        let mut parts = vec![
            (Part::Student, self.parameters.masters.shallow_clone()),
            (Part::AdamM, self.optimizer.m.shallow_clone()),
            (Part::AdamV, self.optimizer.v.shallow_clone()),
        ];
        parts.extend(
            self.ema
                .as_ref()
                .map(|ema| (Part::Ema, ema.average.shallow_clone())),
        );
        parts
    }

    /// What of [`Self::state`] every member of a group holds: all of it, or all but the moments where those are shared out.
    pub fn common_state(&self) -> Vec<(Part, Tensor)> {
        let mut parts = self.state();
        parts.retain(|(part, _)| !self.shares_moments() || !part.is_moments());
        parts
    }

    /// The places of the layout whose values of `part` are here.
    pub fn places(&self, part: Part) -> Range<usize> {
        let Seat { rank, world } = match part.is_moments() {
            true => self.seat,
            false => Seat::ALONE,
        };
        self.layout().share(rank, world)
    }

    /// Goes on from what was written into [`Self::state`], which stood at `position`.
    pub fn resume(&mut self, position: Position) {
        self.optimizer.applied = position.applied;
        self.position = position;
        self.torn = false;
        self.write_compute();
    }

    /// Throws the moments away and makes room for those of `rank` of `world`, where the plan shares them out.
    pub fn reseat(&mut self, rank: u32, world: u32) {
        if self.plan.optimizer.sharded {
            self.seat = Seat { rank, world };
            // The old ones go before the new ones come.
            self.optimizer = AdamW::new(
                &self.plan.optimizer,
                &self.parameters.masters.narrow(0, 0, 0),
            );
            let own = narrow(&self.parameters.masters, &self.own_values());
            self.optimizer = AdamW::new(&self.plan.optimizer, &own);
        }
    }

    /// Names the state that all members of a group hold: equal for equal bits at an equal position.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Xxh3Default::new();
        let mut bytes = Vec::new();
        for (_, flat) in self.common_state() {
            for start in (0..flat.numel()).step_by(HASHED_AT_ONCE) {
                let count = HASHED_AT_ONCE.min(flat.numel() - start);
                let piece = flat.narrow(0, start as i64, count as i64);
                bytes.resize(count * 4, 0);
                piece.to_device(Device::Cpu).copy_data_u8(&mut bytes, count);
                hash.update(&bytes);
            }
        }
        let mut name = [0; 32];
        name[..16].copy_from_slice(&hash.digest128().to_le_bytes());
        name[16..24].copy_from_slice(&self.position.step.to_le_bytes());
        name[24..].copy_from_slice(&self.position.applied.to_le_bytes());
        name
    }

    /// Empty buffers that fit this trainer's state.
    pub fn empty_snapshot(&self) -> Snapshot {
        self.empty_share(&|part| self.places(part))
    }

    /// The same for a part of the state: the places of the layout that `share` names for each of its parts.
    pub fn empty_share(&self, share: &dyn Fn(Part) -> Range<usize>) -> Snapshot {
        Snapshot::new(self.layout().clone(), self.ema.is_some(), share)
    }

    /// Whether a moving average is kept.
    pub fn has_average(&self) -> bool {
        self.ema.is_some()
    }

    /// Copies the state into `into`, made by [`Self::empty_snapshot`] or for a share: the only stall of a checkpoint.
    ///
    /// # Panics
    ///
    /// When values are asked for that are not here, or a step was applied in part.
    pub fn snapshot(&self, into: &mut Snapshot) {
        assert!(!self.torn, "a torn state is no state");
        into.position = self.position;
        for (part, tensor) in self.state() {
            let first = self.layout().span(&self.places(part)).start;
            into.take(part, &tensor, first);
        }
    }

    /// The buffer of `part`, f32, and the values of the layout that it has; none where it is not kept.
    pub(in crate::train) fn part_mut(&mut self, part: Part) -> Option<(&mut Tensor, Range<usize>)> {
        let values = self.layout().span(&self.places(part));
        let buffer = match part {
            Part::Student => Some(&mut self.parameters.masters),
            Part::AdamM => Some(&mut self.optimizer.m),
            Part::AdamV => Some(&mut self.optimizer.v),
            Part::Ema => self.ema.as_mut().map(|ema| &mut ema.average),
        };
        buffer.map(|buffer| (buffer, values))
    }

    /// Goes on from the whole state `state`, bit for bit.
    pub fn restore(&mut self, state: &Snapshot) -> Result<(), snapshot::Error> {
        let len = self.layout().len();
        for (part, mut tensor) in self.state() {
            let name = part.prefix();
            let values = state.part(part).ok_or_else(|| snapshot::Error::Missing {
                name: name.to_owned(),
            })?;
            if values.len() != len {
                return Err(snapshot::Error::Size {
                    name: name.to_owned(),
                    found: values.len(),
                    expected: len,
                });
            }
            let own = &values[self.layout().span(&self.places(part))];
            tch::no_grad(|| tensor.copy_(&Tensor::from_slice(own)));
        }
        self.resume(state.position);
        Ok(())
    }
}
