//! `text_encoder/config.json` and `text_encoder_2/config.json`: CLIP text encoders.

use super::Error;
use super::keys::{Keys, MAX_TEXT_LAYERS};

/// The activation of a text encoder's MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// The exact Gaussian error linear unit.
    Gelu,
}

/// A checked `CLIPTextModel` or `CLIPTextModelWithProjection` configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Entries of the token embedding.
    pub vocabulary: i64,
    /// Width of the hidden states.
    pub width: i64,
    /// Inner width of the MLPs.
    pub mlp_width: i64,
    /// Number of layers.
    pub layers: i64,
    /// Attention heads.
    pub heads: i64,
    /// Positions: the longest text in tokens.
    pub positions: i64,
    /// Activation of the MLPs.
    pub activation: Activation,
    /// Epsilon of the layer norms.
    pub norm_eps: f64,
    /// The end token, or 2 for "wherever the largest id is" (old files).
    pub eos_token_id: i64,
    /// Width of the pooled text, for encoders with a projection.
    pub projection: Option<i64>,
}

impl TextConfig {
    /// Reads the configuration of an encoder of `class`, as `model_index.json` names it.
    pub(super) fn read(keys: &Keys, class: &str) -> Result<Self, Error> {
        let projection = match class {
            "CLIPTextModel" => None,
            "CLIPTextModelWithProjection" => Some(keys.dimension("projection_dim", 512)?),
            other => {
                let problem = format!(
                    "belongs to class {other:?}; supported: \"CLIPTextModel\" and \"CLIPTextModelWithProjection\""
                );
                return Err(Error::file(&keys.path, problem));
            }
        };
        if let Some(names) = keys.texts("architectures")?
            && !names.contains(&class)
        {
            return Err(keys.wrong(
                "architectures",
                format!("is {names:?}, but model_index.json says {class:?}"),
            ));
        }
        let config = Self {
            vocabulary: keys.dimension("vocab_size", 49408)?,
            width: keys.dimension("hidden_size", 512)?,
            mlp_width: keys.dimension("intermediate_size", 2048)?,
            layers: keys.layers("num_hidden_layers", 12, MAX_TEXT_LAYERS)?,
            heads: keys.dimension("num_attention_heads", 8)?,
            positions: keys.dimension("max_position_embeddings", 77)?,
            activation: match keys.text("hidden_act")? {
                None | Some("quick_gelu") => Activation::QuickGelu,
                Some("gelu") => Activation::Gelu,
                Some(other) => {
                    return Err(keys.wrong(
                        "hidden_act",
                        format!("is {other:?}; supported: \"quick_gelu\" and \"gelu\""),
                    ));
                }
            },
            norm_eps: keys.number("layer_norm_eps", 1e-5)?,
            eos_token_id: keys.integer("eos_token_id", 49407)?,
            projection,
        };
        let stated = |key: &str| keys.get(key).map(|_| keys.integer(key, 0)).transpose();
        for (key, id) in [
            ("eos_token_id", Some(config.eos_token_id)),
            ("bos_token_id", stated("bos_token_id")?),
        ] {
            if let Some(id) = id
                && !(0..config.vocabulary).contains(&id)
            {
                let problem = format!("is {id}, but vocab_size is {}", config.vocabulary);
                return Err(keys.wrong(key, problem));
            }
        }
        if config.width % config.heads != 0 {
            return Err(keys.wrong(
                "num_attention_heads",
                format!("does not divide hidden_size {}", config.width),
            ));
        }
        Ok(config)
    }
}
