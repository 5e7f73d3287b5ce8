//! `unet/config.json`: the denoiser, in both families (SD 1.5 and SDXL).

use serde_json::{Value, json};

use super::Error;
use super::keys::{Keys, MAX_DEPTH, MAX_LAYERS};

/// What a level of the UNet holds beside its resnets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Nothing.
    Plain,
    /// A transformer after each resnet.
    CrossAttention,
}

/// The added embedding of SDXL: pooled text and six sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextTime {
    /// Width of the embedding of each size.
    pub size_width: i64,
    /// Width of pooled text and all six embeddings together.
    pub input_width: i64,
}

/// A checked `UNet2DConditionModel` configuration. Lists run from the finest level to the coarsest.
#[derive(Debug, Clone, PartialEq)]
pub struct UnetConfig {
    /// Default side of the latent.
    pub sample_size: i64,
    /// Channels of the latent.
    pub in_channels: i64,
    /// Channels of the prediction.
    pub out_channels: i64,
    /// Channels of each level.
    pub channels: Vec<i64>,
    /// Kind of each level on the way down.
    pub down: Vec<Level>,
    /// Kind of each level on the way up, in the order of `up_blocks`: from the coarsest to the finest.
    pub up: Vec<Level>,
    /// Resnets of each level on the way down; one more on the way up.
    pub layers: Vec<i64>,
    /// Attention heads of each level (the key is called `attention_head_dim`).
    pub heads: Vec<i64>,
    /// Transformer blocks after each resnet of each level.
    pub depths: Vec<i64>,
    /// Width of the text states.
    pub context_width: i64,
    /// Width of the time embedding.
    pub time_width: i64,
    /// Whether `proj_in` and `proj_out` are linear rather than 1x1 convolutions.
    pub linear_projection: bool,
    /// Groups of the group norms.
    pub norm_groups: i64,
    /// Epsilon of the group norms in resnets.
    pub norm_eps: f64,
    /// Cosines before sines in the time embedding.
    pub flip_sin_to_cos: bool,
    /// Subtracted from the number of frequencies in the divisor.
    pub freq_shift: f64,
    /// Width of the guidance embedding of a student distilled with one.
    pub guidance_width: Option<i64>,
    /// The added embedding of SDXL.
    pub text_time: Option<TextTime>,
}

/// Keys that change the arithmetic, with the values whose arithmetic is ours.
fn fixed_keys() -> [(&'static str, Vec<Value>); 25] {
    [
        ("act_fn", vec![json!("silu"), json!("swish")]),
        ("addition_embed_type", vec![json!("text_time")]),
        ("attention_type", vec![json!("default")]),
        ("center_input_sample", vec![json!(false)]),
        ("class_embed_type", vec![]),
        ("class_embeddings_concat", vec![json!(false)]),
        ("conv_in_kernel", vec![json!(3)]),
        ("conv_out_kernel", vec![json!(3)]),
        ("cross_attention_norm", vec![]),
        ("downsample_padding", vec![json!(1)]),
        ("dropout", vec![json!(0)]),
        ("dual_cross_attention", vec![json!(false)]),
        ("encoder_hid_dim", vec![]),
        ("encoder_hid_dim_type", vec![]),
        ("mid_block_only_cross_attention", vec![json!(false)]),
        ("mid_block_scale_factor", vec![json!(1)]),
        ("mid_block_type", vec![json!("UNetMidBlock2DCrossAttn")]),
        ("num_attention_heads", vec![]),
        ("num_class_embeds", vec![]),
        ("resnet_out_scale_factor", vec![json!(1)]),
        ("resnet_skip_time_act", vec![json!(false)]),
        ("resnet_time_scale_shift", vec![json!("default")]),
        ("reverse_transformer_layers_per_block", vec![]),
        ("time_embedding_act_fn", vec![]),
        ("time_embedding_type", vec![json!("positional")]),
    ]
}

/// Keys that are read, or that do not change what is computed.
const OTHER_KEYS: [&str; 23] = [
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "flip_sin_to_cos",
    "freq_shift",
    "in_channels",
    "layers_per_block",
    "norm_eps",
    "norm_num_groups",
    "only_cross_attention",
    "out_channels",
    "projection_class_embeddings_input_dim",
    "sample_size",
    "time_cond_proj_dim",
    "time_embedding_dim",
    "timestep_post_act",
    "transformer_layers_per_block",
    "up_block_types",
    "upcast_attention",
    "use_linear_projection",
];

impl UnetConfig {
    pub(super) fn read(keys: &Keys, warnings: &mut Vec<String>) -> Result<Self, Error> {
        keys.class("UNet2DConditionModel")?;
        check_fixed(keys, warnings)?;
        let channels = keys.required_dimension_list("block_out_channels")?;
        let levels = channels.len();
        let down = levels_of(
            keys,
            "down_block_types",
            ["DownBlock2D", "CrossAttnDownBlock2D"],
            levels,
        )?;
        let up = levels_of(
            keys,
            "up_block_types",
            ["UpBlock2D", "CrossAttnUpBlock2D"],
            levels,
        )?;
        let context_width = keys.dimensions("cross_attention_dim", 1280, levels)?;
        if context_width.iter().any(|width| *width != context_width[0]) {
            return Err(keys.wrong("cross_attention_dim", "must be the same at every level"));
        }
        let config = Self {
            sample_size: keys.required_dimension("sample_size")?,
            in_channels: keys.dimension("in_channels", 4)?,
            out_channels: keys.dimension("out_channels", 4)?,
            down,
            up,
            layers: keys.layer_list("layers_per_block", 2, MAX_LAYERS, levels)?,
            heads: keys.dimensions("attention_head_dim", 8, levels)?,
            depths: keys.layer_list("transformer_layers_per_block", 1, MAX_DEPTH, levels)?,
            context_width: context_width[0],
            time_width: keys.dimension("time_embedding_dim", 4 * channels[0])?,
            linear_projection: keys.flag("use_linear_projection", false)?,
            norm_groups: keys.dimension("norm_num_groups", 32)?,
            norm_eps: keys.number("norm_eps", 1e-5)?,
            flip_sin_to_cos: keys.flag("flip_sin_to_cos", true)?,
            freq_shift: keys.number("freq_shift", 0.0)?,
            guidance_width: keys.optional_dimension("time_cond_proj_dim")?,
            text_time: text_time(keys)?,
            channels,
        };
        config.check(keys)?;
        Ok(config)
    }

    /// Complains where the numbers do not fit each other.
    fn check(&self, keys: &Keys) -> Result<(), Error> {
        if self.in_channels != self.out_channels {
            let problem = format!(
                "is {}, but in_channels is {}; they must be equal",
                self.out_channels, self.in_channels
            );
            return Err(keys.wrong("out_channels", problem));
        }
        for (&channels, &heads) in self.channels.iter().zip(&self.heads) {
            if channels % self.norm_groups != 0 {
                return Err(keys.wrong(
                    "norm_num_groups",
                    format!("does not divide {channels} channels"),
                ));
            }
            if channels % heads != 0 {
                return Err(keys.wrong(
                    "attention_head_dim",
                    format!("is a number of heads and does not divide {channels} channels"),
                ));
            }
        }
        if self.channels[0] % 2 != 0 {
            return Err(keys.wrong("block_out_channels", "must start with an even number"));
        }
        Ok(())
    }

    /// How often the latent's sides are halved.
    pub fn halvings(&self) -> usize {
        self.channels.len() - 1
    }

    /// Channels of the skip connections, in the order in which the way down leaves them.
    pub fn skip_channels(&self) -> Vec<i64> {
        let mut skips = vec![self.channels[0]];
        for (level, &channels) in self.channels.iter().enumerate() {
            let downsampled = i64::from(level < self.halvings());
            skips.extend((0..self.layers[level] + downsampled).map(|_| channels));
        }
        skips
    }
}

fn check_fixed(keys: &Keys, warnings: &mut Vec<String>) -> Result<(), Error> {
    let fixed = fixed_keys();
    for (key, supported) in &fixed {
        keys.only(key, supported)?;
    }
    keys.only("timestep_post_act", &[])?;
    if keys.get("mid_block_type").is_none() && keys.names().any(|key| key == "mid_block_type") {
        return Err(keys.wrong(
            "mid_block_type",
            "is null; supported: \"UNetMidBlock2DCrossAttn\"",
        ));
    }
    match keys.get("only_cross_attention") {
        None | Some(Value::Bool(false)) => {}
        Some(Value::Array(list)) if list.iter().all(|entry| *entry == json!(false)) => {}
        Some(value) => {
            return Err(keys.wrong(
                "only_cross_attention",
                format!("is {value}; supported: false"),
            ));
        }
    }
    for key in keys.names() {
        let known = key.starts_with('_')
            || OTHER_KEYS.contains(&key)
            || fixed.iter().any(|(name, _)| *name == key);
        if !known && keys.get(key).is_some() {
            warnings.push(format!(
                "{}: {key} is unknown and ignored",
                keys.path.display()
            ));
        }
    }
    Ok(())
}

fn levels_of(
    keys: &Keys,
    key: &str,
    [plain, attention]: [&str; 2],
    levels: usize,
) -> Result<Vec<Level>, Error> {
    let names = keys
        .texts(key)?
        .ok_or_else(|| keys.wrong(key, "is missing"))?;
    if names.len() != levels {
        return Err(keys.wrong(
            key,
            format!("has {} entries instead of {levels}", names.len()),
        ));
    }
    let level = |name: &&str| match *name {
        name if name == plain => Ok(Level::Plain),
        name if name == attention => Ok(Level::CrossAttention),
        other => Err(keys.wrong(
            key,
            format!("names {other:?}; supported: {plain:?} and {attention:?}"),
        )),
    };
    names.iter().map(level).collect()
}

fn text_time(keys: &Keys) -> Result<Option<TextTime>, Error> {
    if keys.get("addition_embed_type").is_none() {
        return Ok(None);
    }
    let config = TextTime {
        size_width: keys.required_dimension("addition_time_embed_dim")?,
        input_width: keys.required_dimension("projection_class_embeddings_input_dim")?,
    };
    if config.size_width % 2 != 0 {
        return Err(keys.wrong("addition_time_embed_dim", "must be even"));
    }
    if config.input_width <= 6 * config.size_width {
        let problem = format!(
            "must exceed six times addition_time_embed_dim, {}",
            6 * config.size_width
        );
        return Err(keys.wrong("projection_class_embeddings_input_dim", problem));
    }
    Ok(Some(config))
}
