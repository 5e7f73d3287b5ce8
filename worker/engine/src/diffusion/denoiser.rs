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

impl Conditioning {
    /// The rows `index` `[N]` (i64).
    pub fn select(&self, index: &Tensor) -> Self {
        self.map(|x| x.index_select(0, index))
    }

    /// One row repeated `rows` times, without a copy; already that many rows stay as they are.
    pub fn expand(&self, rows: i64) -> Self {
        self.map(|x| {
            let mut shape = x.size();
            shape[0] = rows;
            x.expand(&shape[..], false)
        })
    }

    /// These rows, then those of `other`; both have the same parts.
    pub fn concat(&self, other: &Self) -> Self {
        let join = |a: &Option<Tensor>, b: &Option<Tensor>| match (a, b) {
            (Some(a), Some(b)) => Some(Tensor::cat(&[a, b], 0)),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                panic!("conditionings of one denoiser have the same parts")
            }
        };
        Self {
            context: Tensor::cat(&[&self.context, &other.context], 0),
            pooled: join(&self.pooled, &other.pooled),
            time_ids: join(&self.time_ids, &other.time_ids),
        }
    }

    /// The rows of all `parts`, which have the same parts, one below the other.
    pub fn stack(parts: &[&Self]) -> Self {
        let (first, rest) = parts.split_first().expect("a batch has a row");
        if rest.is_empty() {
            return first.map(Tensor::shallow_clone);
        }
        let join = |of: &dyn Fn(&Self) -> Option<&Tensor>| {
            let rows: Option<Vec<&Tensor>> = parts.iter().map(|&part| of(part)).collect();
            rows.map(|rows| Tensor::cat(&rows, 0))
        };
        Self {
            context: join(&|c| Some(&c.context)).expect("every conditioning has a context"),
            pooled: join(&|c| c.pooled.as_ref()),
            time_ids: join(&|c| c.time_ids.as_ref()),
        }
    }

    fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            context: f(&self.context),
            pooled: self.pooled.as_ref().map(&f),
            time_ids: self.time_ids.as_ref().map(&f),
        }
    }
}

/// A network that predicts noise, velocity or data from a noisy latent.
pub trait Denoiser {
    /// The raw prediction for `z` `[B, C, H, W]` at integer times `t` `[B]` (i64), of the shape of `z`, in f32.
    fn predict(&self, z: &Tensor, t: &Tensor, conditioning: &Conditioning) -> Tensor;
}
