//! One LoRA file that every tool reads (`lora_unet_*` keys; design: the strength is folded in, alpha is the rank).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use distillery_common::ids::Digest;
use distillery_common::recipe::{Method, Stage, StudentKind};
use distillery_common::task::FailureClass;
use distillery_common::teacher::Prediction;
use tch::{Kind, Tensor};

use super::verify::Probe;
use super::{Finished, pipeline};
use crate::models::weights::{read_safetensors, to_safetensors};
use crate::models::{Unet, lora};
use crate::task::{Fault, OrFault as _};

/// Name of the file.
pub(super) fn name(stage: &Stage) -> String {
    format!("{}-lora.safetensors", stage.name)
}

/// The file, its matrices in `kind`.
pub(super) fn bytes(student: &Finished<'_>, unet: &Unet, kind: Kind) -> Result<Vec<u8>, Fault> {
    let tensors = lora::universal_tensors(unet, kind);
    let bare = to_safetensors(&tensors, &BTreeMap::new()).or_fault(FailureClass::Unknown)?;
    let mut metadata = metadata(student);
    metadata.insert(
        "modelspec.hash_sha256".into(),
        format!("0x{}", digest_of_tensors(&bare)),
    );
    to_safetensors(&tensors, &metadata).or_fault(FailureClass::Unknown)
}

/// SHA-256 of what follows a safetensors header.
fn digest_of_tensors(file: &[u8]) -> Digest {
    let length = file
        .first_chunk::<8>()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes));
    Digest::of(&file[8 + length as usize..])
}

/// How to use the file, as tools read it, and how it was made.
fn metadata(student: &Finished<'_>) -> BTreeMap<String, String> {
    let Finished {
        stage,
        record,
        recipe,
        teacher,
        ..
    } = student;
    let is_xl = teacher.parts.text_2.is_some();
    let (architecture, base) = match is_xl {
        true => ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
        false => ("stable-diffusion-v1/lora", "sd_v1"),
    };
    let side = teacher.parts.image_side();
    let lora_rank = match &stage.student.kind {
        StudentKind::Lora { lora_rank, .. } => lora_rank.to_string(),
        StudentKind::Full => String::new(),
    };
    let prediction = match teacher.parts.schedule.prediction {
        Prediction::Epsilon => "epsilon",
        Prediction::Velocity => "v",
        Prediction::Sample => "sample",
    };
    let method = match stage.method {
        Method::Mlcm => "mlcm",
        Method::Lcm => "lcm",
        Method::Mcd => "mcd",
    };
    let original = student.original_steps();
    let steps = pipeline::natural_steps(stage);
    let hint = format!(
        "LCM sampler, {steps} steps, guidance 1; LCMScheduler with original_inference_steps {original}"
    );
    let entries = [
        ("format", "pt".to_owned()),
        ("modelspec.sai_model_spec", "1.0.1".to_owned()),
        ("modelspec.architecture", architecture.to_owned()),
        ("modelspec.implementation", "diffusers".to_owned()),
        ("modelspec.title", format!("{} {}", recipe.name, stage.name)),
        ("modelspec.resolution", format!("{side}x{side}")),
        ("modelspec.usage_hint", hint),
        ("modelspec.prediction_type", prediction.to_owned()),
        ("ss_network_module", "networks.lora".to_owned()),
        ("ss_network_dim", lora_rank.clone()),
        ("ss_network_alpha", lora_rank),
        ("ss_base_model_version", base.to_owned()),
        ("ss_v2", "False".to_owned()),
        ("distill.method", method.to_owned()),
        ("distill.steps", steps.to_string()),
        ("distill.grid", original.to_string()),
        ("distill.timesteps", pipeline::shown_times(steps, original)),
        ("distill.guidance", recipe.teacher.guidance.to_string()),
        ("distill.run_id", record.run_id.to_string()),
        ("distill.config_sha256", record.recipe_digest.to_string()),
        (
            "distill.teacher_sha256",
            student.teacher_digest().to_string(),
        ),
        ("distill.stage", stage.name.clone()),
    ];
    entries
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

/// What the teacher predicts with the file at `path` put on it, as a reader of such files would.
pub(super) fn read_back(
    student: &Finished<'_>,
    path: &Path,
    probe: &Probe,
) -> Result<Tensor, Fault> {
    let file = read_safetensors(path).or_fault(FailureClass::Schema)?;
    let unet = student
        .teacher
        .parts
        .unet
        .duplicate(Kind::Float, student.device);
    apply(&unet, &file)?;
    Ok(probe.predict(&unet))
}

/// Adds `(alpha / rank) up down` to every weight that the file names; all of the file must find its place.
fn apply(unet: &Unet, file: &BTreeMap<String, Tensor>) -> Result<(), Fault> {
    let mut unused: BTreeSet<&str> = file.keys().map(String::as_str).collect();
    for (name, mut weight) in unet.parameters() {
        let Some(path) = name.strip_suffix(".weight") else {
            continue;
        };
        let stem = lora::universal_key(path);
        let keys =
            [".lora_down.weight", ".lora_up.weight", ".alpha"].map(|end| format!("{stem}{end}"));
        let [Some(down), Some(up), Some(alpha)] = keys.each_ref().map(|key| file.get(key)) else {
            continue;
        };
        keys.iter().for_each(|key| {
            unused.remove(key.as_str());
        });
        let [down, up] = [down, up].map(|m| m.to_kind(Kind::Float).to_device(weight.device()));
        let strength = alpha.double_value(&[]) / down.size()[0] as f64;
        let product = up.flatten(1, -1).matmul(&down.flatten(1, -1)) * strength;
        let sum = &weight + product.view(&weight.size()[..]);
        tch::no_grad(|| weight.copy_(&sum));
    }
    match unused.first() {
        None => Ok(()),
        Some(name) => Err(Fault::new(
            FailureClass::Unknown,
            format!("the LoRA file names {name}, which has no place in the teacher"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_of_the_tensors_alone() {
        let tensors = [("a".to_owned(), Tensor::from_slice(&[1.0f32, 2.0]))];
        let bare = to_safetensors(&tensors, &BTreeMap::new()).expect("f32");
        let named = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let with = to_safetensors(&tensors, &named).expect("f32");
        assert_ne!(bare, with);
        assert_eq!(digest_of_tensors(&bare), digest_of_tensors(&with));
        let mut data = 1.0f32.to_le_bytes().to_vec();
        data.extend(2.0f32.to_le_bytes());
        assert_eq!(digest_of_tensors(&bare), Digest::of(&data));
    }
}
