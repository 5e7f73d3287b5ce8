//! The autoencoder: between pictures and latents.

use std::collections::BTreeMap;

use distillery_common::teacher::VaeConfig;
use tch::{Device, Kind, Tensor};

use super::layers::{Conv2d, GroupNorm, Linear, attend, is_compute_kind};
use super::parameters::{Parameters, Scope, Source};
use super::resnet::{Resnet, Upsample};

/// Epsilon of all norms.
const NORM_EPS: f64 = 1e-6;

/// Bounds of the encoder's log variance.
const LOG_VARIANCE: (f64, f64) = (-30.0, 20.0);

/// An autoencoder.
#[derive(Debug)]
pub struct Vae {
    config: VaeConfig,
    compute: Kind,
    device: Device,
    encoder: Encoder,
    decoder: Decoder,
}

impl Vae {
    /// Puts an autoencoder together from the tensors that `config` calls for
    /// (`distillery_common::teacher::vae_tensors`).
    pub fn new(config: VaeConfig, parameters: &Parameters, compute: Kind) -> Self {
        assert!(
            is_compute_kind(compute),
            "networks compute in f32, f16 or bf16"
        );
        let adapters = BTreeMap::new();
        let source = Source::new(parameters, &adapters);
        let vae = Self {
            compute,
            device: parameters["decoder.conv_in.weight"].device(),
            encoder: Encoder::new(&source.root(), &config),
            decoder: Decoder::new(&source.root(), &config),
            config,
        };
        source.finish();
        vae
    }

    /// What it looks like.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Mean and log variance of the latents of `pictures` `[B, 3, H, W]` in -1..1, before scaling; each
    /// `[B, C, H/f, W/f]` in f32.
    pub fn encode_moments(&self, pictures: &Tensor) -> (Tensor, Tensor) {
        let x = pictures.to_device(self.device).to_kind(self.compute);
        let moments = self.encoder.forward(&x).to_kind(Kind::Float).chunk(2, 1);
        let (low, high) = LOG_VARIANCE;
        (moments[0].shallow_clone(), moments[1].clamp(low, high))
    }

    /// The means as latents a denoiser knows, scaled; f32.
    pub fn encode(&self, pictures: &Tensor) -> Tensor {
        self.scale(&self.encode_moments(pictures).0)
    }

    /// Pictures `[B, 3, H, W]`, about -1..1, of the scaled latents `z` `[B, C, H/f, W/f]`; f32.
    pub fn decode(&self, z: &Tensor) -> Tensor {
        let z = self.unscale(&z.to_device(self.device).to_kind(Kind::Float));
        self.decoder
            .forward(&z.to_kind(self.compute))
            .to_kind(Kind::Float)
    }

    /// `(z - shift) * scaling_factor`, or by channel `(z - mean) * scaling_factor / std`.
    fn scale(&self, z: &Tensor) -> Tensor {
        let scaled = self.config.scaling_factor;
        match self.mean_std() {
            Some((mean, std)) => (z - mean) * scaled / std,
            None => (z - self.config.shift_factor) * scaled,
        }
    }

    /// The inverse of `scale`.
    fn unscale(&self, z: &Tensor) -> Tensor {
        let scaled = self.config.scaling_factor;
        match self.mean_std() {
            Some((mean, std)) => z * std / scaled + mean,
            None => z / scaled + self.config.shift_factor,
        }
    }

    fn mean_std(&self) -> Option<(Tensor, Tensor)> {
        let (mean, std) = self.config.latents_mean_std.as_ref()?;
        let by_channel = |list: &[f64]| {
            let list = Tensor::from_slice(list)
                .to_kind(Kind::Float)
                .to_device(self.device);
            list.view([1, -1, 1, 1])
        };
        Some((by_channel(mean), by_channel(std)))
    }
}

/// Attention of one head over all places.
#[derive(Debug)]
struct SpatialAttention {
    norm: GroupNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
}

impl SpatialAttention {
    fn new(scope: &Scope<'_>, config: &VaeConfig) -> Self {
        Self {
            norm: GroupNorm::new(&scope.at("group_norm"), config.norm_groups, NORM_EPS),
            q: Linear::new(&scope.at("to_q")),
            k: Linear::new(&scope.at("to_k")),
            v: Linear::new(&scope.at("to_v")),
            out: Linear::new(&scope.at("to_out.0")),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let size = x.size();
        let places = self.norm.forward(x).flatten(2, 3).transpose(1, 2);
        let (q, k, v) = (
            self.q.forward(&places),
            self.k.forward(&places),
            self.v.forward(&places),
        );
        let h = self.out.forward(&attend(&q, &k, &v, 1, false));
        x + h.transpose(1, 2).reshape(size)
    }
}

/// Two resnets, perhaps with attention between.
#[derive(Debug)]
struct Middle {
    first: Resnet,
    attention: Option<SpatialAttention>,
    second: Resnet,
}

impl Middle {
    fn new(scope: &Scope<'_>, config: &VaeConfig) -> Self {
        let channels = config.channels[config.channels.len() - 1];
        let attention = scope.at("attentions.0");
        Self {
            first: resnet(&scope.at("resnets.0"), config, channels, channels),
            attention: config
                .mid_attention
                .then(|| SpatialAttention::new(&attention, config)),
            second: resnet(&scope.at("resnets.1"), config, channels, channels),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let mut h = self.first.forward(x, None);
        if let Some(attention) = &self.attention {
            h = attention.forward(&h);
        }
        self.second.forward(&h, None)
    }
}

fn resnet(scope: &Scope<'_>, config: &VaeConfig, input: i64, output: i64) -> Resnet {
    Resnet::new(scope, [input, output], false, config.norm_groups, NORM_EPS)
}

/// From pictures to moments.
#[derive(Debug)]
struct Encoder {
    conv_in: Conv2d,
    levels: Vec<(Vec<Resnet>, Option<Conv2d>)>,
    middle: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    quant: Option<Conv2d>,
}

impl Encoder {
    fn new(root: &Scope<'_>, config: &VaeConfig) -> Self {
        let scope = root.at("encoder");
        let mut input = config.channels[0];
        let mut levels = Vec::new();
        for (level, &output) in config.channels.iter().enumerate() {
            let scope = scope.at(format_args!("down_blocks.{level}"));
            let mut resnets = Vec::new();
            for index in 0..config.layers {
                resnets.push(resnet(
                    &scope.at(format_args!("resnets.{index}")),
                    config,
                    input,
                    output,
                ));
                input = output;
            }
            let is_last = level + 1 == config.channels.len();
            levels.push((
                resnets,
                (!is_last).then(|| Conv2d::new(&scope.at("downsamplers.0.conv"), 2, 0)),
            ));
        }
        Self {
            conv_in: Conv2d::same(&scope.at("conv_in")),
            levels,
            middle: Middle::new(&scope.at("mid_block"), config),
            norm_out: GroupNorm::new(&scope.at("conv_norm_out"), config.norm_groups, NORM_EPS),
            conv_out: Conv2d::same(&scope.at("conv_out")),
            quant: config
                .quant_conv
                .then(|| Conv2d::pointwise(&root.at("quant_conv"))),
        }
    }

    fn forward(&self, pictures: &Tensor) -> Tensor {
        let mut x = self.conv_in.forward(pictures);
        for (resnets, downsample) in &self.levels {
            for resnet in resnets {
                x = resnet.forward(&x, None);
            }
            if let Some(downsample) = downsample {
                // One row below and one column to the right, as the weights were trained.
                x = downsample.forward(&x.constant_pad_nd([0, 1, 0, 1]));
            }
        }
        let x = self.norm_out.forward(&self.middle.forward(&x)).silu();
        let x = self.conv_out.forward(&x);
        self.quant
            .as_ref()
            .map_or_else(|| x.shallow_clone(), |quant| quant.forward(&x))
    }
}

/// From latents to pictures.
#[derive(Debug)]
struct Decoder {
    quant: Option<Conv2d>,
    conv_in: Conv2d,
    middle: Middle,
    levels: Vec<(Vec<Resnet>, Option<Upsample>)>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(root: &Scope<'_>, config: &VaeConfig) -> Self {
        let scope = root.at("decoder");
        let mut input = config.channels[config.channels.len() - 1];
        let mut levels = Vec::new();
        for (block, &output) in config.channels.iter().rev().enumerate() {
            let scope = scope.at(format_args!("up_blocks.{block}"));
            let mut resnets = Vec::new();
            for index in 0..=config.layers {
                resnets.push(resnet(
                    &scope.at(format_args!("resnets.{index}")),
                    config,
                    input,
                    output,
                ));
                input = output;
            }
            let is_last = block + 1 == config.channels.len();
            levels.push((
                resnets,
                (!is_last).then(|| Upsample::new(&scope.at("upsamplers.0"))),
            ));
        }
        Self {
            quant: config
                .post_quant_conv
                .then(|| Conv2d::pointwise(&root.at("post_quant_conv"))),
            conv_in: Conv2d::same(&scope.at("conv_in")),
            middle: Middle::new(&scope.at("mid_block"), config),
            levels,
            norm_out: GroupNorm::new(&scope.at("conv_norm_out"), config.norm_groups, NORM_EPS),
            conv_out: Conv2d::same(&scope.at("conv_out")),
        }
    }

    fn forward(&self, z: &Tensor) -> Tensor {
        let z = self
            .quant
            .as_ref()
            .map_or_else(|| z.shallow_clone(), |quant| quant.forward(z));
        let mut x = self.middle.forward(&self.conv_in.forward(&z));
        for (resnets, upsample) in &self.levels {
            for resnet in resnets {
                x = resnet.forward(&x, None);
            }
            if let Some(upsample) = upsample {
                x = upsample.forward(&x, None);
            }
        }
        self.conv_out.forward(&self.norm_out.forward(&x).silu())
    }
}
