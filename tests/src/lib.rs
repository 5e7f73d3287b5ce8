//! What end-to-end tests share: the stand-in for the engine, and a harness that starts, kills and compares runs.
//!
//! Sees the other crates' programs from outside, as processes; `simulation` alone runs coordinator and worker in its own
//! process. Must never link a tensor library.

pub mod compare;
pub mod harness;
pub mod mutants;
pub mod sim;
pub mod simulation;
