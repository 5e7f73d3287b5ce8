//! The student of a stage: a copy of the teacher's denoiser, whole or with adapters, as its checkpoint left it.

use std::collections::BTreeMap;

use distillery_common::checkpoint::{Dtype as StoredDtype, Kind as StateKind, Loaded};
use distillery_common::recipe::{self, Dtype, StudentKind};
use distillery_common::seed::{Purpose, Stream};
use distillery_common::task::FailureClass;
use tch::{Device, Kind, Tensor};

use super::{Fault, OrFault as _, host};
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
    /// A student that computes the same as `teacher`: weights in the compute format of `stage`, adapters in f32.
    pub fn fresh(
        teacher: &TeacherModel,
        stage: &recipe::Stage,
        run_seed: u64,
        device: Device,
    ) -> Result<Self, Fault> {
        let kind = kind_of(stage.compute.dtype);
        let mut unet = teacher.parts.unet.duplicate(kind, device);
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

    /// Puts the published weights of a checkpoint in: the moving average where one was kept, else the student.
    pub fn load_published(&self, state: &Loaded) -> Result<(), Fault> {
        let values = f32_values(state)?;
        let averaged = values.keys().any(|(kind, _)| *kind == StateKind::Ema);
        let kind = if averaged {
            StateKind::Ema
        } else {
            StateKind::Student
        };
        self.load(|tensor| Some(values.get(&(kind, tensor.to_owned()))?.as_slice()))
    }

    /// Puts stored values into the trainable tensors: `read(name)` gives f32 values in row order.
    pub fn load<'a>(&self, mut read: impl FnMut(&str) -> Option<&'a [f32]>) -> Result<(), Fault> {
        let misfit = |message: String| Fault::new(FailureClass::Schema, message);
        for (name, mut tensor) in self.trainable() {
            let values = read(&name)
                .ok_or_else(|| misfit(format!("the checkpoint has no tensor {name}")))?;
            if values.len() != tensor.numel() {
                return Err(misfit(format!(
                    "tensor {name} of the checkpoint has {} values, the student needs {}",
                    values.len(),
                    tensor.numel()
                )));
            }
            tch::no_grad(|| tensor.copy_(&Tensor::from_slice(values).view(&tensor.size()[..])));
        }
        Ok(())
    }
}

/// Every tensor of a state as numbers.
pub fn f32_values(state: &Loaded) -> Result<BTreeMap<(StateKind, String), Vec<f32>>, Fault> {
    let mut values = BTreeMap::new();
    for (spec, bytes) in &state.tensors {
        if spec.dtype != StoredDtype::F32 {
            return Err(Fault::new(
                FailureClass::Schema,
                format!(
                    "tensor {} of the checkpoint is {}, expected F32",
                    spec.name,
                    spec.dtype.name()
                ),
            ));
        }
        values.insert((spec.kind, spec.name.clone()), host::f32_values(bytes));
    }
    Ok(values)
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
