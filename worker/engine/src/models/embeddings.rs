//! Embeddings of times, sizes and guidance.

use tch::{Kind, Tensor};

use distillery_common::teacher::UnetConfig;

use super::layers::Linear;
use super::parameters::Scope;

/// Longest period of the sinusoids.
const MAX_PERIOD: f64 = 10_000.0;

/// Sinusoids of `x` `[B]` at `width / 2` frequencies `exp(-ln(10000) i / (width/2 - shift))`: `[B, width]` in f32,
/// sines first unless `flip` (Vaswani et al., arXiv 1706.03762, §3.5, with the order of the two halves free).
pub(super) fn sinusoids(x: &Tensor, width: i64, flip: bool, shift: f64) -> Tensor {
    let half = width / 2;
    let exponent =
        Tensor::arange(half, (Kind::Float, x.device())) * -MAX_PERIOD.ln() / (half as f64 - shift);
    let angles = x.to_kind(Kind::Float).unsqueeze(-1) * exponent.exp().unsqueeze(0);
    match flip {
        true => Tensor::cat(&[angles.cos(), angles.sin()], -1),
        false => Tensor::cat(&[angles.sin(), angles.cos()], -1),
    }
}

/// The embedding of guidance scales `w` `[B]`, `[B, width]` in f32: sinusoids of `1000 w`, sines first, with the
/// divisor `width/2 - 1` (arXiv 2310.04378, appendix). The angles reach thousands, where an f32 has few digits left
/// after the point: the frequencies are rounded as the pipelines round them.
pub fn guidance_embedding(w: &Tensor, width: i64) -> Tensor {
    let half = width / 2;
    let step = f64::from(MAX_PERIOD.ln() as f32 / (half - 1) as f32);
    let frequencies = (Tensor::arange(half, (Kind::Float, w.device())) * -step).exp();
    let angles = (w.to_kind(Kind::Float) * 1000.0).unsqueeze(-1) * frequencies.unsqueeze(0);
    Tensor::cat(&[angles.sin(), angles.cos()], -1)
}

/// Two linear maps with a silu between.
#[derive(Debug)]
struct TwoLinears(Linear, Linear);

impl TwoLinears {
    fn new(scope: &Scope<'_>) -> Self {
        Self(
            Linear::new(&scope.at("linear_1")),
            Linear::new(&scope.at("linear_2")),
        )
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        self.1.forward(&self.0.forward(x).silu())
    }
}

/// The embedding of time, and of guidance and sizes where the network has them.
#[derive(Debug)]
pub(super) struct TimeEmbedding {
    time: TwoLinears,
    guidance: Option<Linear>,
    added: Option<TwoLinears>,
}

/// What the embedding is made of, for a batch of B.
#[derive(Debug)]
pub(super) struct Inputs<'a> {
    /// Times `[B]`.
    pub(super) t: &'a Tensor,
    /// Guidance scales `[B]` for networks distilled with an embedding of them.
    pub(super) guidance: Option<&'a Tensor>,
    /// Pooled text `[B, P]` and sizes `[B, 6]`.
    pub(super) text_time: Option<(&'a Tensor, &'a Tensor)>,
}

impl TimeEmbedding {
    pub(super) fn new(scope: &Scope<'_>, config: &UnetConfig) -> Self {
        let time = scope.at("time_embedding");
        Self {
            time: TwoLinears::new(&time),
            guidance: config
                .guidance_width
                .map(|_| Linear::new(&time.at("cond_proj"))),
            added: config
                .text_time
                .map(|_| TwoLinears::new(&scope.at("add_embedding"))),
        }
    }

    /// `[B, T]` in `kind`; sinusoids are taken in f32.
    pub(super) fn forward(&self, config: &UnetConfig, inputs: &Inputs<'_>, kind: Kind) -> Tensor {
        let sines = |x: &Tensor, width| {
            sinusoids(x, width, config.flip_sin_to_cos, config.freq_shift).to_kind(kind)
        };
        let mut input = sines(inputs.t, config.channels[0]);
        if let (Some(projection), Some(width), Some(w)) =
            (&self.guidance, config.guidance_width, inputs.guidance)
        {
            input += projection.forward(&guidance_embedding(w, width).to_kind(kind));
        }
        let time = self.time.forward(&input);
        let (Some(added), Some(text_time)) = (&self.added, config.text_time) else {
            return time;
        };
        let (pooled, sizes) = inputs
            .text_time
            .expect("the conditioning of a network with text_time carries pooled text and sizes");
        let sizes =
            sines(&sizes.flatten(0, -1), text_time.size_width).reshape([pooled.size()[0], -1]);
        time + added.forward(&Tensor::cat(&[pooled.to_kind(kind), sizes], -1))
    }
}
