//! Low-rank adapters beside the frozen weights of a denoiser (Hu et al., arXiv 2106.09685): a module with weight W
//! gives `W x + (lora_alpha / lora_rank) B A x`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use distillery_common::teacher::{adapter_modules, unet_tensors};
use tch::{Kind, Tensor, no_grad};

use super::parameters::Adapter;
use super::unet::Unet;

/// Why adapters cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No module has such a name.
    #[error("adapter target {0:?} names no module of the denoiser")]
    UnknownTarget(String),
    /// There are adapters already.
    #[error("the denoiser has adapters already")]
    Attached,
}

/// What adapters are made with.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Inner width r.
    pub lora_rank: i64,
    /// The delta is multiplied by `lora_alpha / lora_rank`.
    pub lora_alpha: f64,
    /// Last components of the paths of the modules that get one.
    pub targets: Vec<String>,
}

/// Freezes `unet` and puts an adapter beside each target, in f32. `init(position, values)` fills the matrices A with
/// numbers uniform in -1..1, position counting the modules by name; they are scaled to `1 / sqrt(inputs)`
/// (Kaiming's uniform with a = sqrt 5). B is zero, so the denoiser computes the same as before.
///
/// # Errors
/// When a target names nothing, or there are adapters already.
pub fn attach(
    unet: &mut Unet,
    shape: &Shape,
    mut init: impl FnMut(u64, &mut [f32]),
) -> Result<(), Error> {
    if !unet.adapters.is_empty() {
        return Err(Error::Attached);
    }
    let expected = unet_tensors(unet.config());
    for target in &shape.targets {
        if adapter_modules(&expected, std::slice::from_ref(target)).is_empty() {
            return Err(Error::UnknownTarget(target.clone()));
        }
    }
    let switch = Arc::new(AtomicBool::new(true));
    let scale = shape.lora_alpha / shape.lora_rank as f64;
    let device = unet.device();
    for (position, (path, weight)) in adapter_modules(&expected, &shape.targets)
        .into_iter()
        .enumerate()
    {
        let mut down_shape = weight.clone();
        down_shape[0] = shape.lora_rank;
        let mut up_shape = vec![1; weight.len()];
        up_shape[..2].copy_from_slice(&[weight[0], shape.lora_rank]);
        let inputs: i64 = weight[1..].iter().product();
        let mut values = vec![0.0; (shape.lora_rank * inputs) as usize];
        init(position as u64, &mut values);
        let bound = 1.0 / (inputs as f64).sqrt();
        let down = Tensor::from_slice(&values).view(&down_shape[..]) * bound;
        let adapter = Adapter {
            down: down.to_device(device).set_requires_grad(true),
            up: Tensor::zeros(&up_shape[..], (Kind::Float, device)).set_requires_grad(true),
            scale,
            switch: Arc::clone(&switch),
        };
        unet.adapters.insert(path, adapter);
    }
    unet.set_trainable(false);
    unet.rebuild();
    Ok(())
}

/// Switches all adapters of `unet` on or off; off, it computes as its base does.
pub fn switch(unet: &Unet, on: bool) {
    if let Some(adapter) = unet.adapters.values().next() {
        adapter.switch.store(on, Ordering::Relaxed);
    }
}

/// What every adapter of `unet` is multiplied by, `lora_alpha / lora_rank`; none without adapters.
pub fn scale(unet: &Unet) -> Option<f64> {
    unet.adapters.values().next().map(|adapter| adapter.scale)
}

/// The trainable tensors, `<module path>.lora_A.weight` and `<module path>.lora_B.weight`, by name. What is done to
/// them in place is done to the network.
pub fn parameters(unet: &Unet) -> Vec<(String, Tensor)> {
    let pair = |(path, adapter): (&String, &Adapter)| {
        [
            (
                format!("{path}.lora_A.weight"),
                adapter.down.shallow_clone(),
            ),
            (format!("{path}.lora_B.weight"), adapter.up.shallow_clone()),
        ]
    };
    unet.adapters.iter().flat_map(pair).collect()
}

/// Adds the adapters to the weights beside them and takes them away: the network computes the same without them. A network
/// that shares those weights keeps them as they were.
pub fn merge(unet: &mut Unet) {
    let adapters = std::mem::take(&mut unet.adapters);
    no_grad(|| {
        for (path, adapter) in &adapters {
            let weight = unet
                .parameter_mut(&format!("{path}.weight"))
                .expect("adapters stand beside weights of the network");
            let sum = weight.to_kind(Kind::Float) + delta(adapter);
            *weight = sum.to_kind(weight.kind());
        }
    });
    unet.rebuild();
}

/// What the adapter adds to its weight, in f32: `scale * B A`.
fn delta(adapter: &Adapter) -> Tensor {
    let product = adapter
        .up
        .flatten(1, -1)
        .matmul(&adapter.down.flatten(1, -1));
    let mut shape = adapter.down.size();
    shape[0] = product.size()[0];
    product.view(&shape[..]) * adapter.scale
}

/// The stem of a module's keys in the form that every tool reads: `lora_unet_` and the path with underscores.
pub fn universal_key(module_path: &str) -> String {
    format!("lora_unet_{}", module_path.replace('.', "_"))
}

/// The adapters in the form that every tool reads: for each module `<stem>.lora_down.weight`,
/// `<stem>.lora_up.weight` in `kind` and a scalar f32 `<stem>.alpha`. The scale is folded into the up matrix and
/// alpha written as the rank, so that a reader who ignores alpha computes the same.
pub fn universal_tensors(unet: &Unet, kind: Kind) -> Vec<(String, Tensor)> {
    let triple = |(path, adapter): (&String, &Adapter)| {
        let stem = universal_key(path);
        let lora_rank = adapter.down.size()[0] as f32;
        [
            (
                format!("{stem}.lora_down.weight"),
                adapter.down.detach().to_kind(kind),
            ),
            (
                format!("{stem}.lora_up.weight"),
                (adapter.up.detach() * adapter.scale).to_kind(kind),
            ),
            (format!("{stem}.alpha"), Tensor::from(lora_rank)),
        ]
    };
    unet.adapters.iter().flat_map(triple).collect()
}

/// Puts the values of `tensors`, named as by [`parameters`], into the adapters of `unet`.
///
/// # Panics
/// When a name or shape does not fit: whoever reads a file checks it first, with [`parameters`] as the measure.
pub fn set_parameters(unet: &Unet, tensors: &BTreeMap<String, Tensor>) {
    no_grad(|| {
        for (name, mut parameter) in parameters(unet) {
            let value = &tensors[&name];
            assert_eq!(parameter.size(), value.size(), "{name} keeps its shape");
            parameter.copy_(value);
        }
    });
}
