//! A teacher of SDXL's full size with random weights: its denoiser as published (1,680 tensors), beside text encoders of the
//! right widths with few layers, and the autoencoder of the test fixtures. Written tensor by tensor.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context as _;
use distillery_common::teacher::{
    Activation, Level, Shapes, TextConfig, TextTime, UnetConfig, parameter_count, text_tensors,
    unet_tensors,
};
use serde_json::{Value, json};

/// Tensors and parameters of the published denoiser.
const PUBLISHED: (usize, i64) = (1680, 2_567_463_684);

/// Makes the folder `to` for latents of `side`, taking what does not matter from the fixtures in `from`.
pub(super) fn make(from: &Path, to: &Path, side: i64) -> anyhow::Result<()> {
    for folder in ["scheduler", "tokenizer", "tokenizer_2", "vae"] {
        copy(&from.join(folder), &to.join(folder))?;
    }
    fs::copy(from.join("model_index.json"), to.join("model_index.json"))?;
    for (name, width, heads) in [("text_encoder", 768, 12), ("text_encoder_2", 1280, 20)] {
        text_encoder(&from.join(name), &to.join(name), width, heads)
            .with_context(|| format!("making {name}"))?;
    }
    let config = denoiser(side);
    let shapes = unet_tensors(&config);
    let size = (shapes.len(), parameter_count(&shapes));
    anyhow::ensure!(
        size == PUBLISHED,
        "the denoiser has {size:?}, not {PUBLISHED:?}"
    );
    let unet = to.join("unet");
    fs::create_dir(&unet)?;
    fs::write(unet.join("config.json"), denoiser_json(&config).to_string())?;
    let weights = unet.join("diffusion_pytorch_model.fp16.safetensors");
    write_random(&weights, &shapes).context("making the denoiser")
}

/// SDXL's denoiser.
fn denoiser(side: i64) -> UnetConfig {
    use Level::{CrossAttention, Plain};
    UnetConfig {
        sample_size: side,
        in_channels: 4,
        out_channels: 4,
        channels: vec![320, 640, 1280],
        down: vec![Plain, CrossAttention, CrossAttention],
        up: vec![CrossAttention, CrossAttention, Plain],
        layers: vec![2, 2, 2],
        heads: vec![5, 10, 20],
        depths: vec![1, 2, 10],
        context_width: 2048,
        time_width: 1280,
        linear_projection: true,
        norm_groups: 32,
        norm_eps: 1e-5,
        flip_sin_to_cos: true,
        freq_shift: 0.0,
        guidance_width: None,
        text_time: Some(TextTime {
            size_width: 256,
            input_width: 2816,
        }),
    }
}

fn denoiser_json(config: &UnetConfig) -> Value {
    let blocks = |levels: &[Level], plain: &str, attention: &str| -> Vec<String> {
        let name = |level: &Level| match level {
            Level::Plain => plain.to_owned(),
            Level::CrossAttention => attention.to_owned(),
        };
        levels.iter().map(name).collect()
    };
    json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.channels,
        "down_block_types": blocks(&config.down, "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": blocks(&config.up, "UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": config.layers,
        "attention_head_dim": config.heads,
        "transformer_layers_per_block": config.depths,
        "cross_attention_dim": config.context_width,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    })
}

/// The encoder of the fixture `from` with other widths.
fn text_encoder(from: &Path, to: &Path, width: i64, heads: i64) -> anyhow::Result<()> {
    let mut json: Value = serde_json::from_slice(&fs::read(from.join("config.json"))?)?;
    let mlp_width = 2 * width;
    for (key, value) in [
        ("hidden_size", width),
        ("num_attention_heads", heads),
        ("intermediate_size", mlp_width),
        ("projection_dim", 1280),
    ] {
        json[key] = json!(value);
    }
    let number = |key: &str| {
        json[key]
            .as_i64()
            .with_context(|| format!("{key} is no number"))
    };
    let is_second = json["architectures"][0] == "CLIPTextModelWithProjection";
    let config = TextConfig {
        width,
        mlp_width,
        heads,
        projection: is_second.then_some(1280),
        layers: number("num_hidden_layers")?,
        positions: number("max_position_embeddings")?,
        vocabulary: number("vocab_size")?,
        // These three change no tensor.
        activation: Activation::Gelu,
        norm_eps: 1e-5,
        eos_token_id: 2,
    };
    fs::create_dir(to)?;
    fs::write(to.join("config.json"), json.to_string())?;
    write_random(&to.join("model.fp16.safetensors"), &text_tensors(&config))
}

/// A safetensors file of bf16 numbers: norms' weights are one, biases zero, others uniform with the deviation that keeps a
/// signal's size.
fn write_random(path: &Path, shapes: &Shapes) -> anyhow::Result<()> {
    let elements = |shape: &[i64]| shape.iter().product::<i64>();
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in shapes {
        let start = end;
        end += 2 * elements(shape);
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut state = 1u64;
    for (name, shape) in shapes {
        let is_vector = shape.len() == 1;
        let inputs = elements(&shape[1..]).max(1) as f32;
        let bound = (1.0 / inputs).sqrt();
        for _ in 0..elements(shape) {
            let value = match (is_vector, name.ends_with(".weight")) {
                (true, true) => 1.0,
                (true, false) => 0.0,
                (false, _) => bound * uniform(&mut state),
            };
            file.write_all(&(value.to_bits() >> 16).to_le_bytes()[..2])?;
        }
    }
    Ok(file.flush()?)
}

/// Uniform in -1..1, from the multiplier of Knuth's MMIX.
fn uniform(state: &mut u64) -> f32 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
