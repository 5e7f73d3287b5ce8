//! `vae/config.json`: between pictures and latents.

use serde_json::{Value, json};

use super::Error;
use super::keys::{Keys, MAX_LAYERS};

/// Mean and standard deviation of each latent channel.
pub type MeanStd = (Vec<f64>, Vec<f64>);

/// A checked `AutoencoderKL` configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    /// Channels of a picture.
    pub in_channels: i64,
    /// Channels of a decoded picture.
    pub out_channels: i64,
    /// Channels of the latent.
    pub latent_channels: i64,
    /// Channels of each level, from the finest to the coarsest.
    pub channels: Vec<i64>,
    /// Resnets of each level of the encoder; one more in the decoder.
    pub layers: i64,
    /// Groups of the group norms.
    pub norm_groups: i64,
    /// Whether the middle holds attention.
    pub mid_attention: bool,
    /// Whether a 1x1 convolution follows the encoder.
    pub quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    pub post_quant_conv: bool,
    /// Latents are multiplied by it.
    pub scaling_factor: f64,
    /// Subtracted from latents before scaling.
    pub shift_factor: f64,
    /// Mean and standard deviation of each latent channel, instead of the shift.
    pub latents_mean_std: Option<MeanStd>,
    /// Whether f16 overflows, so that f32 is used instead.
    pub force_upcast: bool,
}

/// Keys that change the arithmetic, with the values whose arithmetic is ours.
fn fixed_keys() -> [(&'static str, Vec<Value>); 1] {
    [("act_fn", vec![json!("silu"), json!("swish")])]
}

impl VaeConfig {
    pub(super) fn read(keys: &Keys) -> Result<Self, Error> {
        keys.class("AutoencoderKL")?;
        for (key, supported) in fixed_keys() {
            keys.only(key, &supported)?;
        }
        let channels = keys.required_dimension_list("block_out_channels")?;
        same_blocks(
            keys,
            "down_block_types",
            "DownEncoderBlock2D",
            channels.len(),
        )?;
        same_blocks(keys, "up_block_types", "UpDecoderBlock2D", channels.len())?;
        let latent_channels = keys.dimension("latent_channels", 4)?;
        let config = Self {
            in_channels: keys.dimension("in_channels", 3)?,
            out_channels: keys.dimension("out_channels", 3)?,
            latent_channels,
            layers: keys.layers("layers_per_block", 1, MAX_LAYERS)?,
            norm_groups: keys.dimension("norm_num_groups", 32)?,
            mid_attention: keys.flag("mid_block_add_attention", true)?,
            quant_conv: keys.flag("use_quant_conv", true)?,
            post_quant_conv: keys.flag("use_post_quant_conv", true)?,
            scaling_factor: keys.number("scaling_factor", 0.18215)?,
            shift_factor: keys.number("shift_factor", 0.0)?,
            latents_mean_std: mean_and_std(keys, latent_channels)?,
            force_upcast: keys.flag("force_upcast", true)?,
            channels,
        };
        if let Some(channels) = config
            .channels
            .iter()
            .find(|width| *width % config.norm_groups != 0)
        {
            return Err(keys.wrong(
                "norm_num_groups",
                format!("does not divide {channels} channels"),
            ));
        }
        if config.scaling_factor <= 0.0 {
            return Err(keys.wrong("scaling_factor", "must be positive"));
        }
        Ok(config)
    }

    /// Pixels along a side for each latent cell.
    pub fn factor(&self) -> i64 {
        1 << (self.channels.len() - 1)
    }
}

fn same_blocks(keys: &Keys, key: &str, supported: &str, levels: usize) -> Result<(), Error> {
    let names = keys
        .texts(key)?
        .ok_or_else(|| keys.wrong(key, "is missing"))?;
    if names.len() != levels {
        return Err(keys.wrong(
            key,
            format!("has {} entries instead of {levels}", names.len()),
        ));
    }
    match names.iter().find(|name| **name != supported) {
        Some(name) => Err(keys.wrong(key, format!("names {name:?}; supported: {supported:?}"))),
        None => Ok(()),
    }
}

fn mean_and_std(keys: &Keys, channels: i64) -> Result<Option<MeanStd>, Error> {
    let (Some(mean), Some(std)) = (keys.numbers("latents_mean")?, keys.numbers("latents_std")?)
    else {
        return Ok(None);
    };
    for (key, list) in [("latents_mean", &mean), ("latents_std", &std)] {
        if list.len() as i64 != channels {
            return Err(keys.wrong(
                key,
                format!("has {} entries for {channels} latent channels", list.len()),
            ));
        }
    }
    if std.iter().any(|value| *value <= 0.0) {
        return Err(keys.wrong("latents_std", "must be positive"));
    }
    Ok(Some((mean, std)))
}
