//! Training: rows in, steps applied, state out.
//!
//! One thread, no waiting but for the group: rows come from a [`Source`], reports and state go to a [`Sink`].
//! Must never know of files, storage, leases or the wire.
//!
//! All trainable values live in one contiguous f32 buffer, the masters, and so do gradient, moments and moving
//! average: the optimizer, clipping and the all-reduce are a few large operations however many tensors a
//! network has. The network's own tensors, in the compute format, are written from the masters after each step.
//! The members of a group may share the moments out: each then has those of some tensors alone.

pub mod batch;
pub mod ema;
pub mod flat;
mod norm;
pub mod optimizer;
pub mod rate;
mod reduced;
mod restoring;
pub mod snapshot;
mod trainer;

pub use restoring::Restoring;
pub use trainer::{Control, Error, Notice, Plan, Sink, Source, StepReport, Trainer};

#[cfg(test)]
mod tests;
