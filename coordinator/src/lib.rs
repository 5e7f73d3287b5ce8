//! The head-node process and the user's command line.
//!
//! Reading order: `plan` and `scheduler` decide and are pure; `journal` remembers; `driver` carries out; `service`
//! talks to workers and people; `launch` starts workers; `garbage` finds what nothing names; `app` and `cli` put them together, and speak through
//! `console`. Must never link libtorch, CUDA or NCCL, and never import the worker.

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod app;
pub mod cli;
pub mod console;
pub mod doctor;
pub mod driver;
pub mod garbage;
pub mod http;
pub mod journal;
pub mod launch;
pub mod metrics;
pub mod plan;
pub mod report;
pub mod scheduler;
pub mod service;
pub mod spans;
#[cfg(test)]
mod testing;
