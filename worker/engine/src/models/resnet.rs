//! Residual blocks and changes of resolution, as UNet and autoencoder share them.

use tch::Tensor;

use super::layers::{Conv2d, GroupNorm, Linear, plus, silu};
use super::parameters::Scope;

/// `shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))`.
#[derive(Debug)]
pub(super) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl Resnet {
    /// From `input` to `output` channels; `timed` when it takes a time embedding.
    pub(super) fn new(
        scope: &Scope<'_>,
        [input, output]: [i64; 2],
        timed: bool,
        groups: i64,
        eps: f64,
    ) -> Self {
        Self {
            norm1: GroupNorm::new(&scope.at("norm1"), groups, eps),
            conv1: Conv2d::same(&scope.at("conv1")),
            time: timed.then(|| Linear::new(&scope.at("time_emb_proj"))),
            norm2: GroupNorm::new(&scope.at("norm2"), groups, eps),
            conv2: Conv2d::same(&scope.at("conv2")),
            shortcut: (input != output).then(|| Conv2d::pointwise(&scope.at("conv_shortcut"))),
        }
    }

    /// `x` `[B, C, H, W]`; `time` the embedding `[B, T]` after its silu, where the block takes one.
    pub(super) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Tensor {
        self.beside_shortcut(self.layers(x, time), x)
    }

    /// The block without its shortcut.
    pub(super) fn layers(&self, x: &Tensor, time: Option<&Tensor>) -> Tensor {
        let mut h = self.conv1.forward(&silu(self.norm1.forward(x)));
        if let (Some(projection), Some(time)) = (&self.time, time) {
            h += projection.forward(time).unsqueeze(-1).unsqueeze(-1);
        }
        self.conv2.forward(&silu(self.norm2.forward(&h)))
    }

    /// What the layers made of `x`, which nobody else reads, and the shortcut of `x`.
    pub(super) fn beside_shortcut(&self, h: Tensor, x: &Tensor) -> Tensor {
        match &self.shortcut {
            Some(shortcut) => plus(h, &shortcut.forward(x)),
            None => plus(h, x),
        }
    }
}

/// Nearest neighbours to `size`, or to twice the sides, then a convolution.
#[derive(Debug)]
pub(super) struct Upsample(Conv2d);

impl Upsample {
    pub(super) fn new(scope: &Scope<'_>) -> Self {
        Self(Conv2d::same(&scope.at("conv")))
    }

    pub(super) fn forward(&self, x: &Tensor, size: Option<[i64; 2]>) -> Tensor {
        let (_, _, height, width) = x.size4().expect("images are [B, C, H, W]");
        let size = size.unwrap_or([2 * height, 2 * width]);
        self.0.forward(&x.upsample_nearest2d(size, None, None))
    }
}
