//! The networks give what the reference implementations give (`fixtures/make.py` made the numbers).

use std::path::{Path, PathBuf};

use distillery_common::teacher::{Component, Folder};
use distillery_engine::diffusion::denoiser::{Conditioning, Denoiser};
use distillery_engine::models::{
    Parameters, Teacher, TextEncoder, Tokenizer, Unet, Vae, lora, weights,
};
use tch::{Device, Kind, Tensor};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn read(path: &str) -> Parameters {
    weights::read_safetensors(&fixtures().join(path)).expect("the fixture is sound")
}

fn folder(name: &str) -> Folder {
    let variant = (name == "sdxl").then_some("fp16");
    Folder::open(&fixtures().join(name), variant).expect("the fixture is sound")
}

/// Asserts that `got` lies within `tolerance` of `wanted`, relative to the largest value wanted.
fn assert_close(what: &str, got: &Tensor, wanted: &Tensor, tolerance: f64) {
    assert_eq!(got.size(), wanted.size(), "{what}");
    assert_eq!(got.kind(), Kind::Float, "{what}");
    let scale = wanted.abs().max().double_value(&[]);
    let error = (got - wanted).abs().max().double_value(&[]) / scale;
    assert!(error <= tolerance, "{what} is off by {error:e} of {scale}");
}

const F32: (Kind, f64) = (Kind::Float, 1e-5);
const BF16: (Kind, f64) = (Kind::BFloat16, 2e-2);

fn conditioning(numbers: &Parameters) -> Conditioning {
    let optional = |name| numbers.get(name).map(Tensor::shallow_clone);
    Conditioning {
        context: numbers["unet.context"].shallow_clone(),
        pooled: optional("unet.pooled"),
        time_ids: optional("unet.time_ids"),
    }
}

fn times(numbers: &Parameters) -> Tensor {
    numbers["unet.t"].to_kind(Kind::Int64)
}

fn load_unet(component: &Component<distillery_common::teacher::UnetConfig>, kind: Kind) -> Unet {
    let parameters =
        weights::load(&component.weights, kind, Device::Cpu).expect("the fixture is sound");
    Unet::new(component.config.clone(), parameters, kind)
}

fn check_unet(unet: &Unet, numbers: &Parameters, tolerance: f64) {
    for sides in ["", "odd."] {
        let z = &numbers[&format!("unet.{sides}z")];
        let got = unet.forward(
            z,
            &times(numbers),
            &conditioning(numbers),
            numbers.get("unet.w"),
        );
        assert_close(
            &format!("{sides}prediction"),
            &got,
            &numbers[&format!("unet.{sides}prediction")],
            tolerance,
        );
    }
}

fn check_vae(
    component: &Component<distillery_common::teacher::VaeConfig>,
    numbers: &Parameters,
    (kind, tolerance): (Kind, f64),
) {
    let parameters =
        weights::load(&component.weights, kind, Device::Cpu).expect("the fixture is sound");
    let vae = Vae::new(component.config.clone(), &parameters, kind);
    let (mean, logvar) = vae.encode_moments(&numbers["vae.pictures"]);
    assert_close("mean", &mean, &numbers["vae.mean"], tolerance);
    assert_close("logvar", &logvar, &numbers["vae.logvar"], tolerance);
    assert_close(
        "decoded",
        &vae.decode(&numbers["vae.z"]),
        &numbers["vae.decoded"],
        tolerance,
    );
}

#[test]
fn both_families_of_unets_predict_what_the_reference_predicts() {
    for name in ["sd15", "sdxl"] {
        let (folder, numbers) = (folder(name), read(&format!("{name}/expected.safetensors")));
        for (kind, tolerance) in [F32, BF16] {
            check_unet(&load_unet(&folder.unet, kind), &numbers, tolerance);
        }
    }
}

#[test]
fn the_autoencoder_encodes_and_decodes_as_the_reference_does() {
    for name in ["sd15", "sdxl"] {
        let (folder, numbers) = (folder(name), read(&format!("{name}/expected.safetensors")));
        for precision in [F32, BF16] {
            check_vae(&folder.vae, &numbers, precision);
        }
    }
}

#[test]
fn what_is_encoded_is_decoded_in_the_same_units() {
    let teacher =
        Teacher::load(&folder("sdxl"), Kind::Float, Device::Cpu).expect("the fixture is sound");
    let numbers = read("sdxl/expected.safetensors");
    let config = teacher.vae.config();
    let wanted = (&numbers["vae.mean"] - config.shift_factor) * config.scaling_factor;
    assert_close(
        "latents",
        &teacher.vae.encode(&numbers["vae.pictures"]),
        &wanted,
        1e-5,
    );
}

fn texts() -> Vec<String> {
    let bytes = std::fs::read(fixtures().join("texts.json")).expect("the fixture is there");
    serde_json::from_slice(&bytes).expect("the fixture is sound")
}

#[test]
fn tokenizers_give_the_ids_of_the_reference_for_every_kind_of_text() {
    for (name, parts) in [
        ("sd15", &["tokenizer"][..]),
        ("sdxl", &["tokenizer", "tokenizer_2"][..]),
    ] {
        let numbers = read(&format!("{name}/expected.safetensors"));
        for part in parts {
            let tokenizer = Tokenizer::open(&fixtures().join(name).join(part), 77, 1000)
                .expect("the fixture is sound");
            let wanted = numbers[&format!("{part}.ids")].to_kind(Kind::Int64);
            for (row, text) in texts().iter().enumerate() {
                let wanted =
                    Vec::<i64>::try_from(wanted.get(row as i64)).expect("ids are whole numbers");
                assert_eq!(tokenizer.encode(text), wanted, "{name}/{part}: {text:?}");
            }
        }
    }
}

fn check_text(
    component: &distillery_common::teacher::TextComponent,
    ids: &Tensor,
    numbers: &Parameters,
    stem: &str,
    (kind, tolerance): (Kind, f64),
) {
    let Component { config, weights } = &component.encoder;
    let parameters = weights::load(weights, kind, Device::Cpu).expect("the fixture is sound");
    let encoded = TextEncoder::new(config.clone(), &parameters, kind)
        .forward(&ids.narrow(0, 0, 4).to_kind(Kind::Int64));
    let mut compared = 0;
    for (part, got) in [
        ("last", &encoded.last),
        ("penultimate", &encoded.penultimate),
        ("pooled", &encoded.pooled),
    ] {
        if let Some(wanted) = numbers.get(&format!("{stem}.{part}")) {
            assert_close(&format!("{stem}.{part}"), got, wanted, tolerance);
            compared += 1;
        }
    }
    assert!(compared >= 2, "{stem} has numbers to compare with");
}

#[test]
fn text_encoders_give_the_states_and_the_pooled_text_of_the_reference() {
    for precision in [F32, BF16] {
        let numbers = read("sd15/expected.safetensors");
        check_text(
            &folder("sd15").text,
            &numbers["tokenizer.ids"],
            &numbers,
            "text",
            precision,
        );
        let numbers = read("sdxl/expected.safetensors");
        let folder = folder("sdxl");
        check_text(
            &folder.text,
            &numbers["tokenizer.ids"],
            &numbers,
            "text",
            precision,
        );
        let text_2 = folder.text_2.as_ref().expect("SDXL has two");
        check_text(
            text_2,
            &numbers["tokenizer_2.ids"],
            &numbers,
            "text_2",
            precision,
        );
    }
}

#[test]
fn a_teacher_conditions_on_what_the_pipeline_conditions_on() {
    let texts = texts();
    let prompts = [texts[1].as_str(), texts[2].as_str()];
    for name in ["sd15", "sdxl"] {
        let teacher =
            Teacher::load(&folder(name), Kind::Float, Device::Cpu).expect("the fixture is sound");
        let numbers = read(&format!("{name}/expected.safetensors"));
        let got = teacher.encode_prompts(&prompts);
        assert_close("context", &got.context, &numbers["prompt.context"], 1e-5);
        let null = teacher.null_conditioning(3);
        let is_zero = null.context.abs().max().double_value(&[]) == 0.0;
        assert_eq!(is_zero, name == "sdxl", "only SDXL takes zeros for no text");
        if name == "sdxl" {
            assert_close(
                "pooled",
                got.pooled.as_ref().expect("SDXL pools"),
                &numbers["prompt.pooled"],
                1e-5,
            );
            let sizes = Tensor::from_slice(&[16f32, 16.0, 0.0, 0.0, 16.0, 16.0]).repeat([3, 1]);
            assert_close(
                "sizes",
                null.time_ids.as_ref().expect("SDXL has sizes"),
                &sizes,
                0.0,
            );
        }
    }
}

#[test]
fn a_unet_with_a_guidance_embedding_is_told_its_guidance() {
    let path = fixtures().join("guided");
    let unet = distillery_common::teacher::open_unet(&path.join("unet"), None, &mut Vec::new())
        .expect("the fixture is sound");
    let numbers = read("guided/expected.safetensors");
    for (kind, tolerance) in [F32, BF16] {
        check_unet(&load_unet(&unet, kind), &numbers, tolerance);
    }
}

/// The reference pipeline's numbers for w = 7 in a width of 256.
#[test]
fn the_guidance_embedding_has_the_known_numbers() {
    let embedding =
        distillery_engine::models::guidance_embedding(&Tensor::from_slice(&[7f32]), 256);
    for (index, wanted) in [
        (0, 0.506885),
        (1, 0.804287),
        (127, 0.644218),
        (128, 0.862013),
        (255, 0.764842),
    ] {
        let got = embedding.double_value(&[0, index]);
        assert!((got - wanted).abs() < 1e-6, "{index}: {got}");
    }
}

#[test]
fn latents_are_scaled_by_channel_when_the_autoencoder_says_so() {
    let vae =
        distillery_common::teacher::open_vae(&fixtures().join("guided/vae"), None, &mut Vec::new())
            .expect("the fixture is sound");
    for precision in [F32, BF16] {
        check_vae(&vae, &read("guided/expected.safetensors"), precision);
    }
}

const TARGETS: [&str; 14] = [
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

/// The UNet of `name` with adapters of width 2 and alpha 3 that hold the fixture's values.
fn adapted(name: &str, numbers: &Parameters) -> Unet {
    let mut unet = load_unet(&folder(name).unet, Kind::Float);
    let shape = lora::Shape {
        lora_rank: 2,
        lora_alpha: 3.0,
        targets: TARGETS.map(str::to_owned).to_vec(),
    };
    lora::attach(&mut unet, &shape, |_, values| values.fill(0.5)).expect("the targets exist");
    let values = numbers.iter().filter_map(|(name, value)| {
        Some((
            name.strip_prefix("lora.")?.to_owned(),
            value.shallow_clone(),
        ))
    });
    let values: Parameters = values.collect();
    assert_eq!(
        values.len(),
        lora::parameters(&unet).len(),
        "the same modules have adapters"
    );
    lora::set_parameters(&unet, &values);
    unet
}

#[test]
fn adapters_predict_and_learn_as_the_reference_does() {
    for name in ["sd15", "sdxl"] {
        let numbers = read(&format!("{name}/adapted.safetensors"));
        let unet = adapted(name, &numbers);
        let prediction = unet.predict(
            &numbers["unet.z"],
            &times(&numbers),
            &conditioning(&numbers),
        );
        let wanted = &numbers["lora_prediction"];
        assert_close("prediction", &prediction, wanted, 1e-5);
        prediction.square().mean(Kind::Float).backward();
        let mut squares = 0.0;
        for (path, tensor) in lora::parameters(&unet) {
            let gradient = tensor.grad();
            squares += gradient.square().sum(Kind::Double).double_value(&[]);
            if path == "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight" {
                let wanted = &numbers["lora_gradient"];
                assert_close("gradient", &gradient, wanted, 1e-4);
            }
        }
        let wanted = numbers["lora_gradient_norm"].double_value(&[]);
        assert!(
            (squares.sqrt() / wanted - 1.0).abs() < 1e-4,
            "{} {wanted}",
            squares.sqrt()
        );
        assert!(
            unet.parameters()
                .iter()
                .all(|(_, tensor)| !tensor.grad().defined()),
            "the base is frozen"
        );
    }
}

#[test]
fn new_adapters_change_nothing_and_merged_ones_change_nothing_more() {
    let numbers = read("sdxl/adapted.safetensors");
    let predict = |unet: &Unet| {
        tch::no_grad(|| {
            unet.predict(
                &numbers["unet.z"],
                &times(&numbers),
                &conditioning(&numbers),
            )
        })
    };
    let base = predict(&load_unet(&folder("sdxl").unet, Kind::Float));
    let mut unet = adapted("sdxl", &numbers);
    let with = predict(&unet);
    assert!((&with - &base).abs().max().double_value(&[]) > 0.01);
    lora::switch(&unet, false);
    assert_close("switched off", &predict(&unet), &base, 0.0);
    lora::switch(&unet, true);
    lora::merge(&mut unet);
    assert!(lora::parameters(&unet).is_empty());
    assert_close("merged", &predict(&unet), &with, 1e-5);
    let shape = lora::Shape {
        lora_rank: 4,
        lora_alpha: 4.0,
        targets: vec!["to_q".to_owned()],
    };
    let mut fresh = load_unet(&folder("sdxl").unet, Kind::Float);
    lora::attach(&mut fresh, &shape, |_, values| values.fill(0.5)).expect("the target exists");
    assert_close("fresh", &predict(&fresh), &base, 0.0);
}

#[test]
fn a_duplicate_shares_nothing_and_in_place_changes_reach_the_network() {
    let numbers = read("sd15/expected.safetensors");
    let unet = load_unet(&folder("sd15").unet, Kind::Float);
    let copy = unet.duplicate(Kind::Float, Device::Cpu);
    copy.set_trainable(true);
    check_unet(&copy, &numbers, 1e-5);
    tch::no_grad(|| {
        for (_, mut tensor) in copy.parameters() {
            let _ = tensor.zero_();
        }
    });
    let z = &numbers["unet.z"];
    let silent = copy.predict(z, &times(&numbers), &conditioning(&numbers));
    assert_eq!(silent.abs().max().double_value(&[]), 0.0);
    assert!(silent.requires_grad());
    check_unet(&unet, &numbers, 1e-5);
}

#[test]
fn masters_in_f32_compute_in_bf16_and_get_gradients_in_f32() {
    let numbers = read("sd15/expected.safetensors");
    let component = folder("sd15").unet;
    let parameters =
        weights::load(&component.weights, Kind::Float, Device::Cpu).expect("the fixture is sound");
    let unet = Unet::new(component.config, parameters, Kind::BFloat16);
    unet.set_trainable(true);
    check_unet(&unet, &numbers, 2e-2);
    let prediction = unet.predict(
        &numbers["unet.z"],
        &times(&numbers),
        &conditioning(&numbers),
    );
    prediction.square().mean(Kind::Float).backward();
    assert!(
        unet.parameters()
            .iter()
            .all(|(_, tensor)| tensor.grad().kind() == Kind::Float)
    );
}

#[test]
fn what_is_written_is_read_again_and_laid_out_as_the_reference_lays_it_out() {
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let unet = load_unet(&self::folder("sd15").unet, Kind::Half);
    let written = weights::to_safetensors(&unet.parameters(), &metadata).expect("it is written");
    let reference = fixtures().join("sd15/unet/diffusion_pytorch_model.safetensors");
    assert_eq!(written, std::fs::read(reference).expect("readable"));
}

#[test]
fn adapters_are_written_in_the_universal_form_with_alpha_folded_in() {
    let numbers = read("sdxl/adapted.safetensors");
    let unet = adapted("sdxl", &numbers);
    let tensors: Parameters = lora::universal_tensors(&unet, Kind::Float)
        .into_iter()
        .collect();
    assert_eq!(tensors.len(), 3 * lora::parameters(&unet).len() / 2);
    let path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0";
    let stem = lora::universal_key(path);
    assert_eq!(
        stem,
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    );
    assert_eq!(tensors[&format!("{stem}.alpha")].double_value(&[]), 2.0);
    let up = &numbers[&format!("lora.{path}.lora_B.weight")] * 1.5;
    assert_close("up", &tensors[&format!("{stem}.lora_up.weight")], &up, 1e-7);
}
