//! A trainer's whole state in host memory, to be written elsewhere while training goes on.

use std::ops::Range;

use tch::{Device, Tensor};

use super::flat::{Layout, Place};

/// Where a trainer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// Steps taken, the skipped ones included: the next step's number.
    pub step: u64,
    /// Steps applied: the optimizer's own count.
    pub applied: u64,
    /// Steps skipped for a gradient that was not finite, in all.
    pub skipped: u64,
    /// Of those, the latest run without an applied step between.
    pub skipped_in_a_row: u32,
}

/// State of a trainer, f32: masters, moments and, when kept, their average; all of it, or a share.
///
/// Reusable: taking the next snapshot into the same buffers allocates nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    layout: Layout,
    /// Where the trainer stood.
    pub position: Position,
    parts: Vec<Held>,
}

/// What a snapshot holds of one part.
#[derive(Debug, Clone, PartialEq)]
struct Held {
    part: Part,
    /// Which of the layout's places.
    places: Range<usize>,
    values: Vec<f32>,
}

/// One flat buffer of a trainer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The masters.
    Student,
    /// Their moving average.
    Ema,
    /// First moments.
    AdamM,
    /// Second moments.
    AdamV,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 4] = [Self::Student, Self::Ema, Self::AdamM, Self::AdamV];

    /// Whether it is of the optimizer.
    pub fn is_moments(self) -> bool {
        match self {
            Self::AdamM | Self::AdamV => true,
            Self::Student | Self::Ema => false,
        }
    }

    /// What its tensors' names begin with.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Student => "student",
            Self::Ema => "ema",
            Self::AdamM => "adam_m",
            Self::AdamV => "adam_v",
        }
    }
}

/// Why a snapshot is not one of this trainer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A tensor that the trainer needs.
    #[error("the state has no tensor {name}")]
    Missing {
        /// With its part.
        name: String,
    },
    /// A tensor of another size.
    #[error("tensor {name} of the state has {found} values, the student needs {expected}")]
    Size {
        /// With its part.
        name: String,
        /// In the state.
        found: usize,
        /// In the student.
        expected: usize,
    },
}

impl Snapshot {
    /// Empty buffers for the state of a trainer with this layout; of each part the places that `share` gives.
    pub(super) fn new(
        layout: Layout,
        with_ema: bool,
        share: &dyn Fn(Part) -> Range<usize>,
    ) -> Self {
        let mut parts = vec![Part::Student, Part::AdamM, Part::AdamV];
        parts.extend(with_ema.then_some(Part::Ema));
        let held = |part| {
            let places = share(part);
            let values = vec![0.0; layout.span(&places).len()];
            Held {
                part,
                places,
                values,
            }
        };
        Self {
            position: Position::default(),
            parts: parts.into_iter().map(held).collect(),
            layout,
        }
    }

    /// Every tensor of the state: its part, its place in the student, its values; none of those that are not held.
    pub fn entries(&self) -> impl Iterator<Item = (Part, &Place, &[f32])> {
        self.parts.iter().flat_map(|held| {
            let first = self.layout.span(&held.places).start;
            let places = self.layout.places().iter().enumerate();
            places.map(move |(at, place)| {
                let values = match held.places.contains(&at) {
                    true => &held.values[place.offset - first..][..place.len],
                    false => &[],
                };
                (held.part, place, values)
            })
        })
    }

    /// The values of one part, or none when it is not kept, or not as a whole.
    pub fn part(&self, part: Part) -> Option<&[f32]> {
        let found = self.parts.iter().find(|held| held.part == part)?;
        (found.values.len() == self.layout.len()).then_some(&found.values)
    }

    /// Copies what is held of a part that is kept from `tensor`, which has the layout's values from `first` on.
    pub(super) fn take(&mut self, part: Part, tensor: &Tensor, first: usize) {
        for held in &mut self.parts {
            if held.part == part && !held.values.is_empty() {
                let span = self.layout.span(&held.places);
                assert!(first <= span.start, "what is copied is held");
                let start = span.start - first;
                let piece = tensor.narrow(0, start as i64, span.len() as i64);
                let host = piece.to_device(Device::Cpu);
                host.copy_data(&mut held.values, host.numel());
            }
        }
    }
}
