//! Activations that are computed again give the gradients of activations that are kept, bit for bit.

use std::collections::BTreeMap;
use std::path::Path;

use distillery_common::teacher::Folder;
use distillery_engine::diffusion::denoiser::Conditioning;
use distillery_engine::models::{Parameters, Unet, lora, weights};
use tch::{Device, Kind, Tensor};

fn fixtures() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures"))
}

fn read(name: &str) -> Parameters {
    weights::read_safetensors(&fixtures().join(name)).expect("a fixture")
}

/// What is trained.
#[derive(Debug, Clone, Copy)]
enum Trained {
    Everything,
    Adapters,
}

/// The UNet of fixture `name`, computing in `kind`, and its trainable tensors.
fn network(name: &str, kind: Kind, trained: Trained) -> (Unet, Vec<(String, Tensor)>) {
    let folder = Folder::open(&fixtures().join(name), Some("fp16")).expect("a sound fixture");
    let parameters = weights::load(&folder.unet.weights, kind, Device::Cpu).expect("it is sound");
    let mut unet = Unet::new(folder.unet.config, parameters, kind);
    match trained {
        Trained::Everything => {
            unet.set_trainable(true);
            let parameters = unet.parameters();
            (unet, parameters)
        }
        Trained::Adapters => {
            let shape = lora::Shape {
                lora_rank: 2,
                lora_alpha: 3.0,
                targets: TARGETS.map(str::to_owned).to_vec(),
            };
            lora::attach(&mut unet, &shape, |_, values| values.fill(0.5))
                .expect("the targets exist");
            let numbers = read(&format!("{name}/adapted.safetensors"));
            let values: BTreeMap<String, Tensor> = numbers
                .iter()
                .filter_map(|(name, value)| {
                    Some((
                        name.strip_prefix("lora.")?.to_owned(),
                        value.shallow_clone(),
                    ))
                })
                .collect();
            lora::set_parameters(&unet, &values);
            let parameters = lora::parameters(&unet);
            (unet, parameters)
        }
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

/// The prediction for the fixture's inputs, and the gradient of its mean square for each trainable tensor.
fn gradients(unet: &Unet, trainable: &[(String, Tensor)], numbers: &Parameters) -> Vec<Tensor> {
    let given = |key: &str| numbers.get(key).map(Tensor::shallow_clone);
    let conditioning = Conditioning {
        context: numbers["unet.context"].shallow_clone(),
        pooled: given("unet.pooled"),
        time_ids: given("unet.time_ids"),
    };
    let t = numbers["unet.t"].to_kind(Kind::Int64);
    let prediction = unet.forward(&numbers["unet.z"], &t, &conditioning, None);
    let loss = prediction.square().mean(Kind::Float);
    let tensors: Vec<&Tensor> = trainable.iter().map(|(_, tensor)| tensor).collect();
    let mut found = Tensor::run_backward(&[&loss], &tensors, false, false);
    found.push(prediction.detach());
    found
}

const CASES: [(Kind, Trained); 3] = [
    (Kind::Float, Trained::Everything),
    (Kind::Float, Trained::Adapters),
    (Kind::BFloat16, Trained::Adapters),
];

#[test]
fn gradients_with_and_without_recomputation_are_the_same_bits() {
    for name in ["sd15", "sdxl"] {
        for (kind, trained) in CASES {
            check(name, kind, trained);
        }
    }
}

fn check(name: &str, kind: Kind, trained: Trained) {
    let what = format!("{name} {kind:?} {trained:?}");
    let numbers = read(&format!("{name}/expected.safetensors"));
    let (mut unet, trainable) = network(name, kind, trained);
    let kept = gradients(&unet, &trainable, &numbers);
    unet.set_recompute(true);
    let again = gradients(&unet, &trainable, &numbers);
    let names = trainable.iter().map(|(name, _)| name.as_str());
    let names = names.chain(["the prediction"]);
    let mut reached = 0;
    for (name, (kept, again)) in names.zip(std::iter::zip(kept, again)) {
        assert_eq!(kept.defined(), again.defined(), "{what}: {name}");
        if kept.defined() {
            assert!(kept.equal(&again), "{what}: {name}");
            reached += usize::from(kept.abs().max().double_value(&[]) > 0.0);
        }
    }
    assert!(reached > trainable.len() / 2, "{what}: {reached} gradients");
}
