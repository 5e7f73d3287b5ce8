//! What end-to-end tests and benchmarks share: the stand-in for the engine, a fleet of simulated workers, a harness
//! that starts, kills and compares runs, and figures with their goals.
//!
//! Sees the other crates' programs from outside, as processes; `simulation` alone runs coordinator and worker in its own
//! process. Must never link a tensor library.

pub mod compare;
pub mod figure;
pub mod fleet;
pub mod fuzz;
pub mod harness;
pub mod kubernetes;
pub mod manifests;
pub mod mutants;
pub mod sim;
pub mod simulation;
