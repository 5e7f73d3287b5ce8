//! Linear maps, convolutions and norms. Each computes in the number format of its input: parameters kept in
//! another (f32 masters under bf16 arithmetic) are converted on the way, and gradients come back through that.

use tch::{Kind, Tensor};

use super::parameters::{Adapter, Scope};

/// `tensor` in the number format of `x`; itself when it has that already.
fn like(tensor: &Tensor, x: &Tensor) -> Tensor {
    match tensor.kind() == x.kind() {
        true => tensor.shallow_clone(),
        false => tensor.to_kind(x.kind()),
    }
}

/// `a + b`, written over `a` where no gradient asks for it later. The caller owes an `a` that nobody else reads.
pub(super) fn plus(mut a: Tensor, b: &Tensor) -> Tensor {
    if a.requires_grad() || b.requires_grad() {
        return a + b;
    }
    a += b;
    a
}

/// `x sigmoid(x)`, written over `x` where no gradient asks for it later. The caller owes an `x` that nobody else reads.
pub(super) fn silu(mut x: Tensor) -> Tensor {
    match x.requires_grad() {
        true => x.silu(),
        false => x.silu_(),
    }
}

/// Whether an adapter may be added to its weight for this once: without gradients, and in f32 throughout, since a
/// narrower format would round small adapters away beside large weights.
fn may_fold(adapter: &Adapter, x: &Tensor) -> bool {
    // A view of a trained tensor asks for a gradient, unless gradients are off.
    let gradients = adapter.up.view_as(&adapter.up).requires_grad();
    !gradients && x.kind() == Kind::Float
}

/// `W + scale B A` in f32: one small product here spares passes over all activations.
fn folded(weight: &Tensor, adapter: &Adapter) -> Tensor {
    let up = adapter.up.flatten(1, -1) * adapter.scale;
    let delta = up.matmul(&adapter.down.flatten(1, -1));
    plus(delta.view_as(weight), &weight.to_kind(Kind::Float))
}

/// `out + scale delta`, written over `out`: what a product was is not asked for by its gradient. The caller owes two
/// fresh products that are no views.
fn add_scaled(mut out: Tensor, mut delta: Tensor, scale: f64) -> Tensor {
    if scale != 1.0 {
        delta *= scale;
    }
    out += delta;
    out
}

/// `x W^T + b`, and what an adapter adds.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
}

impl Linear {
    pub(super) fn new(scope: &Scope<'_>) -> Self {
        Self {
            weight: scope.tensor("weight"),
            bias: scope.optional("bias"),
            adapter: scope.adapter(),
        }
    }

    /// `[.., in]` to `[.., out]`.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let bias = self.bias.as_ref().map(|bias| like(bias, x));
        let apply = |x: &Tensor| x.linear(&like(&self.weight, x), bias.as_ref());
        match self.adapter.as_ref().filter(|adapter| adapter.is_on()) {
            None => apply(x),
            Some(adapter) if may_fold(adapter, x) => {
                x.linear(&folded(&self.weight, adapter), bias.as_ref())
            }
            Some(adapter) => {
                // As a matrix: with more sides, `W x` would be a view, on which gradients make writing dear.
                let rows = x.flatten(0, -2);
                let inner = rows.linear(&like(&adapter.down, x), None::<&Tensor>) * adapter.scale;
                let out = apply(&rows).addmm_(&inner, &like(&adapter.up, x).tr());
                let mut shape = x.size();
                shape.pop();
                shape.push(-1);
                out.view(&shape[..])
            }
        }
    }
}

/// A square convolution, and what an adapter adds.
#[derive(Debug)]
pub(super) struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
    adapter: Option<Adapter>,
}

impl Conv2d {
    pub(super) fn new(scope: &Scope<'_>, stride: i64, padding: i64) -> Self {
        Self {
            weight: scope.tensor("weight"),
            bias: scope.tensor("bias"),
            stride,
            padding,
            adapter: scope.adapter(),
        }
    }

    /// 3x3 that keeps the sides.
    pub(super) fn same(scope: &Scope<'_>) -> Self {
        Self::new(scope, 1, 1)
    }

    /// 1x1.
    pub(super) fn pointwise(scope: &Scope<'_>) -> Self {
        Self::new(scope, 1, 0)
    }

    /// `[B, in, H, W]` to `[B, out, H', W']`.
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let bias = like(&self.bias, x);
        let apply = |x: &Tensor| self.convolve(x, &self.weight, Some(&bias));
        match self.adapter.as_ref().filter(|adapter| adapter.is_on()) {
            None => apply(x),
            Some(adapter) if may_fold(adapter, x) => {
                self.convolve(x, &folded(&self.weight, adapter), Some(&bias))
            }
            Some(adapter) => {
                let out = apply(x);
                let inner = self.convolve(x, &adapter.down, None);
                let up = like(&adapter.up, x);
                let delta = inner.conv2d(&up, None::<&Tensor>, [1, 1], [0, 0], [1, 1], 1);
                add_scaled(out, delta, adapter.scale)
            }
        }
    }

    fn convolve(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        x.conv2d(&like(weight, x), bias, stride, padding, [1, 1], 1)
    }
}

/// Normalises groups of channels.
#[derive(Debug)]
pub(super) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    eps: f64,
}

impl GroupNorm {
    pub(super) fn new(scope: &Scope<'_>, groups: i64, eps: f64) -> Self {
        Self {
            weight: scope.tensor("weight"),
            bias: scope.tensor("bias"),
            groups,
            eps,
        }
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let (weight, bias) = (like(&self.weight, x), like(&self.bias, x));
        x.group_norm(self.groups, Some(&weight), Some(&bias), self.eps, true)
    }
}

/// Normalises the last side.
#[derive(Debug)]
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(super) fn new(scope: &Scope<'_>, eps: f64) -> Self {
        Self {
            weight: scope.tensor("weight"),
            bias: scope.tensor("bias"),
            eps,
        }
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let (weight, bias) = (like(&self.weight, x), like(&self.bias, x));
        x.layer_norm(
            self.weight.size(),
            Some(&weight),
            Some(&bias),
            self.eps,
            true,
        )
    }
}

/// Attention of `heads` heads over `[B, N, C]` queries and `[B, M, C]` keys and values.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, heads: i64, causal: bool) -> Tensor {
    let (batch, length, width) = q.size3().expect("queries are [B, N, C]");
    let split = |x: &Tensor| x.view([batch, -1, heads, width / heads]).transpose(1, 2);
    Tensor::scaled_dot_product_attention(
        &split(q),
        &split(k),
        &split(v),
        None::<&Tensor>,
        0.0,
        causal,
        None,
        false,
    )
    .transpose(1, 2)
    .reshape([batch, length, width])
}

/// Whether networks may compute in `kind`.
pub(super) fn is_compute_kind(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16)
}
