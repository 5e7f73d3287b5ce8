//! The student of a stage: a copy of the teacher's denoiser, whole or with adapters, as its checkpoint left it.

use std::collections::BTreeMap;

use distillery_common::checkpoint::{
    Checkpoint, Dtype as StoredDtype, Kind as StateKind, TensorSpec,
};
use distillery_common::recipe::{self, Dtype, StudentKind};
use distillery_common::seed::{Purpose, Stream};
use distillery_common::task::FailureClass;
use tch::{Device, Kind, Tensor};

use super::{Fault, OrFault as _};
use crate::models::{Unet, lora};
use crate::train::flat::Parameters;
use crate::workbench::{TeacherModel, kind_of};

/// A student, ready to be trained or sampled.
#[derive(Debug)]
pub struct Student {
    /// Its network.
    pub unet: Unet,
}

impl Student {
    /// A student that computes the same as `teacher`: weights in the compute format of `stage`, adapters in f32. Adapters
    /// stand beside the teacher's own weights where those are in that format and on that device.
    pub fn fresh(
        teacher: &TeacherModel,
        stage: &recipe::Stage,
        run_seed: u64,
        device: Device,
    ) -> Result<Self, Fault> {
        let kind = kind_of(stage.compute.dtype);
        let base = &teacher.parts.unet;
        let is_frozen = matches!(stage.student.kind, StudentKind::Lora { .. });
        let mut unet = match is_frozen && base.compute() == kind && base.device() == device {
            true => base.shared(),
            false => base.duplicate(kind, device),
        };
        unet.set_recompute(stage.compute.recompute);
        match &stage.student.kind {
            StudentKind::Full => unet.set_trainable(true),
            StudentKind::Lora {
                lora_rank,
                lora_alpha,
                targets,
            } => {
                let shape = lora::Shape {
                    lora_rank: i64::from(*lora_rank),
                    lora_alpha: *lora_alpha,
                    targets: targets.clone(),
                };
                lora::attach(&mut unet, &shape, |position, values| {
                    let mut stream = Stream::new(run_seed, Purpose::AdapterInit, position, 0);
                    values
                        .iter_mut()
                        .for_each(|v| *v = (2.0 * stream.unit() - 1.0) as f32);
                })
                .or_fault(FailureClass::Config)?;
            }
        }
        Ok(Self { unet })
    }

    /// Its trainable tensors in the order of their names.
    pub fn trainable(&self) -> Vec<(String, Tensor)> {
        let mut tensors = match lora::parameters(&self.unet) {
            adapters if adapters.is_empty() => self.unet.parameters(),
            adapters => adapters,
        };
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        tensors
    }

    /// The same, as a trainer takes them.
    pub fn parameters(&self) -> Parameters {
        Parameters::new(self.trainable())
    }

    /// Puts the published weights of a checkpoint in: the moving average where one was kept, else the student. Holds one
    /// file of it at a time.
    pub async fn load_published(&self, checkpoint: &Checkpoint) -> Result<(), Fault> {
        let mut stored = checkpoint.manifest().tensors.iter();
        let kind = match stored.any(|tensor| tensor.spec.kind == StateKind::Ema) {
            true => StateKind::Ema,
            false => StateKind::Student,
        };
        let mut missing: BTreeMap<String, Tensor> = self.trainable().into_iter().collect();
        let take = |spec: &TensorSpec, bytes: &[u8]| match missing.remove(&spec.name) {
            Some(tensor) => put(spec, bytes, tensor),
            None => Ok(()),
        };
        checkpoint.read(|spec| spec.kind == kind, take).await?;
        match missing.first_key_value() {
            None => Ok(()),
            Some((name, _)) => Err(misfit(format!("the checkpoint has no tensor {name}"))),
        }
    }
}

/// Puts a stored tensor into one of the student's.
fn put(spec: &TensorSpec, bytes: &[u8], mut tensor: Tensor) -> Result<(), Fault> {
    let values = f32_tensor(spec, bytes)?;
    if values.numel() != tensor.numel() {
        return Err(misfit(format!(
            "tensor {} of the checkpoint has {} values, the student needs {}",
            spec.name,
            values.numel(),
            tensor.numel()
        )));
    }
    tch::no_grad(|| tensor.copy_(&values.view(&tensor.size()[..])));
    Ok(())
}

/// A stored tensor `[len]`, f32, on the CPU.
pub fn f32_tensor(spec: &TensorSpec, bytes: &[u8]) -> Result<Tensor, Fault> {
    if spec.dtype != StoredDtype::F32 {
        return Err(misfit(format!(
            "tensor {} of the checkpoint is {}, expected F32",
            spec.name,
            spec.dtype.name()
        )));
    }
    let values = bytes.len() as i64 / 4;
    Ok(Tensor::from_data_size(bytes, &[values], Kind::Float))
}

fn misfit(message: String) -> Fault {
    Fault::new(FailureClass::Schema, message)
}

/// Refuses number formats that training has no gradients for.
pub fn check_dtype(dtype: Dtype) -> Result<Kind, Fault> {
    match dtype {
        Dtype::F32 | Dtype::Bf16 => Ok(kind_of(dtype)),
        Dtype::F16 => Err(Fault::config(
            "f16 gradients under- and overflow without loss scaling; train with compute.dtype bf16 or f32",
        )),
    }
}
