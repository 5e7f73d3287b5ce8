//! Broken teacher folders: each is refused with an error that names the file and what is at fault in it.

use std::fs;
use std::path::{Path, PathBuf};

use distillery_common::teacher::scorer::Rules;
use distillery_common::teacher::{Error, Folder};
use serde_json::{Value, json};

/// A sound pipeline, copied where it can be broken.
struct Broken {
    folder: tempfile::TempDir,
    variant: Option<&'static str>,
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("the fixture is there") {
        let entry = entry.expect("readable");
        let target = to.join(entry.file_name());
        match entry.file_type().expect("readable").is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).expect("copied")),
        }
    }
}

impl Broken {
    fn new(name: &str) -> Self {
        let fixtures =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/engine/tests/fixtures");
        let folder = tempfile::tempdir().expect("a folder");
        copy(&fixtures.join(name), folder.path());
        let broken = Self {
            folder,
            variant: (name == "sdxl").then_some("fp16"),
        };
        Folder::open(broken.folder.path(), broken.variant)
            .expect("it is sound before it is broken");
        broken
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Changes one key of a JSON file.
    fn set(self, file: &str, key: &str, value: Value) -> Self {
        self.edit(file, |json| json[key] = value)
    }

    fn edit(self, file: &str, change: impl FnOnce(&mut Value)) -> Self {
        let path = self.path(file);
        let mut json = serde_json::from_slice(&fs::read(&path).expect("readable")).expect("JSON");
        change(&mut json);
        fs::write(path, json.to_string()).expect("written");
        self
    }

    fn write(self, file: &str, bytes: &[u8]) -> Self {
        fs::write(self.path(file), bytes).expect("written");
        self
    }

    fn remove(self, file: &str) -> Self {
        fs::remove_file(self.path(file)).expect("removed");
        self
    }

    /// Rewrites the header and the tensors of a safetensors file.
    fn weights(self, file: &str, change: impl FnOnce(&mut Value, &mut Vec<u8>)) -> Self {
        let path = self.path(file);
        let bytes = fs::read(&path).expect("readable");
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
        let mut data = bytes[8 + length..].to_vec();
        change(&mut header, &mut data);
        let header = header.to_string();
        let whole = [
            &(header.len() as u64).to_le_bytes(),
            header.as_bytes(),
            &data,
        ]
        .concat();
        fs::write(path, whole).expect("written");
        self
    }

    /// Asserts that the folder is refused in words that contain all of `parts`.
    #[track_caller]
    fn check(self, parts: &[&str]) {
        self.refused(Folder::open(self.folder.path(), self.variant), parts);
    }

    #[track_caller]
    fn refused<T: std::fmt::Debug>(&self, outcome: Result<T, Error>, parts: &[&str]) {
        let error = outcome.expect_err("it is broken");
        let mut text = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            text = format!("{text}: {source}");
        }
        for part in parts {
            assert!(text.contains(part), "{text:?} does not say {part:?}");
        }
        assert!(text.len() < 1000, "{text}");
    }
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const UNET_CONFIG: &str = "unet/config.json";
const INDEX: &str = "unet/diffusion_pytorch_model.safetensors.index.json";

/// Takes a tensor out of a safetensors file and closes the gap.
fn cut(name: &'static str) -> impl FnOnce(&mut Value, &mut Vec<u8>) {
    move |header, data| {
        let entry = header
            .as_object_mut()
            .expect("an object")
            .shift_remove(name)
            .expect("it is there");
        let at = |index: usize| entry["data_offsets"][index].as_u64().expect("an offset");
        let (begin, end) = (at(0), at(1));
        data.drain(begin as usize..end as usize);
        for (_, other) in header
            .as_object_mut()
            .expect("an object")
            .iter_mut()
            .filter(|(name, _)| *name != "__metadata__")
        {
            if other["data_offsets"][0].as_u64().expect("an offset") >= end {
                for index in 0..2 {
                    let offset = other["data_offsets"][index].as_u64().expect("an offset");
                    other["data_offsets"][index] = json!(offset - (end - begin));
                }
            }
        }
    }
}

/// Adds a tensor of `bytes` zeros at the end.
fn add(
    name: &'static str,
    dtype: &'static str,
    shape: Value,
    bytes: usize,
) -> impl FnOnce(&mut Value, &mut Vec<u8>) {
    move |header, data| {
        header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), data.len() + bytes]});
        data.resize(data.len() + bytes, 0);
    }
}

#[test]
fn a_missing_index_of_the_pipeline() {
    Broken::new("sd15")
        .remove("model_index.json")
        .check(&["model_index.json", "cannot read"]);
}

#[test]
fn a_configuration_that_is_missing() {
    Broken::new("sd15")
        .remove(UNET_CONFIG)
        .check(&[UNET_CONFIG, "cannot read"]);
}

#[test]
fn a_configuration_that_is_not_json() {
    Broken::new("sd15")
        .write("vae/config.json", b"block_out_channels: [8]")
        .check(&["vae/config.json", "not valid JSON", "line 1"]);
    Broken::new("sd15")
        .write("vae/config.json", b"[1, 2]")
        .check(&["vae/config.json", "JSON object"]);
}

#[test]
fn another_kind_of_pipeline() {
    Broken::new("sd15")
        .set("model_index.json", "_class_name", json!("FluxPipeline"))
        .check(&["model_index.json", "_class_name", "FluxPipeline"]);
}

#[test]
fn another_kind_of_denoiser() {
    Broken::new("sd15")
        .set(
            "model_index.json",
            "unet",
            json!(["diffusers", "UNet3DConditionModel"]),
        )
        .check(&["model_index.json", "unet", "UNet3DConditionModel"]);
    Broken::new("sd15")
        .set(UNET_CONFIG, "_class_name", json!("UNet2DModel"))
        .check(&[UNET_CONFIG, "_class_name", "UNet2DModel"]);
}

#[test]
fn configuration_values_that_would_change_the_arithmetic() {
    for (key, value) in [
        ("class_embed_type", json!("timestep")),
        ("act_fn", json!("gelu")),
        ("dual_cross_attention", json!(true)),
        ("encoder_hid_dim", json!(64)),
        ("resnet_time_scale_shift", json!("scale_shift")),
        ("mid_block_type", json!(null)),
        ("only_cross_attention", json!([true, false, false])),
        (
            "down_block_types",
            json!(["AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]),
        ),
        ("time_embedding_type", json!("fourier")),
    ] {
        Broken::new("sd15")
            .set(UNET_CONFIG, key, value)
            .check(&[UNET_CONFIG, key, "supported"]);
    }
}

#[test]
fn absurd_configuration_values() {
    for (key, value) in [
        ("block_out_channels", json!([4, -8, 8])),
        ("block_out_channels", json!([])),
        ("layers_per_block", json!(1u64 << 60)),
        ("norm_num_groups", json!(3)),
        ("attention_head_dim", json!("two")),
        ("cross_attention_dim", json!(0)),
    ] {
        Broken::new("sd15")
            .set(UNET_CONFIG, key, value)
            .check(&[UNET_CONFIG, key]);
    }
}

/// A few digits used to ask for gigabytes of tensor names; found by fuzzing.
#[test]
fn more_layers_than_anybody_has() {
    for (file, key, most) in [
        (UNET_CONFIG, "layers_per_block", 16),
        (UNET_CONFIG, "transformer_layers_per_block", 32),
        ("vae/config.json", "layers_per_block", 16),
        ("text_encoder/config.json", "num_hidden_layers", 128),
    ] {
        Broken::new("sd15").set(file, key, json!(1 << 20)).check(&[
            file,
            key,
            "is 1048576",
            &format!("at most {most} layers"),
        ]);
    }
}

#[test]
fn a_file_that_is_cut_short() {
    let broken = Broken::new("sd15");
    let bytes = fs::read(broken.path(UNET)).expect("readable");
    broken
        .write(UNET, &bytes[..bytes.len() - 100])
        .check(&[UNET, "cut short"]);
    Broken::new("sd15")
        .write(UNET, &bytes[..500])
        .check(&[UNET, "cut short"]);
    Broken::new("sd15")
        .write(UNET, &bytes[..5])
        .check(&[UNET, "5 bytes"]);
}

#[test]
fn a_file_with_more_than_its_tensors() {
    Broken::new("sd15")
        .weights(UNET, |_, data| data.extend([0; 16]))
        .check(&[UNET, "tensors end at"]);
}

#[test]
fn an_absurd_header_size() {
    let mut bytes = (1u64 << 60).to_le_bytes().to_vec();
    bytes.resize(4096, 0);
    Broken::new("sd15")
        .write(UNET, &bytes)
        .check(&[UNET, "1152921504606846976"]);
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    Broken::new("sd15")
        .write(UNET, &bytes)
        .check(&[UNET, "18446744073709551615"]);
}

#[test]
fn a_header_that_is_no_json() {
    let bytes = [
        &16u64.to_le_bytes()[..],
        b"\x80\x02}q\x00(X\x06\x00\x00\x00epoch",
    ]
    .concat();
    Broken::new("sd15")
        .write(UNET, &bytes)
        .check(&[UNET, "not valid JSON"]);
}

#[test]
fn a_missing_tensor() {
    Broken::new("sd15")
        .weights(UNET, cut("mid_block.resnets.1.conv2.bias"))
        .check(&[UNET, "mid_block.resnets.1.conv2.bias", "missing"]);
    let text = "text_encoder/model.safetensors";
    Broken::new("sd15")
        .weights(text, |header, data| {
            let prefixed = header
                .as_object()
                .expect("an object")
                .contains_key("text_model.final_layer_norm.bias");
            match prefixed {
                true => cut("text_model.final_layer_norm.bias")(header, data),
                false => cut("final_layer_norm.bias")(header, data),
            }
        })
        .check(&[text, "final_layer_norm.bias", "missing"]);
}

#[test]
fn a_tensor_too_many() {
    Broken::new("sd15")
        .weights(
            UNET,
            add("class_embedding.weight", "F16", json!([2, 3]), 12),
        )
        .check(&[UNET, "class_embedding.weight", "unexpected"]);
}

#[test]
fn a_tensor_of_another_shape() {
    Broken::new("sd15")
        .weights(UNET, |header, _| {
            header["conv_in.weight"]["shape"] = json!([4, 4, 9])
        })
        .check(&[UNET, "conv_in.weight", "[4, 4, 9]", "[4, 4, 3, 3]"]);
}

#[test]
fn a_tensor_whose_shape_overflows() {
    Broken::new("sd15")
        .weights(UNET, |header, _| {
            header["conv_in.weight"]["shape"] = json!([i64::MAX, i64::MAX, 4])
        })
        .check(&[UNET, "conv_in.weight", "absurd"]);
    Broken::new("sd15")
        .weights(UNET, |header, _| {
            header["conv_in.weight"]["shape"] = json!([-4, -4, 3, 3])
        })
        .check(&[UNET, "conv_in.weight", "absurd"]);
}

#[test]
fn tensors_that_overlap() {
    Broken::new("sd15")
        .weights(UNET, |header, _| {
            header["conv_in.bias"]["data_offsets"] = json!([2, 10])
        })
        .check(&[UNET, "starts at byte"]);
}

#[test]
fn a_tensor_of_another_number_format() {
    Broken::new("sd15")
        .weights(UNET, |header, _| {
            header["conv_in.bias"]["dtype"] = json!("F8_E4M3")
        })
        .check(&[UNET, "conv_in.bias", "F8_E4M3", "supported"]);
    Broken::new("sd15")
        .weights(UNET, |header, _| {
            header["conv_in.bias"]["dtype"] = json!("I64");
            header["conv_in.bias"]["shape"] = json!([1]);
        })
        .check(&[UNET, "conv_in.bias", "I64", "supported"]);
}

#[test]
fn an_index_that_names_files_elsewhere() {
    for file in [
        "../vae/diffusion_pytorch_model.safetensors",
        "/etc/passwd",
        "a\\b.safetensors",
        ".hidden.safetensors",
        "shard.bin",
    ] {
        Broken::new("sdxl")
            .edit(INDEX, |json| {
                json["weight_map"]["conv_in.weight"] = json!(file)
            })
            .check(&[INDEX, "conv_in.weight", "plain name"]);
    }
}

#[test]
fn an_index_that_is_wrong() {
    Broken::new("sdxl")
        .set(INDEX, "weight_map", json!([]))
        .check(&[INDEX, "weight_map"]);
    Broken::new("sdxl")
        .set(INDEX, "weight_map", json!({}))
        .check(&[INDEX, "weight_map", "0 files"]);
    Broken::new("sdxl")
        .edit(INDEX, |json| {
            json["weight_map"]["conv_in.weight"] =
                json!("diffusion_pytorch_model-00009-of-00009.safetensors")
        })
        .check(&["conv_in.weight", "index says", "00009-of-00009"]);
}

#[test]
fn a_missing_shard() {
    let broken = Broken::new("sdxl");
    let mut shards: Vec<_> = fs::read_dir(broken.path("unet"))
        .expect("readable")
        .map(|entry| {
            entry
                .expect("readable")
                .file_name()
                .into_string()
                .expect("plain")
        })
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    shards.sort();
    let last = shards.pop().expect("there are shards");
    broken
        .remove(&format!("unet/{last}"))
        .check(&[&last, "cannot read"]);
}

#[test]
fn a_guidance_embedding_that_only_the_weights_have() {
    Broken::new("sd15")
        .weights(
            UNET,
            add("time_embedding.cond_proj.weight", "F16", json!([4, 8]), 64),
        )
        .check(&[UNET, "time_embedding.cond_proj.weight", "unexpected"]);
}

#[test]
fn a_guidance_embedding_that_only_the_configuration_has() {
    Broken::new("sd15")
        .set(UNET_CONFIG, "time_cond_proj_dim", json!(256))
        .check(&[UNET, "time_embedding.cond_proj.weight", "missing"]);
}

#[test]
fn weights_that_could_run_code() {
    Broken::new("sd15")
        .remove(UNET)
        .write("unet/diffusion_pytorch_model.bin", b"\x80\x02")
        .check(&["diffusion_pytorch_model.bin", "pickle", "safetensors"]);
}

#[test]
fn weights_that_are_missing() {
    Broken::new("sd15")
        .remove(UNET)
        .check(&["unet", "has no diffusion_pytorch_model.safetensors"]);
}

#[test]
fn parts_that_do_not_fit_each_other() {
    Broken::new("sdxl")
        .set(
            "model_index.json",
            "_class_name",
            json!("StableDiffusionPipeline"),
        )
        .check(&[UNET_CONFIG, "cross_attention_dim", "32", "16"]);
    Broken::new("sd15")
        .set("text_encoder/config.json", "hidden_size", json!(32))
        .check(&["text_encoder/model.safetensors", "shape"]);
}

#[test]
fn a_tokenizer_that_is_missing() {
    Broken::new("sdxl")
        .remove("tokenizer_2/merges.txt")
        .check(&["tokenizer_2", "tokenizer.json", "merges.txt"]);
}

/// The tables of a tokenizer were once read by the engine alone, in the middle of a run.
#[test]
fn a_tokenizer_whose_tables_cannot_be_read() {
    let whole = "tokenizer/tokenizer.json";
    Broken::new("sd15")
        .write(whole, b"{\"model\": ")
        .check(&[whole, "not valid JSON"]);
    Broken::new("sd15")
        .edit(whole, |json| json["model"]["type"] = json!("WordPiece"))
        .check(&[whole, "not CLIP's"]);
    Broken::new("sd15")
        .edit(whole, |json| json["model"]["merges"][3] = json!("cat"))
        .check(&[whole, "\"cat\"", "no pair"]);
    let vocabulary = "tokenizer_2/vocab.json";
    Broken::new("sdxl")
        .write(vocabulary, b"<html>")
        .check(&[vocabulary, "not valid JSON"]);
    Broken::new("sdxl")
        .set(vocabulary, "the</w>", json!("twelve"))
        .check(&[vocabulary, "the</w>", "no whole number"]);
    let merges = "tokenizer_2/merges.txt";
    Broken::new("sdxl")
        .write(merges, b"#version: 0.2\nt h\nquick\n")
        .check(&[merges, "\"quick\"", "no pair"]);
    Broken::new("sdxl")
        .write(merges, b"\xff\xfe\n")
        .check(&[merges, "UTF-8"]);
}

#[test]
fn a_tokenizer_that_does_not_fit_its_encoder() {
    Broken::new("sdxl")
        .edit("tokenizer/vocab.json", |json| {
            let map = json.as_object_mut().expect("an object");
            map.shift_remove("<|endoftext|>").expect("it is there");
        })
        .check(&["tokenizer", "end token", "<|endoftext|>"]);
    Broken::new("sdxl")
        .set("tokenizer/vocab.json", "the</w>", json!(533))
        .check(&["tokenizer", "the</w>", "533"]);
    Broken::new("sdxl")
        .set(
            "tokenizer/tokenizer_config.json",
            "model_max_length",
            json!(1),
        )
        .check(&["tokenizer", "model_max_length"]);
}

#[test]
fn a_scorer_that_is_none() {
    let file = "scorer/scorer.json";
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/teachers/scenes");
    Rules::open(&bundled).expect("the bundled scorer is one");
    let broken = Broken::new("sd15");
    let refused = |parts: &[&str]| broken.refused(Rules::open(broken.folder.path()), parts);
    refused(&[file, "cannot read"]);
    fs::create_dir(broken.path("scorer")).expect("made");
    for (text, problem) in [
        ("{", "not readable"),
        (r#"{"format": "another", "version": 1}"#, "another"),
        (
            r#"{"format": "distillery-scene-scorer", "version": 1}"#,
            "not readable",
        ),
    ] {
        fs::write(broken.path(file), text).expect("written");
        refused(&[file, "prompt_adherence", problem]);
    }
    Folder::open(broken.folder.path(), None).expect("who does not ask for it may go on");
}

#[test]
fn adapter_targets_that_name_nothing() {
    let sound = Broken::new("sd15");
    let folder = Folder::open(sound.folder.path(), None).expect("sound");
    let targets = |names: &[&str]| -> Vec<String> { names.iter().map(|&n| n.to_owned()).collect() };
    let known = targets(&["to_q", "to_out.0", "ff.net.2", "conv_shortcut"]);
    folder.check_targets(&known).expect("all of them are there");
    let unknown = folder.check_targets(&targets(&["to_q", "q_proj"]));
    sound.refused(
        unknown,
        &["unet", "\"q_proj\"", "student.targets", "to_q", "conv1"],
    );
}

#[test]
fn schedules_that_cannot_be() {
    let file = "scheduler/scheduler_config.json";
    for (key, value) in [
        ("beta_schedule", json!("exponential")),
        ("prediction_type", json!("flow_prediction")),
        ("beta_start", json!(-0.1)),
        ("beta_end", json!(2)),
        ("trained_betas", json!([0.1, 0.2])),
        ("num_train_timesteps", json!(0)),
        ("_class_name", json!("FlowMatchEulerDiscreteScheduler")),
    ] {
        Broken::new("sd15")
            .set(file, key, value)
            .check(&[file, key]);
    }
}

/// Everything is laid out for 1000 times; a teacher of 500 was once computed as if it had them.
#[test]
fn a_schedule_of_another_number_of_training_times() {
    let file = "scheduler/scheduler_config.json";
    for count in [500, 4000] {
        Broken::new("sd15")
            .set(file, "num_train_timesteps", json!(count))
            .check(&[file, "num_train_timesteps", &count.to_string(), "1000"]);
    }
}

#[test]
fn epsilon_where_nothing_of_the_data_is_left() {
    let file = "scheduler/scheduler_config.json";
    let broken = Broken::new("sd15").set(file, "rescale_betas_zero_snr", json!(true));
    let sound = Broken::new("sd15")
        .set(file, "rescale_betas_zero_snr", json!(true))
        .set(file, "prediction_type", json!("v_prediction"));
    broken.check(&[file, "rescale_betas_zero_snr", "epsilon", "v_prediction"]);
    Folder::open(sound.folder.path(), None).expect("v says enough");
}

#[test]
fn ids_of_special_tokens_that_the_encoder_has_not() {
    let file = "text_encoder/config.json";
    for key in ["eos_token_id", "bos_token_id"] {
        for id in [533, -1] {
            Broken::new("sd15").set(file, key, json!(id)).check(&[
                file,
                key,
                &id.to_string(),
                "533",
            ]);
        }
    }
}

#[test]
fn a_text_encoder_of_another_kind() {
    let file = "text_encoder/config.json";
    Broken::new("sd15")
        .set(file, "hidden_act", json!("relu"))
        .check(&[file, "hidden_act", "relu"]);
    Broken::new("sd15")
        .set(
            "model_index.json",
            "text_encoder",
            json!(["transformers", "T5EncoderModel"]),
        )
        .check(&["model_index.json", "text_encoder", "T5EncoderModel"]);
}

#[test]
fn old_names_and_missing_variants_are_not_faults() {
    let old =
        Broken::new("sd15").weights("vae/diffusion_pytorch_model.safetensors", |header, _| {
            let map = header.as_object_mut().expect("an object");
            for (old, new) in [
                ("query", "to_q"),
                ("key", "to_k"),
                ("value", "to_v"),
                ("proj_attn", "to_out.0"),
            ] {
                for half in ["encoder", "decoder"] {
                    for kind in ["weight", "bias"] {
                        let entry = map
                            .shift_remove(&format!("{half}.mid_block.attentions.0.{new}.{kind}"))
                            .expect("it is there");
                        map.insert(format!("{half}.mid_block.attentions.0.{old}.{kind}"), entry);
                    }
                }
            }
        });
    Folder::open(old.folder.path(), None).expect("old names are read");
    let folder = Folder::open(old.folder.path(), Some("fp16")).expect("plain weights stand in");
    assert_eq!(folder.warnings.len(), 3, "{:?}", folder.warnings);
    let ids = Broken::new("sd15").weights(
        "text_encoder/model.safetensors",
        add(
            "text_model.embeddings.position_ids",
            "I64",
            json!([1, 2]),
            16,
        ),
    );
    Folder::open(ids.folder.path(), None).expect("position ids are ignored");
}

#[test]
fn links_that_lead_out_of_the_folder() {
    use std::os::unix::fs::symlink;
    let elsewhere = tempfile::tempdir().expect("a folder");
    let secret = elsewhere.path().join("credentials");
    fs::write(&secret, "key=1").expect("written");
    let says = [
        "tokenizer.json is a link that leads out",
        "put the file itself",
    ];
    let broken = Broken::new("sd15").remove("tokenizer/tokenizer.json");
    symlink(&secret, broken.path("tokenizer/tokenizer.json")).expect("linked");
    broken.check(&says);

    let broken = Broken::new("sd15");
    let vae = broken.path("vae");
    fs::rename(&vae, elsewhere.path().join("vae")).expect("moved");
    symlink(elsewhere.path().join("vae"), &vae).expect("linked");
    broken.check(&["vae is a link that leads out"]);

    // A file that nothing reads may still be copied by whoever copies the folder.
    let broken = Broken::new("sd15");
    symlink("/etc/hostname", broken.path("unet/notes.txt")).expect("linked");
    broken.check(&["notes.txt is a link that leads out"]);
}

#[test]
fn the_links_of_a_download_cache_are_followed() {
    use std::os::unix::fs::symlink;
    let cache = tempfile::tempdir().expect("a folder");
    let snapshot = cache.path().join("snapshots/0123abc");
    let blobs = cache.path().join("blobs");
    fs::create_dir_all(&blobs).expect("a folder");
    let sound = Broken::new("sd15");
    copy(sound.folder.path(), &snapshot);
    for (file, blob) in [(UNET, "aa11"), ("tokenizer/tokenizer.json", "bb22")] {
        fs::rename(snapshot.join(file), blobs.join(blob)).expect("moved");
        symlink(format!("../../../blobs/{blob}"), snapshot.join(file)).expect("linked");
    }
    // The folder itself may be reached through a link, and link to itself.
    symlink("vae", snapshot.join("vae_1")).expect("linked");
    let link = cache.path().join("teacher");
    symlink(&snapshot, &link).expect("linked");
    Folder::open(&link, None).expect("a cache is sound");
}

#[test]
fn the_digest_of_a_folder_changes_with_any_file_that_is_read() {
    let broken = Broken::new("sdxl");
    let digest = |broken: &Broken| {
        Folder::open(broken.folder.path(), broken.variant)
            .expect("sound")
            .digest()
            .expect("readable")
    };
    let before = digest(&broken);
    assert_eq!(
        before,
        digest(&Broken::new("sdxl")),
        "the place does not matter"
    );
    let merges = fs::read(broken.path("tokenizer_2/merges.txt")).expect("readable");
    let broken = broken.write("tokenizer_2/merges.txt", &[&merges[..], b"z z\n"].concat());
    assert_ne!(before, digest(&broken));
}
