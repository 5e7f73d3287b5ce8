//! Sums and copies in which every value takes the same way round the ring.
//!
//! What a rank sends is a sequence of ranges, and so is what it receives; apart from the first of a round, each range
//! that is sent is the one that was received before it. So a byte may be sent once the byte at a known place of the
//! incoming stream has been dealt with, and there is nothing else to keep in step.
//!
//! A part is cut into blocks, and a round takes the same block of every part: what a rank sends and later overwrites
//! is still in its cache.

use std::ops::Range;

use super::pump::{PIECE, Traffic};
use super::{Error, Parts, bytes_of_mut};

/// Values of one part that are in a round.
const BLOCK: usize = 256 * 1024;

/// Which steps a round has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Steps<'p> {
    /// Every rank's part to every rank, after it was summed, or as it is.
    Parts {
        /// Which they are.
        parts: &'p Parts,
        /// Adds the parts up on their way to their ranks.
        reduce: bool,
        /// Hands them out.
        gather: bool,
    },
    /// One rank's values to all.
    Broadcast {
        /// Whose.
        root: u32,
    },
}

impl<'p> Steps<'p> {
    /// An all-reduce.
    pub(super) fn reduce_and_gather(parts: &'p Parts) -> Self {
        let (reduce, gather) = (true, true);
        Self::Parts {
            parts,
            reduce,
            gather,
        }
    }

    /// Its first half.
    pub(super) fn reduce(parts: &'p Parts) -> Self {
        let (reduce, gather) = (true, false);
        Self::Parts {
            parts,
            reduce,
            gather,
        }
    }

    /// Its second half.
    pub(super) fn gather(parts: &'p Parts) -> Self {
        let (reduce, gather) = (false, true);
        Self::Parts {
            parts,
            reduce,
            gather,
        }
    }
}

/// Bytes that go to the next rank.
#[derive(Debug)]
struct Outgoing {
    bytes: Range<usize>,
    /// Where the same bytes begin in the incoming stream; none for what this rank has from the start.
    follows: Option<usize>,
}

/// Bytes that come from the previous rank.
#[derive(Debug)]
struct Incoming {
    bytes: Range<usize>,
    /// Whether they are added to what is there, or replace it.
    adds: bool,
}

/// One operation, as a rank sees it.
#[derive(Debug)]
pub(super) struct Rounds<'a> {
    values: &'a mut [f32],
    /// Addends of one piece.
    scratch: &'a mut [f32],
    /// Bytes at the start of the scratch that are no whole value yet.
    held: usize,
    sends: Vec<Outgoing>,
    receives: Vec<Incoming>,
    /// Which of `sends`, and how many bytes of it are gone.
    sent: (usize, usize),
    /// Which of `receives`, and how many bytes of it are dealt with.
    received: (usize, usize),
    /// Bytes of the incoming stream that are dealt with.
    done: usize,
}

impl<'a> Rounds<'a> {
    pub(super) fn new(
        steps: Steps<'_>,
        rank: u32,
        world: u32,
        values: &'a mut [f32],
        scratch: &'a mut Vec<f32>,
    ) -> Self {
        scratch.resize(scratch.len().max(PIECE / 4), 0.0);
        let mut rounds = Self {
            scratch: &mut scratch[..PIECE / 4],
            held: 0,
            sends: Vec::new(),
            receives: Vec::new(),
            sent: (0, 0),
            received: (0, 0),
            done: 0,
            values,
        };
        match steps {
            Steps::Parts {
                parts,
                reduce,
                gather,
            } => rounds.parts(rank, parts, reduce, gather),
            Steps::Broadcast { root } => rounds.broadcast(rank, world, root),
        }
        rounds
    }

    /// Step s of a round sends part rank - 1 - s and receives part rank - 2 - s; the last of the sum ends with this
    /// rank's own part, with which handing out begins.
    fn parts(&mut self, rank: u32, parts: &Parts, reduce: bool, gather: bool) {
        let world = parts.world();
        let half = world - 1;
        let steps = if reduce { 0 } else { half }..if gather { 2 * half } else { half };
        let mut at = 0;
        for block in 0..parts.longest().div_ceil(BLOCK) {
            let range = |behind: u32| {
                let part = parts.of((rank + 2 * world - behind) % world);
                let start = (part.start + block * BLOCK).min(part.end);
                4 * start..4 * (start + BLOCK).min(part.end)
            };
            let mut follows = None;
            for step in steps.clone() {
                self.send(range(1 + step), follows);
                follows = Some(at);
                at += self.receive(range(2 + step), step < half);
            }
        }
    }

    fn broadcast(&mut self, rank: u32, world: u32, root: u32) {
        let all = 0..4 * self.values.len();
        if rank != root {
            self.receive(all.clone(), false);
        }
        if (rank + 1) % world != root {
            self.send(all, (rank != root).then_some(0));
        }
    }

    fn send(&mut self, bytes: Range<usize>, follows: Option<usize>) {
        if !bytes.is_empty() {
            self.sends.push(Outgoing { bytes, follows });
        }
    }

    fn receive(&mut self, bytes: Range<usize>, adds: bool) -> usize {
        let len = bytes.len();
        if len > 0 {
            self.receives.push(Incoming { bytes, adds });
        }
        len
    }

    /// Adds the whole values at the start of the scratch to those at byte `at`; returns how many bytes that were.
    fn add(&mut self, at: usize, bytes: usize) -> usize {
        let held = self.held + bytes;
        let whole = held / 4;
        let own = &mut self.values[at / 4..at / 4 + whole];
        add(own, &self.scratch[..whole]);
        self.held = held - 4 * whole;
        bytes_of_mut(self.scratch).copy_within(4 * whole..held, 0);
        4 * whole
    }
}

impl Traffic for Rounds<'_> {
    fn outgoing(&mut self) -> &[u8] {
        let Some(Outgoing { bytes, follows }) = self.sends.get(self.sent.0) else {
            return &[];
        };
        let ready = match follows {
            None => bytes.len(),
            Some(place) => self.done.saturating_sub(*place).min(bytes.len()),
        };
        let end = ready.min(self.sent.1 + PIECE);
        let range = bytes.start + self.sent.1..bytes.start + end;
        &bytes_of_mut(self.values)[range]
    }

    fn sent(&mut self, bytes: usize) {
        self.sent.1 += bytes;
        if self.sent.1 == self.sends[self.sent.0].bytes.len() {
            self.sent = (self.sent.0 + 1, 0);
        }
    }

    fn incoming(&mut self) -> &mut [u8] {
        let Some(Incoming { bytes, adds }) = self.receives.get(self.received.0) else {
            return &mut [];
        };
        let left = bytes.len() - self.received.1;
        if *adds {
            let end = left.min(PIECE);
            &mut bytes_of_mut(self.scratch)[self.held..end]
        } else {
            let start = bytes.start + self.received.1;
            &mut bytes_of_mut(self.values)[start..start + left.min(PIECE)]
        }
    }

    fn received(&mut self, bytes: usize) -> Result<(), Error> {
        let (index, at) = self.received;
        let Incoming { bytes: into, adds } = &self.receives[index];
        let (start, len) = (into.start, into.len());
        let dealt_with = if *adds {
            self.add(start + at, bytes)
        } else {
            bytes
        };
        self.done += dealt_with;
        self.received = if at + dealt_with == len {
            (index + 1, 0)
        } else {
            (index, at + dealt_with)
        };
        Ok(())
    }
}

/// `own += theirs`, value by value.
pub(super) fn add(own: &mut [f32], theirs: &[f32]) {
    for (own, theirs) in std::iter::zip(own, theirs) {
        *own += theirs;
    }
}
