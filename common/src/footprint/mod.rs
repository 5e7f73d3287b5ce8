//! How much memory an engine needs: arithmetic from the teacher's shapes and the recipe alone, so that it is known before
//! any device is touched.
//!
//! What is predicted is the most that an engine holds at a time while it trains, after its first checkpoint. Left out are
//! the program itself with its libraries, and what an allocator loses between blocks. On a CPU device and host are one.

mod activations;

use crate::checkpoint::CHUNK_BYTES;
use crate::recipe::{self, Dtype, Recipe, StudentKind, TeacherStep};
use crate::teacher::{
    Folder, UnetConfig, adapter_modules, adapter_parameter_count, parameter_count, text_tensors,
    unet_tensors, vae_tensors,
};

use activations::{Pass, activations};

/// Chunks of a checkpoint that its upload holds at a time, at most: being hashed, on their way, and being filled.
const UPLOAD_CHUNKS: u64 = 10;
/// Bytes of an f32.
const F32: u64 = 4;

/// What is known of a teacher.
#[derive(Debug, Clone, PartialEq)]
pub struct Teacher {
    /// Its denoiser.
    pub unet: UnetConfig,
    /// Parameters of its text encoders.
    pub text_parameters: u64,
    /// Parameters of its autoencoder.
    pub vae_parameters: u64,
    /// Whether the autoencoder computes in f32 where the rest computes in f16.
    pub vae_upcast: bool,
    /// Tokens of a text.
    pub text_tokens: u64,
}

impl Teacher {
    /// The teacher in an opened folder.
    pub fn of(folder: &Folder) -> Self {
        let count = |shapes| parameter_count(&shapes).unsigned_abs();
        let texts = [Some(&folder.text), folder.text_2.as_ref()];
        let text = |text: &crate::teacher::TextComponent| count(text_tensors(&text.encoder.config));
        Self {
            unet: folder.unet.config.clone(),
            text_parameters: texts.into_iter().flatten().map(text).sum(),
            vae_parameters: count(vae_tensors(&folder.vae.config)),
            vae_upcast: folder.vae.config.force_upcast,
            text_tokens: folder.text.encoder.config.positions.unsigned_abs(),
        }
    }

    fn unet_parameters(&self) -> u64 {
        parameter_count(&unet_tensors(&self.unet)).unsigned_abs()
    }

    /// Bytes of all its networks, computing in `dtype`.
    fn networks(&self, dtype: Dtype) -> u64 {
        let number = bytes_of(dtype);
        let vae = match dtype {
            Dtype::F16 if self.vae_upcast => F32,
            Dtype::F16 | Dtype::Bf16 | Dtype::F32 => number,
        };
        (self.unet_parameters() + self.text_parameters) * number + self.vae_parameters * vae
    }
}

/// What training a stage takes of one engine, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// The teacher's networks, which are there whether its steps are online or stored: they encode the empty text, and
    /// adapters stand beside their weights.
    pub teacher: u64,
    /// The student's own frozen weights; 0 where it shares the teacher's, or has none.
    pub frozen: u64,
    /// The tensors that are trained, as the network has them.
    pub trained: u64,
    /// The same in f32.
    pub masters: u64,
    /// The gradient in f32.
    pub gradient: u64,
    /// AdamW's two moments, or this engine's share of them.
    pub moments: u64,
    /// The moving average, if one is kept.
    pub average: u64,
    /// The most that a forward and a backward pass hold at a time, gradients of single tensors included.
    pub activations: u64,
    /// The same if all activations were kept, and if they were computed again.
    pub kept_or_recomputed: [u64; 2],
    /// The copy of the state, or of a share of it, on the host that a checkpoint is written from, and what is on its way to the store.
    pub snapshot: u64,
}

impl Footprint {
    /// Bytes of the device.
    pub fn device(&self) -> u64 {
        let weights = self.teacher + self.frozen + self.trained;
        let state = self.masters + self.gradient + self.moments + self.average;
        weights + state + self.activations
    }

    /// Bytes of the host.
    pub fn host(&self) -> u64 {
        self.snapshot
    }
}

/// What `stage` takes of an engine that computes the largest share of a step: that of a group of the fewest members. A
/// share of the state is taken to be an even one; it may be larger by a tensor.
pub fn training(recipe: &Recipe, stage: &recipe::Stage, teacher: &Teacher) -> Footprint {
    let members = u64::from(recipe.cluster.min_workers.max(1));
    let share = stage.batch.global.div_ceil(members);
    let rows = stage.batch.micro.map_or(share, |micro| micro.min(share));
    let alone = of_pass(stage, recipe.teacher.dtype, teacher, rows);
    let state = alone.masters + alone.moments + alone.average;
    Footprint {
        moments: match stage.optimizer.sharded {
            true => alone.moments.div_ceil(members),
            false => alone.moments,
        },
        snapshot: match recipe.checkpoint.sharded {
            true => snapshot(state.div_ceil(members)),
            false => alone.snapshot,
        },
        ..alone
    }
}

/// A copy of so many bytes of state, and what of it is on its way to the store.
fn snapshot(state: u64) -> u64 {
    state + state.min(UPLOAD_CHUNKS * CHUNK_BYTES as u64)
}

/// What `stage` takes of an engine alone with `rows` in a forward pass, beside a teacher that computes in `teacher_dtype`.
pub fn of_pass(
    stage: &recipe::Stage,
    teacher_dtype: Dtype,
    teacher: &Teacher,
    rows: u64,
) -> Footprint {
    let number = bytes_of(stage.compute.dtype);
    let unet = teacher.unet_parameters();
    let (trainable, frozen, trained) = match &stage.student.kind {
        StudentKind::Full => (unet, 0, unet * number),
        StudentKind::Lora {
            lora_rank, targets, ..
        } => {
            let modules = adapter_modules(&unet_tensors(&teacher.unet), targets);
            let adapters = adapter_parameter_count(&modules, i64::from(*lora_rank)).unsigned_abs();
            let shares = teacher_dtype == stage.compute.dtype;
            let frozen = if shares { 0 } else { unet * number };
            (adapters, frozen, adapters * F32)
        }
    };
    let average = match stage.student.ema_decay {
        Some(_) => trainable * F32,
        None => 0,
    };
    let state = 3 * trainable * F32 + average;
    let kept_or_recomputed = [false, true].map(|recompute| {
        // The gradients of single tensors come while activations go.
        passes(stage, teacher, rows, recompute).max(trained)
    });
    Footprint {
        teacher: teacher.networks(teacher_dtype),
        frozen,
        trained,
        masters: trainable * F32,
        gradient: trainable * F32,
        moments: 2 * trainable * F32,
        average,
        activations: kept_or_recomputed[usize::from(stage.compute.recompute)],
        kept_or_recomputed,
        snapshot: snapshot(state),
    }
}

/// The most that a forward and a backward pass of `rows` hold at a time.
fn passes(stage: &recipe::Stage, teacher: &Teacher, rows: u64, recompute: bool) -> u64 {
    let shapes = unet_tensors(&teacher.unet);
    let (lora_rank, targets) = match &stage.student.kind {
        StudentKind::Full => (0, None),
        StudentKind::Lora {
            lora_rank, targets, ..
        } => (
            i64::from(*lora_rank),
            Some(adapter_modules(&shapes, targets)),
        ),
    };
    let trained = |path: &str| match &targets {
        Some(modules) => modules.contains_key(path),
        None => true,
    };
    let side = teacher.unet.sample_size;
    let found = activations(&Pass {
        config: &teacher.unet,
        side: [side; 2],
        rows: rows as i64,
        text: teacher.text_tokens as i64,
        number: bytes_of(stage.compute.dtype) as i64,
        lora_rank,
        trained: &trained,
    });
    // The target's pass, and an online teacher's over rows with and without their texts, are over before the one with
    // gradients begins.
    let before = match stage.teacher_step {
        TeacherStep::Online => 2 * found.without_gradients(),
        TeacherStep::Stored => found.without_gradients(),
    };
    let most = found.peak(recompute).max(before);
    most.unsigned_abs()
}

fn bytes_of(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F32 => F32,
        Dtype::F16 | Dtype::Bf16 => 2,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::recipe::parse;
    use crate::teacher::{Level, TextTime};

    /// SDXL as published, at its own resolution.
    fn sdxl() -> Teacher {
        use Level::{CrossAttention, Plain};
        Teacher {
            unet: UnetConfig {
                sample_size: 128,
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
            },
            text_parameters: 817_720_320,
            vae_parameters: 83_653_863,
            vae_upcast: true,
            text_tokens: 77,
        }
    }

    fn stage(sets: &[&str]) -> recipe::Stage {
        let text = "version: 1\nname: x\noutput: runs/x\nteacher: {model: t, dtype: bf16}\n\
                    prompts: {train: p.txt}\nstages: [{name: a, segments: 8, steps: 1}]\n\
                    compute: {dtype: bf16}\n";
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        let recipe = parse(text, "x.yaml", Path::new("/"), &sets);
        recipe.expect("a recipe").stages.remove(0)
    }

    fn taken(sets: &[&str], rows: u64) -> Footprint {
        of_pass(&stage(sets), Dtype::Bf16, &sdxl(), rows)
    }

    /// 2,567,463,684 weights; adapters of rank 64 beside the modules of the preset are 196,730,880 numbers at most.
    #[test]
    fn weights_and_state_are_counted_by_hand() {
        let adapters = taken(&[], 1);
        let networks = 2_567_463_684 + 817_720_320 + 83_653_863;
        assert_eq!(adapters.teacher, 2 * networks);
        assert_eq!(
            adapters.frozen, 0,
            "adapters stand beside the teacher's weights"
        );
        assert_eq!(adapters.trained, adapters.masters);
        assert_eq!(adapters.moments, 2 * adapters.masters);
        let full = taken(&["student={kind: full, ema: true}"], 1);
        assert_eq!(full.trained, 2 * 2_567_463_684);
        assert_eq!(
            full.masters + full.moments + full.average,
            16 * 2_567_463_684
        );
        let apart = taken(&["compute.dtype=f32"], 1);
        assert_eq!(apart.frozen, 4 * 2_567_463_684);
    }

    #[test]
    fn activations_grow_with_rows_and_shrink_by_recomputation() {
        let rows = |rows| taken(&["student={kind: full}"], rows).kept_or_recomputed;
        let ([kept, recomputed], [kept_twice, _]) = (rows(16), rows(32));
        assert!(
            kept_twice.abs_diff(2 * kept) < kept / 100,
            "{kept} {kept_twice}"
        );
        assert!(5 * recomputed < 2 * kept, "{kept} {recomputed}");
        let said = taken(&["student={kind: full}", "compute.recompute=true"], 16);
        assert_eq!(said.activations, recomputed);
    }

    #[test]
    fn what_a_group_shares_is_not_on_one_engine() {
        let text = "version: 1\nname: x\noutput: runs/x\nteacher: {model: t}\nprompts: {train: p.txt}\n\
                    stages: [{name: a, segments: 8, steps: 1}]\nbatch: {global: 16}\n\
                    cluster: {workers: {min: 4, max: 4}}\n";
        let recipe = parse(text, "x.yaml", Path::new("/"), &[]).expect("a recipe");
        let stage = &recipe.stages[0];
        let alone = of_pass(stage, recipe.teacher.dtype, &sdxl(), 4);
        assert_eq!(training(&recipe, stage, &sdxl()), alone);
        let shared: Vec<String> = ["checkpoint.sharded=true", "optimizer.sharded=true"]
            .map(str::to_owned)
            .to_vec();
        let recipe = parse(text, "x.yaml", Path::new("/"), &shared).expect("a recipe");
        let taken = training(&recipe, &recipe.stages[0], &sdxl());
        assert_eq!(taken.moments, alone.moments / 4);
        assert_eq!(taken.device(), alone.device() - 3 * alone.moments / 4);
        assert!(taken.snapshot < alone.snapshot);
    }
}
