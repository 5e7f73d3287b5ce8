//! A teacher's folder in the diffusers layout: configurations, weight files and tokenizers, read and checked
//! without libtorch, so that faults are found before any device is touched.
//!
//! Symbolic links are followed within the folder and to the blobs of a download cache, and nowhere else; what a file
//! names (a shard in an index) must be a plain name in the same folder. Unknown values that would change the arithmetic are refused by key,
//! tensors that do not fit by name. This module must never know how a network computes.

mod digest;
mod error;
mod expected;
mod header;
mod keys;
mod links;
mod schedule;
pub mod scorer;
mod text;
mod unet;
mod vae;
mod vocabulary;
mod weights;

use std::path::{Path, PathBuf};

pub use digest::{digest_of_file, digest_of_list};
pub use error::Error;
pub use expected::{
    Shapes, adapter_modules, adapter_parameter_count, adapter_targets, parameter_count,
    text_tensors, unet_tensors, vae_tensors,
};
pub use header::{Entry, StoredDtype, read_header};
pub use schedule::{BetaSchedule, Prediction, ScheduleConfig, Spacing};
pub use text::{Activation, TextConfig};
pub use unet::{Level, TextTime, UnetConfig};
pub use vae::{MeanStd, VaeConfig};
pub use vocabulary::{Vocabulary, WORD_END};
pub use weights::Weights;

use keys::Keys;

/// A network of the folder: its configuration and its weights, which fit each other.
#[derive(Debug, Clone)]
pub struct Component<C> {
    /// What it looks like.
    pub config: C,
    /// Its tensors.
    pub weights: Weights,
}

/// A text encoder with its tokenizer.
#[derive(Debug, Clone)]
pub struct TextComponent {
    /// The network.
    pub encoder: Component<TextConfig>,
    /// Folder of its tokenizer.
    pub tokenizer: PathBuf,
}

/// A teacher's folder, checked.
#[derive(Debug, Clone)]
pub struct Folder {
    /// Where it is.
    pub path: PathBuf,
    /// The denoiser.
    pub unet: Component<UnetConfig>,
    /// The autoencoder.
    pub vae: Component<VaeConfig>,
    /// The text encoder; the first of two for SDXL.
    pub text: TextComponent,
    /// SDXL's second text encoder, which also gives the pooled text.
    pub text_2: Option<TextComponent>,
    /// The noise schedule.
    pub schedule: ScheduleConfig,
    /// Whether the unconditional embedding is zero rather than the embedding of an empty text (SDXL).
    pub zeros_for_empty_prompt: bool,
    /// What the user should know but need not change.
    pub warnings: Vec<String>,
}

impl Folder {
    /// Opens the folder at `path` and checks all of it. With `variant` (`fp16`), files that carry it in their name
    /// are taken where they exist.
    ///
    /// # Errors
    /// The first fault found, with file and key or tensor.
    pub fn open(path: &Path, variant: Option<&str>) -> Result<Self, Error> {
        let index = Keys::read(&path.join("model_index.json"))?;
        links::check(path)?;
        let mut warnings = Vec::new();
        let is_xl = match index.text("_class_name")? {
            Some("StableDiffusionPipeline") => false,
            Some("StableDiffusionXLPipeline") => true,
            Some(name @ ("LatentConsistencyModelPipeline" | "StableDiffusionImg2ImgPipeline")) => {
                warnings.push(format!(
                    "{}: read as a StableDiffusionPipeline, not as {name}",
                    index.path.display()
                ));
                false
            }
            other => {
                let problem = format!(
                    "is {other:?}; supported: \"StableDiffusionPipeline\" and \"StableDiffusionXLPipeline\""
                );
                return Err(index.wrong("_class_name", problem));
            }
        };
        class_of(&index, "unet", &["UNet2DConditionModel"])?;
        class_of(&index, "vae", &["AutoencoderKL"])?;
        class_of(&index, "tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"])?;
        let folder = Self {
            unet: open_unet(&path.join("unet"), variant, &mut warnings)?,
            vae: open_vae(&path.join("vae"), variant, &mut warnings)?,
            text: text(path, &index, "", variant, &mut warnings)?,
            text_2: is_xl
                .then(|| text(path, &index, "_2", variant, &mut warnings))
                .transpose()?,
            schedule: ScheduleConfig::read(
                &Keys::read(&path.join("scheduler/scheduler_config.json"))?,
                &mut warnings,
            )?,
            zeros_for_empty_prompt: is_xl && index.flag("force_zeros_for_empty_prompt", true)?,
            path: path.to_owned(),
            warnings,
        };
        folder.check_fit()?;
        Ok(folder)
    }

    /// Width of the text states.
    pub fn context_width(&self) -> i64 {
        let width = |text: &TextComponent| text.encoder.config.width;
        width(&self.text) + self.text_2.as_ref().map_or(0, width)
    }

    /// Shape `[C, H, W]` of a latent at the default size.
    pub fn latent_shape(&self) -> [i64; 3] {
        let config = &self.unet.config;
        [config.in_channels, config.sample_size, config.sample_size]
    }

    /// Side of a picture at the default size, in pixels.
    pub fn image_side(&self) -> i64 {
        self.unet.config.sample_size * self.vae.config.factor()
    }

    /// Complains unless each of the adapter targets names a module of the denoiser.
    ///
    /// # Errors
    /// Names the first that does not, and what there is.
    pub fn check_targets(&self, targets: &[String]) -> Result<(), Error> {
        let shapes = unet_tensors(&self.unet.config);
        let is_known =
            |target: &&String| !adapter_modules(&shapes, std::slice::from_ref(*target)).is_empty();
        let Some(target) = targets.iter().find(|target| !is_known(target)) else {
            return Ok(());
        };
        let problem = format!(
            "has no module that {target:?} of student.targets names; there are {}",
            adapter_targets(&shapes).join(", ")
        );
        Err(Error::file(&self.path.join("unet"), problem))
    }

    /// Complains where components do not fit each other.
    fn check_fit(&self) -> Result<(), Error> {
        let config = self.path.join("unet/config.json");
        let unet = &self.unet.config;
        let context = self.context_width();
        if unet.context_width != context {
            let problem = format!(
                "is {}, but the text encoders give {context}",
                unet.context_width
            );
            return Err(Error::key(&config, "cross_attention_dim", problem));
        }
        let latent = self.vae.config.latent_channels;
        if unet.in_channels != latent {
            let problem = format!(
                "is {}, but the autoencoder's latent has {latent} channels",
                unet.in_channels
            );
            return Err(Error::key(&config, "in_channels", problem));
        }
        let pooled = self
            .text_2
            .as_ref()
            .map(|text| text.encoder.config.projection.unwrap_or(0));
        match (unet.text_time, pooled) {
            (None, None) => Ok(()),
            (Some(text_time), Some(pooled)) => {
                let due = pooled + 6 * text_time.size_width;
                if text_time.input_width == due {
                    return Ok(());
                }
                let problem = format!(
                    "is {}, but pooled text and six sizes have {due}",
                    text_time.input_width
                );
                Err(Error::key(
                    &config,
                    "projection_class_embeddings_input_dim",
                    problem,
                ))
            }
            (Some(_), None) => Err(Error::key(
                &config,
                "addition_embed_type",
                "needs a second text encoder, which this pipeline has not",
            )),
            (None, Some(_)) => Err(Error::key(
                &config,
                "addition_embed_type",
                "must be \"text_time\" in a StableDiffusionXLPipeline",
            )),
        }
    }
}

/// The class that `model_index.json` gives a component.
fn class_of<'a>(index: &'a Keys, component: &str, supported: &[&str]) -> Result<&'a str, Error> {
    let class = index
        .texts(component)
        .ok()
        .flatten()
        .and_then(|pair| match pair[..] {
            [_, class] => Some(class),
            _ => None,
        });
    let supported_list = || {
        supported
            .iter()
            .map(|name| format!("{name:?}"))
            .collect::<Vec<_>>()
            .join(" and ")
    };
    match class {
        Some(class) if supported.contains(&class) => Ok(class),
        Some(class) => Err(index.wrong(
            component,
            format!("is of class {class:?}; supported: {}", supported_list()),
        )),
        None => Err(index.wrong(
            component,
            format!(
                "must be a pair of library and class; supported: {}",
                supported_list()
            ),
        )),
    }
}

/// Opens a `UNet2DConditionModel` that lies in `folder` alone; adds to `warnings` what the user should know.
///
/// # Errors
/// The first fault found, with file and key or tensor.
pub fn open_unet(
    folder: &Path,
    variant: Option<&str>,
    warnings: &mut Vec<String>,
) -> Result<Component<UnetConfig>, Error> {
    let config = UnetConfig::read(&Keys::read(&folder.join("config.json"))?, warnings)?;
    let expected = unet_tensors(&config);
    let weights = Weights::open(
        folder,
        "diffusion_pytorch_model",
        variant,
        &expected,
        weights::keep,
        warnings,
    )?;
    Ok(Component { config, weights })
}

/// Opens an `AutoencoderKL` that lies in `folder` alone; adds to `warnings` what the user should know.
///
/// # Errors
/// The first fault found, with file and key or tensor.
pub fn open_vae(
    folder: &Path,
    variant: Option<&str>,
    warnings: &mut Vec<String>,
) -> Result<Component<VaeConfig>, Error> {
    let config = VaeConfig::read(&Keys::read(&folder.join("config.json"))?)?;
    let expected = vae_tensors(&config);
    let weights = Weights::open(
        folder,
        "diffusion_pytorch_model",
        variant,
        &expected,
        weights::present_vae_name,
        warnings,
    )?;
    Ok(Component { config, weights })
}

/// Reads `text_encoder{suffix}` and finds `tokenizer{suffix}`.
fn text(
    path: &Path,
    index: &Keys,
    suffix: &str,
    variant: Option<&str>,
    warnings: &mut Vec<String>,
) -> Result<TextComponent, Error> {
    let name = format!("text_encoder{suffix}");
    let supported: &[&str] = match suffix {
        "" => &["CLIPTextModel", "CLIPTextModelWithProjection"],
        _ => &["CLIPTextModelWithProjection"],
    };
    let class = class_of(index, &name, supported)?;
    let folder = path.join(&name);
    let config = TextConfig::read(&Keys::read(&folder.join("config.json"))?, class)?;
    let expected = text_tensors(&config);
    let weights = Weights::open(
        &folder,
        "model",
        variant,
        &expected,
        weights::present_text_name,
        warnings,
    )?;
    let tokenizer = path.join(format!("tokenizer{suffix}"));
    let is_there = |name: &str| tokenizer.join(name).is_file();
    let found = is_there("tokenizer.json") || (is_there("vocab.json") && is_there("merges.txt"));
    if !found {
        return Err(Error::file(
            &tokenizer,
            "has neither tokenizer.json nor vocab.json with merges.txt",
        ));
    }
    Vocabulary::open(&tokenizer, config.positions as usize, config.vocabulary)?;
    Ok(TextComponent {
        encoder: Component { config, weights },
        tokenizer,
    })
}

#[cfg(test)]
mod tests;
