//! The engine: one process per device. See ARCHITECTURE.md for the floors.

pub mod collective;
pub mod diffusion;
pub mod distill;
pub mod evaluation;
pub mod train;
