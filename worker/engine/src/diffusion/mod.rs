//! The mathematics of diffusion on tensors: pure functions, no variables, randomness, recipe, storage or wire.

pub mod denoiser;
