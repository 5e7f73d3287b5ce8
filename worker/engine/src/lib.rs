//! The engine: one process per device. See ARCHITECTURE.md for the floors.

pub mod cli;
pub mod app;
pub mod once;
pub mod workbench;
pub mod task;
pub mod inbox;
pub mod io;
pub mod link;
pub mod device;
#[expect(unsafe_code, reason = "law L9: raw glue around libtorch")]
pub mod raw_tensor;
pub mod train;
pub mod distill;
pub mod evaluation;
pub mod models;
pub mod collective;
pub mod diffusion;
