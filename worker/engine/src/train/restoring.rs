//! A trainer's state as it comes from elsewhere, tensor by tensor: nothing is held but the trainer's own buffers and one
//! tensor.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Kind, Tensor};

use super::flat::Place;
use super::snapshot::{Error, Part, Position};
use super::trainer::Trainer;

/// A trainer that is being filled. Dropped before [`Restoring::finish`] it leaves a trainer that is half filled: throw that
/// away.
#[derive(Debug)]
pub struct Restoring<'a> {
    trainer: &'a mut Trainer,
    /// The places of the student's tensors by name.
    places: BTreeMap<String, Place>,
    /// The tensors of each part that have not come, by name.
    missing: BTreeSet<(&'static str, String)>,
}

impl<'a> Restoring<'a> {
    /// Begins to fill `trainer` with all that it holds.
    pub fn new(trainer: &'a mut Trainer) -> Self {
        Self::of(trainer, &Part::ALL)
    }

    /// Begins to fill `parts` of `trainer`, as far as it holds them.
    pub fn of(trainer: &'a mut Trainer, parts: &[Part]) -> Self {
        let places: BTreeMap<String, Place> = trainer
            .layout()
            .places()
            .iter()
            .map(|place| (place.name.clone(), place.clone()))
            .collect();
        let mut missing = BTreeSet::new();
        for &part in parts {
            if trainer.part_mut(part).is_some() {
                let held = &trainer.layout().places()[trainer.places(part)];
                missing.extend(held.iter().map(|place| (part.prefix(), place.name.clone())));
            }
        }
        Self {
            trainer,
            places,
            missing,
        }
    }

    /// Whether the tensor `name` of `part` is still to come.
    pub fn awaits(&self, part: Part, name: &str) -> bool {
        self.missing.contains(&(part.prefix(), name.to_owned()))
    }

    /// Takes in the tensor `name` of `part`: `values` in row order, f32, of any shape. One that the trainer has no place for
    /// is left alone, as the average is where none is kept, and so is one that is another rank's.
    pub fn take(&mut self, part: Part, name: &str, values: &Tensor) -> Result<(), Error> {
        assert_eq!(values.kind(), Kind::Float, "state is f32");
        let (Some(place), Some((buffer, held))) =
            (self.places.get(name), self.trainer.part_mut(part))
        else {
            return Ok(());
        };
        if place.offset < held.start || place.offset + place.len > held.end {
            return Ok(());
        }
        if values.numel() != place.len {
            return Err(Error::Size {
                name: format!("{}/{name}", part.prefix()),
                found: values.numel(),
                expected: place.len,
            });
        }
        let start = place.offset - held.start;
        let mut own = buffer.narrow(0, start as i64, place.len as i64);
        tch::no_grad(|| own.copy_(&values.view([-1])));
        self.missing.remove(&(part.prefix(), name.to_owned()));
        Ok(())
    }

    /// Goes on at `position`, bit for bit as the trainer did whose state this is.
    ///
    /// Refuses a state of which a tensor has not come.
    pub fn finish(self, position: Position) -> Result<(), Error> {
        self.check_complete()?;
        self.trainer.resume(position);
        Ok(())
    }

    /// Leaves the trainer with what has come, where the rest comes another way.
    ///
    /// Refuses parts of which a tensor has not come.
    pub fn finish_parts(self) -> Result<(), Error> {
        self.check_complete()
    }

    fn check_complete(&self) -> Result<(), Error> {
        match self.missing.first() {
            None => Ok(()),
            Some((part, name)) => Err(Error::Missing {
                name: format!("{part}/{name}"),
            }),
        }
    }
}
