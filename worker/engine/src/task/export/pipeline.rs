//! A pipeline folder in the layout of diffusers, ready to be sampled: the student's denoiser, an LCMScheduler that
//! knows the student's times, and everything else as the teacher has it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use distillery_common::recipe::Stage;
use distillery_common::task::FailureClass;
use distillery_common::teacher::{
    BetaSchedule, Folder, Prediction, ScheduleConfig, Spacing, TextComponent, Weights,
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::verify::Probe;
use super::{Finished, PIPELINE, Put, card};
use crate::diffusion::sampler::lcm_times;
use crate::models::Unet;
use crate::models::weights::to_safetensors;
use crate::task::{Fault, OrFault as _};
use crate::workbench::TeacherModel;

/// Files of a tokenizer that readers know.
const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
];
/// The version of diffusers that the layout was checked against, for folders that do not name theirs.
const DIFFUSERS: &str = "0.35.0";
/// A guidance embedding has no place in most readers and is told nothing here: it is left out.
const GUIDANCE_KEY: &str = "time_cond_proj_dim";
const GUIDANCE_TENSOR: &str = "time_embedding.cond_proj.weight";

/// Gives every file to `put`; the denoiser's tensors, merged, in `kind`.
pub(super) fn write(
    student: &Finished<'_>,
    teacher: &Folder,
    unet: &Unet,
    kind: Kind,
    put: &mut Put<'_>,
) -> Result<(), Fault> {
    let mut put = |path: &str, bytes: Vec<u8>| put(&format!("{PIPELINE}/{path}"), bytes);
    let index = read_json(&teacher.path.join("model_index.json"))?;
    put(
        "model_index.json",
        pretty(&model_index(&index, teacher.text_2.is_some())),
    )?;
    let scheduler = scheduler_config(
        &teacher.schedule,
        student.original_steps(),
        &version(&index),
    );
    put("scheduler/scheduler_config.json", pretty(&scheduler))?;
    put(
        "README.md",
        card::text(student, teacher.text_2.is_some()).into_bytes(),
    )?;
    put(
        "unet/config.json",
        unet_config(&teacher.path.join("unet/config.json"))?,
    )?;
    let tensors: Vec<(String, Tensor)> = unet
        .parameters()
        .into_iter()
        .filter(|(name, _)| name != GUIDANCE_TENSOR)
        .map(|(name, tensor)| (name, tensor.detach().to_kind(kind)))
        .collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let weights = to_safetensors(&tensors, &metadata).or_fault(FailureClass::Unknown)?;
    put("unet/diffusion_pytorch_model.safetensors", weights)?;
    component(
        "vae",
        &teacher.path,
        &teacher.vae.weights,
        student,
        &mut put,
    )?;
    text("", &teacher.path, &teacher.text, student, &mut put)?;
    if let Some(text_2) = &teacher.text_2 {
        text("_2", &teacher.path, text_2, student, &mut put)?;
    }
    Ok(())
}

/// A text encoder and its tokenizer.
fn text(
    suffix: &str,
    root: &Path,
    from: &TextComponent,
    student: &Finished<'_>,
    put: &mut Put<'_>,
) -> Result<(), Fault> {
    component(
        &format!("text_encoder{suffix}"),
        root,
        &from.encoder.weights,
        student,
        put,
    )?;
    for name in TOKENIZER_FILES {
        let path = from.tokenizer.join(name);
        if path.is_file() {
            put(&format!("tokenizer{suffix}/{name}"), read(&path)?)?;
        }
    }
    Ok(())
}

/// Configuration and weights of one network, byte for byte. A variant's name is dropped from the names of files,
/// so that readers find them unasked; shards keep theirs, which the index names.
fn component(
    name: &str,
    root: &Path,
    weights: &Weights,
    student: &Finished<'_>,
    put: &mut Put<'_>,
) -> Result<(), Fault> {
    put(
        &format!("{name}/config.json"),
        read(&root.join(name).join("config.json"))?,
    )?;
    for path in &weights.files {
        let stored = file_name(path);
        put(
            &format!(
                "{name}/{}",
                plain_name(&stored, student.recipe.teacher.variant.as_deref())
            ),
            read(path)?,
        )?;
    }
    Ok(())
}

/// `model.fp16.safetensors` becomes `model.safetensors`.
fn plain_name(name: &str, variant: Option<&str>) -> String {
    match variant {
        Some(variant) => name.replacen(&format!(".{variant}."), ".", 1),
        None => name.to_owned(),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// The teacher's index with our scheduler, and without the parts that are not copied.
fn model_index(teacher: &Value, is_xl: bool) -> BTreeMap<String, Value> {
    let pair = |library: &str, class: &str| json!([library, class]);
    let none = json!([null, null]);
    let mut index = BTreeMap::from([
        (
            "_diffusers_version".to_owned(),
            Value::String(version(teacher)),
        ),
        ("unet".to_owned(), pair("diffusers", "UNet2DConditionModel")),
        ("vae".to_owned(), pair("diffusers", "AutoencoderKL")),
        ("scheduler".to_owned(), pair("diffusers", "LCMScheduler")),
        ("feature_extractor".to_owned(), none.clone()),
        ("image_encoder".to_owned(), none.clone()),
    ]);
    let mut as_teacher = vec!["text_encoder", "tokenizer"];
    if is_xl {
        as_teacher.extend([
            "text_encoder_2",
            "tokenizer_2",
            "force_zeros_for_empty_prompt",
            "add_watermarker",
        ]);
        index.insert("_class_name".into(), json!("StableDiffusionXLPipeline"));
    } else {
        index.insert("_class_name".into(), json!("StableDiffusionPipeline"));
        index.insert("safety_checker".into(), none);
        index.insert("requires_safety_checker".into(), json!(false));
    }
    for key in as_teacher {
        if let Some(value) = teacher.get(key) {
            index.insert(key.to_owned(), value.clone());
        }
    }
    index
}

/// The version that the teacher's folder names.
fn version(index: &Value) -> String {
    index
        .get("_diffusers_version")
        .and_then(Value::as_str)
        .unwrap_or(DIFFUSERS)
        .to_owned()
}

/// An LCMScheduler on the teacher's noise schedule, with the student's grid of times.
fn scheduler_config(
    teacher: &ScheduleConfig,
    original_steps: u32,
    version: &str,
) -> BTreeMap<String, Value> {
    let beta_schedule = match teacher.beta_schedule {
        BetaSchedule::Linear => "linear",
        BetaSchedule::ScaledLinear => "scaled_linear",
        BetaSchedule::SquaredCosine => "squaredcos_cap_v2",
    };
    let spacing = match teacher.spacing {
        Spacing::Leading => "leading",
        Spacing::Trailing => "trailing",
        Spacing::Linspace => "linspace",
    };
    let keys = json!({
        "_class_name": "LCMScheduler",
        "_diffusers_version": version,
        "beta_end": teacher.beta_end,
        "beta_schedule": beta_schedule,
        "beta_start": teacher.beta_start,
        "clip_sample": false,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": teacher.train_timesteps,
        "original_inference_steps": original_steps,
        "prediction_type": prediction_type(teacher.prediction),
        "rescale_betas_zero_snr": teacher.zero_snr,
        "sample_max_value": 1.0,
        "set_alpha_to_one": teacher.set_alpha_to_one,
        "steps_offset": teacher.steps_offset,
        "thresholding": false,
        "timestep_scaling": 10.0,
        "timestep_spacing": spacing,
        "trained_betas": teacher.trained_betas,
    });
    let Value::Object(keys) = keys else {
        unreachable!("the literal above is an object")
    };
    keys.into_iter().collect()
}

fn prediction_type(prediction: Prediction) -> &'static str {
    match prediction {
        Prediction::Epsilon => "epsilon",
        Prediction::Velocity => "v_prediction",
        Prediction::Sample => "sample",
    }
}

/// The teacher's configuration of the denoiser, byte for byte unless it has a guidance embedding.
fn unet_config(path: &Path) -> Result<Vec<u8>, Fault> {
    let bytes = read(path)?;
    let config = read_json(path)?;
    let Value::Object(mut keys) = config else {
        return Ok(bytes);
    };
    if keys.get(GUIDANCE_KEY).is_none_or(Value::is_null) {
        return Ok(bytes);
    }
    keys.insert(GUIDANCE_KEY.to_owned(), Value::Null);
    Ok(pretty(&keys.into_iter().collect()))
}

/// JSON as diffusers writes it: keys in order, two spaces, a newline at the end.
fn pretty(keys: &BTreeMap<String, Value>) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(keys).expect("text and numbers become JSON");
    bytes.push(b'\n');
    bytes
}

fn read(path: &Path) -> Result<Vec<u8>, Fault> {
    std::fs::read(path).map_err(|error| {
        Fault::new(
            FailureClass::Io,
            format!("cannot read {}: {error}", path.display()),
        )
    })
}

fn read_json(path: &Path) -> Result<Value, Fault> {
    serde_json::from_slice(&read(path)?).map_err(|error| {
        Fault::new(
            FailureClass::Schema,
            format!("{} is no JSON: {error}", path.display()),
        )
    })
}

/// The number of steps that a student of `stage` is best at: one for each segment, at least two.
pub(super) fn natural_steps(stage: &Stage) -> u32 {
    stage.segments.clamp(2, 8)
}

/// The times of an LCMScheduler, for people.
pub(super) fn shown_times(steps: u32, original_steps: u32) -> String {
    let times = lcm_times(steps, original_steps).unwrap_or_default();
    times
        .iter()
        .map(i64::to_string)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Opens the pipeline in `folder` as anybody would, and asks it the question of `probe` in its own words.
pub(super) fn read_back(
    student: &Finished<'_>,
    folder: &Path,
    probe: &Probe,
) -> Result<Tensor, Fault> {
    let opened = Folder::open(folder, None).or_fault(FailureClass::Unknown)?;
    let teacher = &student.teacher.parts.schedule;
    let original = i64::from(student.original_steps());
    let expected = ScheduleConfig {
        class: "LCMScheduler".to_owned(),
        original_inference_steps: original,
        timestep_scaling: 10.0,
        ..teacher.clone()
    };
    if opened.schedule != expected {
        return Err(Fault::new(
            FailureClass::Unknown,
            format!(
                "the exported scheduler is {:?}, expected {expected:?}",
                opened.schedule
            ),
        ));
    }
    same_bytes(&opened, student)?;
    let model = TeacherModel::load(&opened, Kind::Float, student.device)?;
    Ok(probe.reworded(&model.parts).predict(&model.parts.unet))
}

/// The autoencoder is not asked; its files must be the teacher's.
fn same_bytes(opened: &Folder, student: &Finished<'_>) -> Result<(), Fault> {
    let own = student.teacher_folder()?;
    let pairs = |folder: &Folder| -> Vec<PathBuf> { folder.vae.weights.files.clone() };
    for (copy, original) in pairs(opened).iter().zip(pairs(&own)) {
        if read(copy)? != read(&original)? {
            return Err(Fault::new(
                FailureClass::Unknown,
                format!(
                    "{} is not what {} holds",
                    copy.display(),
                    original.display()
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule() -> ScheduleConfig {
        ScheduleConfig {
            class: "DDIMScheduler".into(),
            train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            trained_betas: None,
            zero_snr: false,
            prediction: Prediction::Velocity,
            spacing: Spacing::Leading,
            steps_offset: 1,
            set_alpha_to_one: false,
            original_inference_steps: 50,
            timestep_scaling: 10.0,
        }
    }

    #[test]
    fn the_scheduler_carries_the_grid_and_the_teachers_noise() {
        let config = pretty(&scheduler_config(&schedule(), 40, "0.30.0"));
        let text = String::from_utf8(config).expect("JSON is text");
        let expected = "{\n  \"_class_name\": \"LCMScheduler\",\n  \"_diffusers_version\": \"0.30.0\",\n  \
            \"beta_end\": 0.012,\n  \"beta_schedule\": \"scaled_linear\",\n  \"beta_start\": 0.00085,\n  \
            \"clip_sample\": false,\n  \"clip_sample_range\": 1.0,\n  \"dynamic_thresholding_ratio\": 0.995,\n  \
            \"num_train_timesteps\": 1000,\n  \"original_inference_steps\": 40,\n  \
            \"prediction_type\": \"v_prediction\",\n  \"rescale_betas_zero_snr\": false,\n  \
            \"sample_max_value\": 1.0,\n  \"set_alpha_to_one\": false,\n  \"steps_offset\": 1,\n  \
            \"thresholding\": false,\n  \"timestep_scaling\": 10.0,\n  \"timestep_spacing\": \"leading\",\n  \
            \"trained_betas\": null\n}\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn the_index_names_what_is_copied_and_nothing_else() {
        let teacher = json!({
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.6.0",
            "_name_or_path": "somewhere",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        });
        let index = model_index(&teacher, false);
        assert_eq!(index["scheduler"], json!(["diffusers", "LCMScheduler"]));
        assert_eq!(index["safety_checker"], json!([null, null]));
        assert_eq!(index["text_encoder"], teacher["text_encoder"]);
        assert_eq!(index["_diffusers_version"], "0.6.0");
        assert!(!index.contains_key("_name_or_path"));
        let xl = model_index(&json!({"force_zeros_for_empty_prompt": true}), true);
        assert_eq!(xl["force_zeros_for_empty_prompt"], true);
        assert!(!xl.contains_key("safety_checker"));
    }

    #[test]
    fn variants_lose_their_name() {
        let plain = |name: &str| plain_name(name, Some("fp16"));
        assert_eq!(plain("model.fp16.safetensors"), "model.safetensors");
        assert_eq!(
            plain("model.safetensors.index.fp16.json"),
            "model.safetensors.index.json"
        );
        assert_eq!(
            plain("model.fp16-00001-of-00002.safetensors"),
            "model.fp16-00001-of-00002.safetensors"
        );
        assert_eq!(
            plain_name("model.fp16.safetensors", None),
            "model.fp16.safetensors"
        );
    }

    #[test]
    fn a_guidance_embedding_is_left_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config.json");
        let plain = "{\"norm_eps\": 1e-05,\n \"time_cond_proj_dim\": null}";
        std::fs::write(&path, plain).expect("writable");
        assert_eq!(unet_config(&path).expect("read"), plain.as_bytes());
        std::fs::write(&path, plain.replace("null", "256")).expect("writable");
        let text = String::from_utf8(unet_config(&path).expect("read")).expect("text");
        assert!(text.contains("\"time_cond_proj_dim\": null"), "{text}");
    }
}
