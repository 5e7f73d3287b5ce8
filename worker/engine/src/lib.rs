//! The engine: one process per device. See ARCHITECTURE.md for the floors.

pub mod diffusion;
pub mod evaluation;
