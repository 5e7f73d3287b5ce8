//! The denoiser: a conditional UNet in both families (SD 1.5 and SDXL).

use std::collections::BTreeMap;

use distillery_common::teacher::UnetConfig;
use tch::{Device, Kind, Tensor};

use super::embeddings::{Inputs, TimeEmbedding};
use super::layers::{Conv2d, GroupNorm, is_compute_kind, silu};
use super::parameters::{Adapter, Parameters, Source};
use super::unet_blocks::{Down, Given, Middle, Up};
use crate::diffusion::denoiser::{Conditioning, Denoiser};

/// The layers, put together.
#[derive(Debug)]
struct Modules {
    conv_in: Conv2d,
    time: TimeEmbedding,
    down: Vec<Down>,
    middle: Middle,
    up: Vec<Up>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// A UNet: its configuration, its tensors by name, and perhaps adapters.
#[derive(Debug)]
pub struct Unet {
    config: UnetConfig,
    parameters: Parameters,
    pub(super) adapters: BTreeMap<String, Adapter>,
    compute: Kind,
    recompute: bool,
    modules: Modules,
}

impl Unet {
    /// Puts a network together from the tensors that `config` calls for
    /// (`distillery_common::teacher::unet_tensors`), which stay shared with it. It computes in the number format
    /// `compute`, whatever that of its tensors.
    pub fn new(config: UnetConfig, parameters: Parameters, compute: Kind) -> Self {
        assert!(
            is_compute_kind(compute),
            "networks compute in f32, f16 or bf16"
        );
        let adapters = BTreeMap::new();
        let modules = Modules::new(&config, &parameters, &adapters);
        Self {
            config,
            parameters,
            adapters,
            compute,
            recompute: false,
            modules,
        }
    }

    /// What it looks like.
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// Where its tensors lie.
    pub fn device(&self) -> Device {
        self.parameters["conv_in.weight"].device()
    }

    /// Its own tensors by name, without adapters. What is done to them in place is done to the network.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let shared = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.shallow_clone());
        self.parameters.iter().map(shared).collect()
    }

    /// Whether gradients flow to its own tensors. Adapters have theirs always.
    pub fn set_trainable(&self, trainable: bool) {
        for tensor in self.parameters.values() {
            let _ = tensor.set_requires_grad(trainable);
        }
    }

    /// Whether the backward pass computes the activations of resnets and transformer blocks again, rather than keeping
    /// them: more time, far less memory, the same bits. A new network keeps them.
    pub fn set_recompute(&mut self, recompute: bool) {
        self.recompute = recompute;
    }

    /// A second network with the very tensors of this one. Whoever trains it must leave those alone: adapters freeze them.
    pub fn shared(&self) -> Self {
        let parameters = self.parameters().into_iter().collect();
        Self::new(self.config.clone(), parameters, self.compute)
    }

    /// A second network with the same values, sharing nothing, with tensors of `kind` on `device`, computing in `kind`;
    /// without adapters.
    pub fn duplicate(&self, kind: Kind, device: Device) -> Self {
        let copy = |tensor: &Tensor| tensor.detach().to_device(device).to_kind(kind).copy();
        let parameters = self
            .parameters
            .iter()
            .map(|(name, tensor)| (name.clone(), copy(tensor)));
        Self::new(self.config.clone(), parameters.collect(), kind)
    }

    /// The prediction for `z` `[B, C, H, W]` at times `t` `[B]`, in f32. `guidance` `[B]` holds the scales that a
    /// network with a guidance embedding is told (pipelines pass `w - 1`); other networks take none.
    pub fn forward(
        &self,
        z: &Tensor,
        t: &Tensor,
        conditioning: &Conditioning,
        guidance: Option<&Tensor>,
    ) -> Tensor {
        let (batch, channels, _, _) = z.size4().expect("latents are [B, C, H, W]");
        assert_eq!(
            channels, self.config.in_channels,
            "latents have the channels of the network"
        );
        assert_eq!(t.size(), [batch], "one time for each latent");
        assert_eq!(
            conditioning.context.size()[0],
            batch,
            "one text for each latent"
        );
        let inputs = Inputs {
            t,
            guidance,
            text_time: conditioning
                .pooled
                .as_ref()
                .zip(conditioning.time_ids.as_ref()),
        };
        let time = self
            .modules
            .time
            .forward(&self.config, &inputs, self.compute)
            .silu();
        let context = conditioning.context.to_kind(self.compute);
        let given = Given {
            time: &time,
            context: &context,
            recompute: self.recompute,
        };
        self.modules
            .forward(&z.to_kind(self.compute), given)
            .to_kind(Kind::Float)
    }

    /// Puts the layers together again after the adapters changed.
    pub(super) fn rebuild(&mut self) {
        self.modules = Modules::new(&self.config, &self.parameters, &self.adapters);
    }

    /// The number format of its arithmetic.
    pub fn compute(&self) -> Kind {
        self.compute
    }

    /// The tensor called `name`.
    pub(super) fn parameter_mut(&mut self, name: &str) -> Option<&mut Tensor> {
        self.parameters.get_mut(name)
    }
}

impl Denoiser for Unet {
    fn predict(&self, z: &Tensor, t: &Tensor, conditioning: &Conditioning) -> Tensor {
        self.forward(z, t, conditioning, None)
    }
}

impl Modules {
    fn new(
        config: &UnetConfig,
        parameters: &Parameters,
        adapters: &BTreeMap<String, Adapter>,
    ) -> Self {
        let source = Source::new(parameters, adapters);
        let root = source.root();
        let last = config.channels.len() - 1;
        let entered = |level: usize| config.channels[level.saturating_sub(1)];
        let down = |level| {
            Down::new(
                &root.at(format_args!("down_blocks.{level}")),
                config,
                level,
                entered(level),
            )
        };
        let mut skips = config.skip_channels();
        let mut up = Vec::new();
        for block in 0..=last {
            let input = config.channels[(last + 1 - block).min(last)];
            let scope = root.at(format_args!("up_blocks.{block}"));
            up.push(Up::new(&scope, config, block, input, &mut skips));
        }
        let modules = Self {
            conv_in: Conv2d::same(&root.at("conv_in")),
            time: TimeEmbedding::new(&root, config),
            down: (0..=last).map(down).collect(),
            middle: Middle::new(&root.at("mid_block"), config),
            up,
            norm_out: GroupNorm::new(
                &root.at("conv_norm_out"),
                config.norm_groups,
                config.norm_eps,
            ),
            conv_out: Conv2d::same(&root.at("conv_out")),
        };
        source.finish();
        modules
    }

    fn forward(&self, z: &Tensor, given: Given<'_>) -> Tensor {
        let mut x = self.conv_in.forward(z);
        let mut skips = vec![x.shallow_clone()];
        for down in &self.down {
            x = down.forward(x, given, &mut skips);
        }
        x = self.middle.forward(&x, given);
        for up in &self.up {
            x = up.forward(x, given, &mut skips);
        }
        self.conv_out.forward(&silu(self.norm_out.forward(&x)))
    }
}
