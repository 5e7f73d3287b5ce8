//! CLIP text encoders.

use std::collections::BTreeMap;

use distillery_common::teacher::{Activation, TextConfig};
use tch::{Kind, Tensor};

use super::layers::{LayerNorm, Linear, attend, is_compute_kind};
use super::parameters::{Parameters, Scope, Source};

/// An `eos_token_id` in old configurations that stands for "wherever the largest id is".
const LEGACY_EOS: i64 = 2;

/// What an encoder makes of a batch of texts.
#[derive(Debug)]
pub struct Encoded {
    /// States after the last layer and the final norm `[B, S, D]`.
    pub last: Tensor,
    /// States before the last layer, without the final norm `[B, S, D]`.
    pub penultimate: Tensor,
    /// The final state at the end token, through the projection when there is one: `[B, P]`.
    pub pooled: Tensor,
}

/// A text encoder.
#[derive(Debug)]
pub struct TextEncoder {
    config: TextConfig,
    compute: Kind,
    tokens: Tensor,
    positions: Tensor,
    layers: Vec<Layer>,
    norm: LayerNorm,
    projection: Option<Linear>,
}

impl TextEncoder {
    /// Puts an encoder together from the tensors that `config` calls for
    /// (`distillery_common::teacher::text_tensors`).
    pub fn new(config: TextConfig, parameters: &Parameters, compute: Kind) -> Self {
        assert!(
            is_compute_kind(compute),
            "networks compute in f32, f16 or bf16"
        );
        let adapters = BTreeMap::new();
        let source = Source::new(parameters, &adapters);
        let root = source.root();
        let layer = |index| Layer::new(&root.at(format_args!("encoder.layers.{index}")), &config);
        let encoder = Self {
            compute,
            tokens: root.at("embeddings.token_embedding").tensor("weight"),
            positions: root.at("embeddings.position_embedding").tensor("weight"),
            layers: (0..config.layers).map(layer).collect(),
            norm: LayerNorm::new(&root.at("final_layer_norm"), config.norm_eps),
            projection: config
                .projection
                .map(|_| Linear::new(&root.at("text_projection"))),
            config,
        };
        source.finish();
        encoder
    }

    /// What it looks like.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// Encodes token ids `[B, S]` (i64), S at most the number of positions; results in f32.
    pub fn forward(&self, ids: &Tensor) -> Encoded {
        let (batch, length) = ids.size2().expect("ids are [B, S]");
        assert!(length <= self.config.positions, "texts fit the positions");
        let ids = ids.to_device(self.tokens.device());
        let tokens = Tensor::embedding(&self.tokens, &ids, -1, false, false).to_kind(self.compute);
        let mut x = tokens + self.positions.narrow(0, 0, length).to_kind(self.compute);
        let mut penultimate = x.shallow_clone();
        for layer in &self.layers {
            penultimate = x.shallow_clone();
            x = layer.forward(&x);
        }
        let last = self.norm.forward(&x);
        let rows = Tensor::arange(batch, (Kind::Int64, last.device()));
        let end = last.index(&[Some(rows), Some(self.end_positions(&ids))]);
        let pooled = self.projection.as_ref().map_or_else(
            || end.shallow_clone(),
            |projection| projection.forward(&end),
        );
        Encoded {
            last: last.to_kind(Kind::Float),
            penultimate: penultimate.to_kind(Kind::Float),
            pooled: pooled.to_kind(Kind::Float),
        }
    }

    /// Where each text ends `[B]`: at the first end token; in old files at the (first) largest id.
    fn end_positions(&self, ids: &Tensor) -> Tensor {
        match self.config.eos_token_id {
            LEGACY_EOS => ids.argmax(-1, false),
            eos => ids.eq(eos).to_kind(Kind::Int).argmax(-1, false),
        }
    }
}

/// One layer: attention to what came before, and an MLP, each after a norm and with a residual.
#[derive(Debug)]
struct Layer {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: i64,
    activation: Activation,
}

impl Layer {
    fn new(scope: &Scope<'_>, config: &TextConfig) -> Self {
        let attention = scope.at("self_attn");
        Self {
            norm1: LayerNorm::new(&scope.at("layer_norm1"), config.norm_eps),
            q: Linear::new(&attention.at("q_proj")),
            k: Linear::new(&attention.at("k_proj")),
            v: Linear::new(&attention.at("v_proj")),
            out: Linear::new(&attention.at("out_proj")),
            norm2: LayerNorm::new(&scope.at("layer_norm2"), config.norm_eps),
            fc1: Linear::new(&scope.at("mlp.fc1")),
            fc2: Linear::new(&scope.at("mlp.fc2")),
            heads: config.heads,
            activation: config.activation,
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let h = self.norm1.forward(x);
        let (q, k, v) = (self.q.forward(&h), self.k.forward(&h), self.v.forward(&h));
        let x = x + self.out.forward(&attend(&q, &k, &v, self.heads, true));
        let h = self.fc1.forward(&self.norm2.forward(&x));
        let h = match self.activation {
            Activation::QuickGelu => &h * (&h * 1.702).sigmoid(),
            Activation::Gelu => h.gelu("none"),
        };
        x + self.fc2.forward(&h)
    }
}
