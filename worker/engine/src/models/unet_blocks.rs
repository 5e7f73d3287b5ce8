//! The way down, the middle and the way up of the UNet.

use tch::Tensor;

use distillery_common::teacher::{Level, UnetConfig};

use super::attention::Transformer;
use super::layers::Conv2d;
use super::parameters::Scope;
use super::recompute::Part;
use super::resnet::{Resnet, Upsample};

/// What all blocks take: the time embedding after its silu, `[B, T]`, and the text states `[B, S, D]`; and whether
/// activations are computed again in the backward pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Given<'a> {
    pub(super) time: &'a Tensor,
    pub(super) context: &'a Tensor,
    pub(super) recompute: bool,
}

/// `resnet` of `x` `[B, C, H, W]`. The shortcut keeps little but x and is never recomputed: on the way down x is a skip
/// too, and its gradients then come one by one and in the same order as without recomputation, so their sum has the
/// same bits.
fn through(resnet: &Part<Resnet>, x: &Tensor, given: Given<'_>) -> Tensor {
    match given.recompute {
        true => {
            let h = resnet.recomputed(&[x, given.time], |resnet, given| {
                resnet.layers(&given[0], Some(&given[1]))
            });
            resnet.beside_shortcut(h, x)
        }
        false => resnet.forward(x, Some(given.time)),
    }
}

/// A resnet and the transformer after it, if the level has them.
#[derive(Debug)]
struct Layer {
    resnet: Part<Resnet>,
    transformer: Option<Transformer>,
}

impl Layer {
    fn new(
        scope: &Scope<'_>,
        config: &UnetConfig,
        index: i64,
        channels: [i64; 2],
        level: (usize, Level),
    ) -> Self {
        let (level, kind) = level;
        let resnet = scope.at(format_args!("resnets.{index}"));
        let transformer = scope.at(format_args!("attentions.{index}"));
        Self {
            resnet: Part::new(Resnet::new(
                &resnet,
                channels,
                true,
                config.norm_groups,
                config.norm_eps,
            )),
            transformer: match kind {
                Level::Plain => None,
                Level::CrossAttention => Some(Transformer::new(&transformer, config, level)),
            },
        }
    }

    fn forward(&self, x: &Tensor, given: Given<'_>) -> Tensor {
        let h = through(&self.resnet, x, given);
        match &self.transformer {
            Some(transformer) => transformer.forward(&h, given.context, given.recompute),
            None => h,
        }
    }
}

/// One level on the way down.
#[derive(Debug)]
pub(super) struct Down {
    layers: Vec<Layer>,
    downsample: Option<Conv2d>,
}

impl Down {
    /// Level `level`, entered with `input` channels.
    pub(super) fn new(scope: &Scope<'_>, config: &UnetConfig, level: usize, input: i64) -> Self {
        let output = config.channels[level];
        let layer = |index| {
            let input = if index == 0 { input } else { output };
            Layer::new(
                scope,
                config,
                index,
                [input, output],
                (level, config.down[level]),
            )
        };
        let is_last = level + 1 == config.channels.len();
        Self {
            layers: (0..config.layers[level]).map(layer).collect(),
            downsample: (!is_last).then(|| Conv2d::new(&scope.at("downsamplers.0.conv"), 2, 1)),
        }
    }

    /// Leaves a skip after each layer and after the downsampling.
    pub(super) fn forward(
        &self,
        mut x: Tensor,
        given: Given<'_>,
        skips: &mut Vec<Tensor>,
    ) -> Tensor {
        for layer in &self.layers {
            x = layer.forward(&x, given);
            skips.push(x.shallow_clone());
        }
        if let Some(downsample) = &self.downsample {
            x = downsample.forward(&x);
            skips.push(x.shallow_clone());
        }
        x
    }
}

/// Two resnets with a transformer between, at the coarsest level.
#[derive(Debug)]
pub(super) struct Middle {
    first: Part<Resnet>,
    transformer: Transformer,
    second: Part<Resnet>,
}

impl Middle {
    pub(super) fn new(scope: &Scope<'_>, config: &UnetConfig) -> Self {
        let level = config.channels.len() - 1;
        let channels = [config.channels[level]; 2];
        let resnet = |path| {
            Part::new(Resnet::new(
                &scope.at(path),
                channels,
                true,
                config.norm_groups,
                config.norm_eps,
            ))
        };
        Self {
            first: resnet("resnets.0"),
            transformer: Transformer::new(&scope.at("attentions.0"), config, level),
            second: resnet("resnets.1"),
        }
    }

    pub(super) fn forward(&self, x: &Tensor, given: Given<'_>) -> Tensor {
        let h = through(&self.first, x, given);
        let h = self.transformer.forward(&h, given.context, given.recompute);
        through(&self.second, &h, given)
    }
}

/// One level on the way up.
#[derive(Debug)]
pub(super) struct Up {
    layers: Vec<Layer>,
    upsample: Option<Upsample>,
}

impl Up {
    /// `up_blocks.{block}`, entered with `input` channels; takes its skips from the end of `skip_channels`.
    pub(super) fn new(
        scope: &Scope<'_>,
        config: &UnetConfig,
        block: usize,
        mut input: i64,
        skip_channels: &mut Vec<i64>,
    ) -> Self {
        let level = config.channels.len() - 1 - block;
        let output = config.channels[level];
        let mut layers = Vec::new();
        for index in 0..=config.layers[level] {
            let skip = skip_channels
                .pop()
                .expect("the way down left one skip for each resnet of the way up");
            let kind = (level, config.up[block]);
            layers.push(Layer::new(
                scope,
                config,
                index,
                [input + skip, output],
                kind,
            ));
            input = output;
        }
        Self {
            layers,
            upsample: (level > 0).then(|| Upsample::new(&scope.at("upsamplers.0"))),
        }
    }

    /// Takes a skip before each layer; upsamples to the sides of the skip that comes next.
    pub(super) fn forward(
        &self,
        mut x: Tensor,
        given: Given<'_>,
        skips: &mut Vec<Tensor>,
    ) -> Tensor {
        for layer in &self.layers {
            let skip = skips
                .pop()
                .expect("the way down left one skip for each resnet of the way up");
            x = layer.forward(&Tensor::cat(&[x, skip], 1), given);
        }
        if let Some(upsample) = &self.upsample {
            let size = skips.last().map(|skip| {
                let (_, _, height, width) = skip.size4().expect("skips are [B, C, H, W]");
                [height, width]
            });
            x = upsample.forward(&x, size);
        }
        x
    }
}
