//! Where networks and objectives meet.

use tch::Tensor;

/// What a denoiser is conditioned on, for a batch of B.
#[derive(Debug)]
pub struct Conditioning {
    /// Text states `[B, S, D]`.
    pub context: Tensor,
    /// Pooled text `[B, P]`, for networks with `text_time` (SDXL).
    pub pooled: Option<Tensor>,
    /// Sizes and crop `[B, 6]` (original h, w; crop top, left; target h, w), beside `pooled`.
    pub time_ids: Option<Tensor>,
}

/// A network that predicts noise, velocity or data from a noisy latent.
pub trait Denoiser {
    /// The raw prediction for `z` `[B, C, H, W]` at integer times `t` `[B]` (i64), of the shape of `z`, in f32.
    fn predict(&self, z: &Tensor, t: &Tensor, conditioning: &Conditioning) -> Tensor;
}
