//! Classifier-free guidance in the Imagen form (arXiv 2205.11487, eq. 2).

use tch::Tensor;

use super::denoiser::{Conditioning, Denoiser};

/// `n_null + w (n_cond - n_null)`; w = 1 means none. (LCM's `cond + w' (cond - null)` has w' = w - 1.)
pub fn guided(null: &Tensor, cond: &Tensor, w: f64) -> Tensor {
    null + w * (cond - null)
}

/// A denoiser with guidance.
pub struct Guided<'a> {
    /// Who predicts.
    pub denoiser: &'a dyn Denoiser,
    /// The condition that says nothing, for one row.
    pub null: &'a Conditioning,
    /// w.
    pub scale: f64,
}

impl Guided<'_> {
    /// The guided prediction for `z` `[B, …]` at times `t` `[B]`: one pass over 2B rows, or over B when w = 1.
    pub fn predict(&self, z: &Tensor, t: &Tensor, conditioning: &Conditioning) -> Tensor {
        if self.scale == 1.0 {
            return self.denoiser.predict(z, t, conditioning);
        }
        let both = self.null.expand(z.size()[0]).concat(conditioning);
        let n = self
            .denoiser
            .predict(&Tensor::cat(&[z, z], 0), &Tensor::cat(&[t, t], 0), &both);
        let halves = n.chunk(2, 0);
        guided(&halves[0], &halves[1], self.scale)
    }
}
