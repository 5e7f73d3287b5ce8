//! Names and shapes of the tensors that each network needs: pure functions of its configuration.
//!
//! The names are the ones diffusers and transformers write; text encoders without the `text_model.` prefix.

use std::collections::{BTreeMap, BTreeSet};

use super::{Level, TextConfig, UnetConfig, VaeConfig};

/// Shapes by tensor name.
pub type Shapes = BTreeMap<String, Vec<i64>>;

/// All elements of all tensors.
pub fn parameter_count(shapes: &Shapes) -> i64 {
    shapes
        .values()
        .map(|shape| shape.iter().product::<i64>())
        .sum()
}

/// The modules of a network whose path is one of `targets` or ends with `.` and one of them, with the shape of
/// their weight: `[out, in]` or `[out, in, k, k]`. These are the modules that a low-rank adapter stands beside.
pub fn adapter_modules(shapes: &Shapes, targets: &[String]) -> Shapes {
    let is_target = |path: &str| {
        targets
            .iter()
            .any(|target| match path.strip_suffix(target.as_str()) {
                Some(rest) => rest.is_empty() || rest.ends_with('.'),
                None => false,
            })
    };
    shapes
        .iter()
        .filter(|(_, shape)| shape.len() == 2 || shape.len() == 4)
        .filter_map(|(name, shape)| Some((name.strip_suffix(".weight")?, shape)))
        .filter(|(path, _)| is_target(path))
        .map(|(path, shape)| (path.to_owned(), shape.clone()))
        .collect()
}

/// The short names of the modules that can have an adapter: the end of a path, from its last word on.
pub fn adapter_targets(shapes: &Shapes) -> Vec<String> {
    let is_word = |part: &str| part.parse::<u32>().is_err();
    let end_of = |path: &str| {
        let parts: Vec<&str> = path.split('.').collect();
        let from = parts.iter().rposition(|part| is_word(part)).unwrap_or(0);
        parts[from..].join(".")
    };
    let ends: BTreeSet<String> = shapes
        .iter()
        .filter(|(_, shape)| shape.len() == 2 || shape.len() == 4)
        .filter_map(|(name, _)| Some(end_of(name.strip_suffix(".weight")?)))
        .collect();
    ends.into_iter().collect()
}

/// Parameters of adapters of width `lora_rank` beside `modules`.
pub fn adapter_parameter_count(modules: &Shapes, lora_rank: i64) -> i64 {
    modules
        .values()
        .map(|shape| lora_rank * (shape[0] + shape[1..].iter().product::<i64>()))
        .sum()
}

/// Collects shapes under a common prefix.
struct Builder(Shapes);

impl Builder {
    fn weight(&mut self, path: &str, shape: &[i64]) {
        self.0.insert(format!("{path}.weight"), shape.to_vec());
    }

    /// Weight and a bias as long as the weight's first side.
    fn layer(&mut self, path: &str, shape: &[i64]) {
        self.weight(path, shape);
        self.0.insert(format!("{path}.bias"), vec![shape[0]]);
    }

    fn conv(&mut self, path: &str, input: i64, output: i64, kernel: i64) {
        self.layer(path, &[output, input, kernel, kernel]);
    }

    fn resnet(&mut self, path: &str, input: i64, output: i64, time_width: Option<i64>) {
        self.layer(&format!("{path}.norm1"), &[input]);
        self.conv(&format!("{path}.conv1"), input, output, 3);
        if let Some(width) = time_width {
            self.layer(&format!("{path}.time_emb_proj"), &[output, width]);
        }
        self.layer(&format!("{path}.norm2"), &[output]);
        self.conv(&format!("{path}.conv2"), output, output, 3);
        if input != output {
            self.conv(&format!("{path}.conv_shortcut"), input, output, 1);
        }
    }

    /// The transformer after a resnet of `level`.
    fn transformer(&mut self, path: &str, config: &UnetConfig, level: usize) {
        let width = config.channels[level];
        let kernel: &[i64] = if config.linear_projection {
            &[]
        } else {
            &[1, 1]
        };
        let projection = [&[width, width], kernel].concat();
        self.layer(&format!("{path}.norm"), &[width]);
        self.layer(&format!("{path}.proj_in"), &projection);
        self.layer(&format!("{path}.proj_out"), &projection);
        for block in 0..config.depths[level] {
            let path = format!("{path}.transformer_blocks.{block}");
            for norm in ["norm1", "norm2", "norm3"] {
                self.layer(&format!("{path}.{norm}"), &[width]);
            }
            for (attention, source) in [("attn1", width), ("attn2", config.context_width)] {
                self.weight(&format!("{path}.{attention}.to_q"), &[width, width]);
                self.weight(&format!("{path}.{attention}.to_k"), &[width, source]);
                self.weight(&format!("{path}.{attention}.to_v"), &[width, source]);
                self.layer(&format!("{path}.{attention}.to_out.0"), &[width, width]);
            }
            self.layer(&format!("{path}.ff.net.0.proj"), &[8 * width, width]);
            self.layer(&format!("{path}.ff.net.2"), &[width, 4 * width]);
        }
    }
}

/// The tensors of a UNet.
pub fn unet_tensors(config: &UnetConfig) -> Shapes {
    let mut shapes = Builder(Shapes::new());
    let (first, width) = (config.channels[0], config.time_width);
    let last = config.channels.len() - 1;
    shapes.conv("conv_in", config.in_channels, first, 3);
    shapes.layer("time_embedding.linear_1", &[width, first]);
    shapes.layer("time_embedding.linear_2", &[width, width]);
    if let Some(guidance) = config.guidance_width {
        shapes.weight("time_embedding.cond_proj", &[first, guidance]);
    }
    if let Some(text_time) = config.text_time {
        shapes.layer("add_embedding.linear_1", &[width, text_time.input_width]);
        shapes.layer("add_embedding.linear_2", &[width, width]);
    }
    unet_down(&mut shapes, config);
    let coarsest = config.channels[last];
    for resnet in 0..2 {
        shapes.resnet(
            &format!("mid_block.resnets.{resnet}"),
            coarsest,
            coarsest,
            Some(width),
        );
    }
    shapes.transformer("mid_block.attentions.0", config, last);
    unet_up(&mut shapes, config);
    shapes.layer("conv_norm_out", &[first]);
    shapes.conv("conv_out", first, config.out_channels, 3);
    shapes.0
}

fn unet_down(shapes: &mut Builder, config: &UnetConfig) {
    let last = config.channels.len() - 1;
    let mut input = config.channels[0];
    for level in 0..=last {
        let output = config.channels[level];
        for layer in 0..config.layers[level] {
            let path = format!("down_blocks.{level}.resnets.{layer}");
            shapes.resnet(&path, input, output, Some(config.time_width));
            input = output;
            if config.down[level] == Level::CrossAttention {
                shapes.transformer(
                    &format!("down_blocks.{level}.attentions.{layer}"),
                    config,
                    level,
                );
            }
        }
        if level < last {
            shapes.conv(
                &format!("down_blocks.{level}.downsamplers.0.conv"),
                output,
                output,
                3,
            );
        }
    }
}

fn unet_up(shapes: &mut Builder, config: &UnetConfig) {
    let last = config.channels.len() - 1;
    let mut skips = config.skip_channels();
    let mut input = config.channels[last];
    for block in 0..=last {
        let level = last - block;
        let output = config.channels[level];
        for layer in 0..=config.layers[level] {
            let skip = skips
                .pop()
                .expect("one skip was pushed for each resnet of the way up");
            let path = format!("up_blocks.{block}.resnets.{layer}");
            shapes.resnet(&path, input + skip, output, Some(config.time_width));
            input = output;
            if config.up[block] == Level::CrossAttention {
                shapes.transformer(
                    &format!("up_blocks.{block}.attentions.{layer}"),
                    config,
                    level,
                );
            }
        }
        if block < last {
            shapes.conv(
                &format!("up_blocks.{block}.upsamplers.0.conv"),
                output,
                output,
                3,
            );
        }
    }
}

/// The tensors of an autoencoder, attention by its present names (`to_q`, `to_k`, `to_v`, `to_out.0`).
pub fn vae_tensors(config: &VaeConfig) -> Shapes {
    let mut shapes = Builder(Shapes::new());
    let latent = config.latent_channels;
    let last = config.channels.len() - 1;
    let (first, coarsest) = (config.channels[0], config.channels[last]);
    shapes.conv("encoder.conv_in", config.in_channels, first, 3);
    let mut input = first;
    for (level, &output) in config.channels.iter().enumerate() {
        for layer in 0..config.layers {
            shapes.resnet(
                &format!("encoder.down_blocks.{level}.resnets.{layer}"),
                input,
                output,
                None,
            );
            input = output;
        }
        if level < last {
            shapes.conv(
                &format!("encoder.down_blocks.{level}.downsamplers.0.conv"),
                output,
                output,
                3,
            );
        }
    }
    vae_middle(&mut shapes, "encoder", coarsest, config.mid_attention);
    shapes.layer("encoder.conv_norm_out", &[coarsest]);
    shapes.conv("encoder.conv_out", coarsest, 2 * latent, 3);
    if config.quant_conv {
        shapes.conv("quant_conv", 2 * latent, 2 * latent, 1);
    }
    if config.post_quant_conv {
        shapes.conv("post_quant_conv", latent, latent, 1);
    }
    shapes.conv("decoder.conv_in", latent, coarsest, 3);
    vae_middle(&mut shapes, "decoder", coarsest, config.mid_attention);
    let mut input = coarsest;
    for (block, &output) in config.channels.iter().rev().enumerate() {
        for layer in 0..=config.layers {
            shapes.resnet(
                &format!("decoder.up_blocks.{block}.resnets.{layer}"),
                input,
                output,
                None,
            );
            input = output;
        }
        if block < last {
            shapes.conv(
                &format!("decoder.up_blocks.{block}.upsamplers.0.conv"),
                output,
                output,
                3,
            );
        }
    }
    shapes.layer("decoder.conv_norm_out", &[first]);
    shapes.conv("decoder.conv_out", first, config.out_channels, 3);
    shapes.0
}

fn vae_middle(shapes: &mut Builder, half: &str, channels: i64, attention: bool) {
    for resnet in 0..2 {
        shapes.resnet(
            &format!("{half}.mid_block.resnets.{resnet}"),
            channels,
            channels,
            None,
        );
    }
    if attention {
        let path = format!("{half}.mid_block.attentions.0");
        shapes.layer(&format!("{path}.group_norm"), &[channels]);
        for projection in ["to_q", "to_k", "to_v", "to_out.0"] {
            shapes.layer(&format!("{path}.{projection}"), &[channels, channels]);
        }
    }
}

/// The tensors of a text encoder, without the `text_model.` prefix.
pub fn text_tensors(config: &TextConfig) -> Shapes {
    let mut shapes = Builder(Shapes::new());
    let width = config.width;
    shapes.weight("embeddings.token_embedding", &[config.vocabulary, width]);
    shapes.weight("embeddings.position_embedding", &[config.positions, width]);
    for layer in 0..config.layers {
        let path = format!("encoder.layers.{layer}");
        for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            shapes.layer(&format!("{path}.self_attn.{projection}"), &[width, width]);
        }
        for norm in ["layer_norm1", "layer_norm2"] {
            shapes.layer(&format!("{path}.{norm}"), &[width]);
        }
        shapes.layer(&format!("{path}.mlp.fc1"), &[config.mlp_width, width]);
        shapes.layer(&format!("{path}.mlp.fc2"), &[width, config.mlp_width]);
    }
    shapes.layer("final_layer_norm", &[width]);
    if let Some(projection) = config.projection {
        shapes.weight("text_projection", &[projection, width]);
    }
    shapes.0
}
