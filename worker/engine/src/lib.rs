//! The engine: one process per device. See ARCHITECTURE.md for the floors.

pub mod app;
pub mod cli;
pub mod collective;
pub mod device;
pub mod diffusion;
pub mod distill;
pub mod evaluation;
pub mod inbox;
pub mod io;
pub mod link;
pub mod models;
pub mod once;
#[expect(unsafe_code, reason = "law L9: raw glue around libtorch")]
pub mod raw_tensor;
pub mod task;
pub mod train;
pub mod workbench;
