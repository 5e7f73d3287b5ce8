//! The teacher's networks: denoiser, autoencoder, text encoders and tokenizers, built from a checked folder.
//!
//! Networks compute in the number format they are told and take and give f32 at their doors. They must never know a
//! recipe, the storage or an objective.

mod attention;
mod clip;
mod embeddings;
mod layers;
pub mod lora;
mod parameters;
#[expect(unsafe_code, reason = "law L9: a node of ours in libtorch's graph")]
mod recompute;
mod resnet;
pub mod teacher;
pub mod tokenizer;
mod unet;
mod unet_blocks;
mod vae;
pub mod weights;

pub use clip::{Encoded, TextEncoder};
pub use embeddings::guidance_embedding;
pub use parameters::{Adapter, Parameters};
pub use teacher::Teacher;
pub use tokenizer::Tokenizer;
pub use unet::Unet;
pub use vae::Vae;
