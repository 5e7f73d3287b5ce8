//! A trainer's whole state in host memory, to be written elsewhere while training goes on.

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

/// State of a trainer, f32: masters, moments and, when kept, their average.
///
/// Reusable: taking the next snapshot into the same buffers allocates nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    layout: Layout,
    /// Where the trainer stood.
    pub position: Position,
    parts: Vec<(Part, Vec<f32>)>,
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
    /// Empty buffers for the state of a trainer with this layout.
    pub(super) fn new(layout: Layout, with_ema: bool) -> Self {
        let mut parts = vec![Part::Student, Part::AdamM, Part::AdamV];
        parts.extend(with_ema.then_some(Part::Ema));
        let zeros = vec![0.0; layout.len()];
        Self {
            layout,
            position: Position::default(),
            parts: parts
                .into_iter()
                .map(|part| (part, zeros.clone()))
                .collect(),
        }
    }

    /// Every tensor: its part, its place in the student, its values.
    pub fn entries(&self) -> impl Iterator<Item = (Part, &Place, &[f32])> {
        self.parts.iter().flat_map(|(part, values)| {
            let places = self.layout.places().iter();
            places.map(|place| (*part, place, &values[place.range()]))
        })
    }

    /// The values of one part, or none when it is not kept.
    pub fn part(&self, part: Part) -> Option<&[f32]> {
        let found = self.parts.iter().find(|(kept, _)| *kept == part)?;
        Some(&found.1)
    }

    /// Copies `tensor` `[len]` into a part that is kept.
    pub(super) fn take(&mut self, part: Part, tensor: &Tensor) {
        for (kept, values) in &mut self.parts {
            if *kept == part {
                let host = tensor.to_device(Device::Cpu);
                host.copy_data(values, host.numel());
            }
        }
    }
}
