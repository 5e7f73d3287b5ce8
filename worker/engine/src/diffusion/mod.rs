//! The mathematics of diffusion on tensors: pure functions, no variables, randomness, recipe, storage or wire.
//!
//! | letter | here |
//! |---|---|
//! | t, u | integer times, `0..1000`; 0 is the cleanest |
//! | z | a noisy latent, `[B, …]` |
//! | alpha, sigma | [`schedule`]: `z = alpha x0 + sigma eps` |
//! | n | what a network predicts; [`prediction`] turns it into (x0, eps) |
//! | tau | milestones, the ends of [`segments`] |
//! | w | guidance scale, [`guidance`] |
//! | f, g | the clean end of a state and its landing on a milestone, [`boundary`] |
//!
//! Arithmetic is f32 whatever a network computes in, because at t = 999 an error of eps is multiplied by 14.6
//! in x0; states in f64 stay in f64.

pub mod boundary;
pub mod denoiser;
pub mod guidance;
pub mod prediction;
pub mod sampler;
pub mod schedule;
pub mod segments;
pub mod solver;
pub mod trajectory;
