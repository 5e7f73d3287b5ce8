//! The transformer that follows a resnet: self-attention, attention to text, and a gated MLP.

use tch::Tensor;

use distillery_common::teacher::UnetConfig;

use super::layers::{Conv2d, GroupNorm, LayerNorm, Linear, attend, plus};
use super::parameters::Scope;
use super::recompute::Part;

/// Epsilon of the group norm before a transformer, whatever the resnets have.
const NORM_EPS: f64 = 1e-6;

/// Epsilon of the layer norms.
const LAYER_NORM_EPS: f64 = 1e-5;

/// Queries from one side, keys and values from another.
#[derive(Debug)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    heads: i64,
}

impl Attention {
    fn new(scope: &Scope<'_>, heads: i64) -> Self {
        Self {
            q: Linear::new(&scope.at("to_q")),
            k: Linear::new(&scope.at("to_k")),
            v: Linear::new(&scope.at("to_v")),
            out: Linear::new(&scope.at("to_out.0")),
            heads,
        }
    }

    fn forward(&self, x: &Tensor, source: &Tensor) -> Tensor {
        let (q, k, v) = (
            self.q.forward(x),
            self.k.forward(source),
            self.v.forward(source),
        );
        self.out.forward(&attend(&q, &k, &v, self.heads, false))
    }
}

/// One block: three residual steps, each after a layer norm.
#[derive(Debug)]
struct Block {
    norms: [LayerNorm; 3],
    own: Attention,
    cross: Attention,
    gate: Linear,
    out: Linear,
}

impl Block {
    fn new(scope: &Scope<'_>, heads: i64) -> Self {
        Self {
            norms: ["norm1", "norm2", "norm3"]
                .map(|name| LayerNorm::new(&scope.at(name), LAYER_NORM_EPS)),
            own: Attention::new(&scope.at("attn1"), heads),
            cross: Attention::new(&scope.at("attn2"), heads),
            gate: Linear::new(&scope.at("ff.net.0.proj")),
            out: Linear::new(&scope.at("ff.net.2")),
        }
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Tensor {
        let h = self.norms[0].forward(x);
        let x = plus(self.own.forward(&h, &h), x);
        let h = self.norms[1].forward(&x);
        let x = plus(self.cross.forward(&h, context), &x);
        let halves = self.gate.forward(&self.norms[2].forward(&x)).chunk(2, -1);
        plus(self.out.forward(&(&halves[0] * halves[1].gelu("none"))), &x)
    }
}

/// In or out of the transformer.
#[derive(Debug)]
enum Projection {
    Linear(Linear),
    Conv(Conv2d),
}

impl Projection {
    fn new(scope: &Scope<'_>, linear: bool) -> Self {
        match linear {
            true => Self::Linear(Linear::new(scope)),
            false => Self::Conv(Conv2d::pointwise(scope)),
        }
    }
}

/// `[B, C, H, W]` to `[B, HW, C]`.
fn flatten(x: &Tensor) -> Tensor {
    let (batch, channels, height, width) = x.size4().expect("images are [B, C, H, W]");
    x.permute([0, 2, 3, 1])
        .reshape([batch, height * width, channels])
}

/// `[B, HW, C]` to the shape `size`, `[B, C, H, W]`.
fn unflatten(x: &Tensor, (batch, channels, height, width): (i64, i64, i64, i64)) -> Tensor {
    x.reshape([batch, height, width, channels])
        .permute([0, 3, 1, 2])
}

/// Norm, projection, blocks, projection, and the residual over all of them.
#[derive(Debug)]
pub(super) struct Transformer {
    norm: GroupNorm,
    input: Projection,
    blocks: Vec<Part<Block>>,
    output: Projection,
}

impl Transformer {
    pub(super) fn new(scope: &Scope<'_>, config: &UnetConfig, level: usize) -> Self {
        let linear = config.linear_projection;
        let block = |index| {
            Part::new(Block::new(
                &scope.at(format_args!("transformer_blocks.{index}")),
                config.heads[level],
            ))
        };
        Self {
            norm: GroupNorm::new(&scope.at("norm"), config.norm_groups, NORM_EPS),
            input: Projection::new(&scope.at("proj_in"), linear),
            blocks: (0..config.depths[level]).map(block).collect(),
            output: Projection::new(&scope.at("proj_out"), linear),
        }
    }

    /// `x` `[B, C, H, W]`, `context` `[B, S, D]`. With `recompute`, the blocks compute their activations again in the
    /// backward pass.
    pub(super) fn forward(&self, x: &Tensor, context: &Tensor, recompute: bool) -> Tensor {
        let size = x.size4().expect("images are [B, C, H, W]");
        let h = self.norm.forward(x);
        let mut h = match &self.input {
            Projection::Linear(linear) => linear.forward(&flatten(&h)),
            Projection::Conv(conv) => flatten(&conv.forward(&h)),
        };
        for block in &self.blocks {
            h = match recompute {
                true => block.recomputed(&[&h, context], |block, given| {
                    block.forward(&given[0], &given[1])
                }),
                false => block.forward(&h, context),
            };
        }
        let h = match &self.output {
            Projection::Linear(linear) => unflatten(&linear.forward(&h), size),
            Projection::Conv(conv) => conv.forward(&unflatten(&h, size)),
        };
        plus(h, x)
    }
}
