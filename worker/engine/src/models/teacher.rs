//! A teacher with all its parts, as trajectories and evaluation use it.

use std::path::Path;

use distillery_common::teacher::{Component, Folder, ScheduleConfig, TextComponent, TextConfig};
use tch::{Device, Kind, Tensor, no_grad};

use super::{TextEncoder, Tokenizer, Unet, Vae, weights};
use crate::diffusion::denoiser::Conditioning;

/// Why a teacher cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its folder or a tokenizer in it is not sound.
    #[error(transparent)]
    Folder(#[from] distillery_common::teacher::Error),
    /// Its weights cannot be read.
    #[error(transparent)]
    Weights(#[from] weights::Error),
}

/// A text encoder and its tokenizer.
#[derive(Debug)]
pub struct Text {
    /// Turns texts into ids.
    pub tokenizer: Tokenizer,
    /// Turns ids into states.
    pub encoder: TextEncoder,
}

impl Text {
    fn load(component: &TextComponent, kind: Kind, device: Device) -> Result<Self, Error> {
        let Component { config, weights } = &component.encoder;
        Ok(Self {
            tokenizer: tokenizer(component, config)?,
            encoder: TextEncoder::new(config.clone(), &weights::load(weights, kind, device)?, kind),
        })
    }

    fn ids(&self, texts: &[&str]) -> Tensor {
        let rows: Vec<_> = texts
            .iter()
            .flat_map(|text| self.tokenizer.encode(text))
            .collect();
        Tensor::from_slice(&rows).view([texts.len() as i64, self.tokenizer.length() as i64])
    }
}

fn tokenizer(
    component: &TextComponent,
    config: &TextConfig,
) -> Result<Tokenizer, distillery_common::teacher::Error> {
    Tokenizer::open(
        &component.tokenizer,
        config.positions as usize,
        config.vocabulary,
    )
}

/// A teacher with all its parts.
#[derive(Debug)]
pub struct Teacher {
    /// The denoiser.
    pub unet: Unet,
    /// The autoencoder.
    pub vae: Vae,
    /// The text encoder; the first of two for SDXL.
    pub text: Text,
    /// SDXL's second text encoder.
    pub text_2: Option<Text>,
    /// The noise schedule.
    pub schedule: ScheduleConfig,
    latent_shape: [i64; 3],
    image_side: i64,
    zeros_for_empty_prompt: bool,
}

impl Teacher {
    /// Opens and loads the folder at `path`, computing in `kind` on `device`. An autoencoder that overflows in f16 is
    /// computed in f32 then.
    ///
    /// # Errors
    /// When the folder is not sound, see [`Folder::open`].
    pub fn open(
        path: &Path,
        variant: Option<&str>,
        kind: Kind,
        device: Device,
    ) -> Result<Self, Error> {
        Self::load(&Folder::open(path, variant)?, kind, device)
    }

    /// Loads a checked folder.
    ///
    /// # Errors
    /// When a file changed since it was checked, or a tokenizer is not sound.
    pub fn load(folder: &Folder, kind: Kind, device: Device) -> Result<Self, Error> {
        let Component { config, weights } = &folder.unet;
        let unet = Unet::new(config.clone(), weights::load(weights, kind, device)?, kind);
        let Component { config, weights } = &folder.vae;
        let vae_kind = match kind {
            Kind::Half if config.force_upcast => Kind::Float,
            kind => kind,
        };
        Ok(Self {
            unet,
            vae: Vae::new(
                config.clone(),
                &weights::load(weights, vae_kind, device)?,
                vae_kind,
            ),
            text: Text::load(&folder.text, kind, device)?,
            text_2: folder
                .text_2
                .as_ref()
                .map(|text| Text::load(text, kind, device))
                .transpose()?,
            schedule: folder.schedule.clone(),
            latent_shape: folder.latent_shape(),
            image_side: folder.image_side(),
            zeros_for_empty_prompt: folder.zeros_for_empty_prompt,
        })
    }

    /// Shape `[C, H, W]` of a latent at the default size.
    pub fn latent_shape(&self) -> [i64; 3] {
        self.latent_shape
    }

    /// Side of a picture at the default size, in pixels.
    pub fn image_side(&self) -> i64 {
        self.image_side
    }

    /// What the denoiser is told of `prompts`, in f32. No gradient flows back.
    pub fn encode_prompts(&self, prompts: &[&str]) -> Conditioning {
        no_grad(|| {
            let first = self.text.encoder.forward(&self.text.ids(prompts));
            let Some(text_2) = &self.text_2 else {
                return Conditioning {
                    context: first.last,
                    pooled: None,
                    time_ids: None,
                };
            };
            let second = text_2.encoder.forward(&text_2.ids(prompts));
            Conditioning {
                context: Tensor::cat(&[first.penultimate, second.penultimate], -1),
                time_ids: Some(self.time_ids(prompts.len() as i64, second.pooled.device())),
                pooled: Some(second.pooled),
            }
        })
    }

    /// What the denoiser is told when it is told nothing, for a batch of `batch`: the empty text, or zeros for
    /// teachers trained so.
    pub fn null_conditioning(&self, batch: i64) -> Conditioning {
        let empty = self.encode_prompts(&[""]);
        let context = empty.context.repeat([batch, 1, 1]);
        let pooled = empty.pooled.map(|pooled| pooled.repeat([batch, 1]));
        let null = |x: Tensor| match self.zeros_for_empty_prompt {
            true => x.zeros_like(),
            false => x,
        };
        Conditioning {
            context: null(context),
            pooled: pooled.map(null),
            time_ids: empty.time_ids.map(|sizes| sizes.repeat([batch, 1])),
        }
    }

    /// Original size, no crop, target size: all the default side; `[batch, 6]` in f32.
    fn time_ids(&self, batch: i64, device: Device) -> Tensor {
        let side = self.image_side as f32;
        let row = Tensor::from_slice(&[side, side, 0.0, 0.0, side, side]);
        row.to_device(device).repeat([batch, 1])
    }
}
