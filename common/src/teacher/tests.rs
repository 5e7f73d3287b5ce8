//! The counts that the reference implementations give for the real families.

use super::*;

/// The LCM preset of adapter targets.
const LCM_TARGETS: [&str; 14] = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
];

fn stable_diffusion_15() -> UnetConfig {
    UnetConfig {
        sample_size: 64,
        in_channels: 4,
        out_channels: 4,
        channels: vec![320, 640, 1280, 1280],
        down: vec![
            Level::CrossAttention,
            Level::CrossAttention,
            Level::CrossAttention,
            Level::Plain,
        ],
        up: vec![
            Level::Plain,
            Level::CrossAttention,
            Level::CrossAttention,
            Level::CrossAttention,
        ],
        layers: vec![2; 4],
        heads: vec![8; 4],
        depths: vec![1; 4],
        context_width: 768,
        time_width: 1280,
        linear_projection: false,
        norm_groups: 32,
        norm_eps: 1e-5,
        flip_sin_to_cos: true,
        freq_shift: 0.0,
        guidance_width: None,
        text_time: None,
    }
}

fn stable_diffusion_xl() -> UnetConfig {
    UnetConfig {
        sample_size: 128,
        channels: vec![320, 640, 1280],
        down: vec![Level::Plain, Level::CrossAttention, Level::CrossAttention],
        up: vec![Level::CrossAttention, Level::CrossAttention, Level::Plain],
        layers: vec![2; 3],
        heads: vec![5, 10, 20],
        depths: vec![1, 2, 10],
        context_width: 2048,
        linear_projection: true,
        text_time: Some(TextTime {
            size_width: 256,
            input_width: 2816,
        }),
        ..stable_diffusion_15()
    }
}

fn clip(
    width: i64,
    mlp_width: i64,
    layers: i64,
    heads: i64,
    projection: Option<i64>,
) -> TextConfig {
    TextConfig {
        vocabulary: 49408,
        width,
        mlp_width,
        layers,
        heads,
        positions: 77,
        activation: Activation::QuickGelu,
        norm_eps: 1e-5,
        eos_token_id: 2,
        projection,
    }
}

fn counts(shapes: &Shapes) -> (usize, i64) {
    (shapes.len(), parameter_count(shapes))
}

#[test]
fn the_unets_have_the_published_numbers_of_tensors_and_parameters() {
    assert_eq!(
        counts(&unet_tensors(&stable_diffusion_15())),
        (686, 859_520_964)
    );
    assert_eq!(
        counts(&unet_tensors(&stable_diffusion_xl())),
        (1680, 2_567_463_684)
    );
    let guided = UnetConfig {
        guidance_width: Some(256),
        ..stable_diffusion_15()
    };
    assert_eq!(counts(&unet_tensors(&guided)), (687, 859_520_964 + 81_920));
}

#[test]
fn the_text_encoders_and_the_autoencoder_have_the_published_numbers_of_parameters() {
    assert_eq!(
        counts(&text_tensors(&clip(768, 3072, 12, 12, None))),
        (196, 123_060_480)
    );
    assert_eq!(
        counts(&text_tensors(&clip(1280, 5120, 32, 20, Some(1280)))),
        (517, 694_659_840)
    );
    let vae = VaeConfig {
        in_channels: 3,
        out_channels: 3,
        latent_channels: 4,
        channels: vec![128, 256, 512, 512],
        layers: 2,
        norm_groups: 32,
        mid_attention: true,
        quant_conv: true,
        post_quant_conv: true,
        scaling_factor: 0.18215,
        shift_factor: 0.0,
        latents_mean_std: None,
        force_upcast: true,
    };
    assert_eq!(counts(&vae_tensors(&vae)), (248, 83_653_863));
}

#[test]
fn adapters_of_the_lcm_preset_have_the_published_numbers() {
    let targets = LCM_TARGETS.map(str::to_owned);
    for (config, modules, parameters) in [
        (stable_diffusion_xl(), 788, 196_751_360),
        (stable_diffusion_15(), 278, 67_252_224),
    ] {
        let found = adapter_modules(&unet_tensors(&config), &targets);
        assert_eq!(
            (found.len(), adapter_parameter_count(&found, 64)),
            (modules, parameters)
        );
    }
}
