//! Draws what students are compared with: the teacher's own samples, some whole blocks in one task.
//!
//! For each step count its guided DDIM from the noise that students also start from, and once more, at the
//! largest count, from noise of its own: the reference of the Fréchet distance, which must not share samples
//! with what it is compared to.

use std::collections::BTreeMap;

use bytes::Bytes;
use distillery_common::commit::TaskCommit;
use distillery_common::recipe::{Evaluate, Sampler};
use distillery_common::seed::Purpose;
use distillery_common::storage::layout;
use distillery_common::storage::{FileEntry, get_verified};
use distillery_common::task::{FailureClass, Lease};
use safetensors::SafeTensors;
use tch::{Device, Kind, Tensor};

use super::samples::Way;
use super::studio::{Block, Studio, evaluate_section, finished};
use super::{Fault, OrFault as _};
use crate::link::{CommitRequest, Event};
use crate::models::weights::to_safetensors;
use crate::workbench::Workbench;

/// Name of the stage in the plan.
const STAGE: &str = "reference";
/// The file of a task.
const FILE: &str = "latents.safetensors";
/// The tensor of the set with noise of its own.
pub const INDEPENDENT: &str = "independent";

/// The tensor of the teacher's samples with `steps` steps.
pub fn tensor_of(steps: u32) -> String {
    format!("ddim_{steps}")
}

/// The step count that others are compared with.
pub fn largest(evaluate: &Evaluate) -> Result<u32, Fault> {
    let steps = evaluate.teacher_steps.iter().max();
    steps
        .copied()
        .ok_or_else(|| Fault::config("evaluate.teacher_steps is empty"))
}

/// Draws the blocks that `lease` names, and gives the request that makes it count; none when the worker took the
/// lease back in between.
pub fn draw(bench: &mut Workbench, lease: &Lease) -> Result<Option<CommitRequest>, Fault> {
    let evaluate = evaluate_section(&bench.recipe)?;
    let blocks = Block::of_task(&evaluate, lease.task.index);
    let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else {
        return Err(Fault::config(format!(
            "task {} of {} reference samples does not exist",
            lease.task.index, evaluate.samples
        )));
    };
    let ordinals = first.ordinals[0]..last.ordinals[0] + last.count;
    let mut studio = Studio::open(bench, bench.recipe.teacher.dtype)?;
    let mut wanted: Vec<(String, u32, Purpose)> = evaluate
        .teacher_steps
        .iter()
        .map(|&steps| (tensor_of(steps), steps, Purpose::EvaluationNoise))
        .collect();
    wanted.push((
        INDEPENDENT.to_owned(),
        largest(&evaluate)?,
        Purpose::ReferenceNoise,
    ));
    let total = (wanted.len() * blocks.len()) as u64;
    let mut done = 0;
    let mut drawn: Vec<Vec<Tensor>> = wanted.iter().map(|_| Vec::new()).collect();
    for block in &blocks {
        let conditioning = studio.conditioning(block);
        for ((_, steps, purpose), drawn) in wanted.iter().zip(&mut drawn) {
            if bench.inbox.cancelled(lease) {
                return Ok(None);
            }
            let way = Way {
                sampler: Sampler::Ddim,
                steps: *steps,
            };
            let unet = &studio.teacher.parts.unet;
            let latents =
                studio.draw(unet, studio.guidance, way, *purpose, block, &conditioning)?;
            drawn.push(latents.to_kind(Kind::Float).to_device(Device::Cpu));
            done += 1;
            bench.link.send(Event::Progress {
                lease: lease.clone(),
                done,
                total,
            });
        }
    }
    let names = wanted.into_iter().map(|(name, ..)| name);
    let tensors: Vec<(String, Tensor)> = names
        .zip(&drawn)
        .map(|(name, blocks)| (name, Tensor::cat(blocks, 0)))
        .collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let file = Bytes::from(to_safetensors(&tensors, &metadata).or_fault(FailureClass::Unknown)?);
    let key = layout::task_file(&layout::task(STAGE, lease.task.index), lease, FILE);
    let files = vec![FileEntry::of(&key, &file)];
    bench.io.wait(bench.store.put(&key, file))?;
    Ok(Some(finished(
        bench,
        lease,
        files,
        ordinals,
        serde_json::Value::Null,
    )))
}

/// The latents of a committed task, by name, in f32 on the CPU.
pub fn read(bench: &Workbench, task: u64) -> Result<BTreeMap<String, Tensor>, Fault> {
    let folder = layout::task(STAGE, task);
    let commit = bench.io.wait(bench.store.get(&layout::commit(&folder)))?;
    let commit = TaskCommit::from_bytes(&folder, &commit).or_fault(FailureClass::Schema)?;
    let [file] = &commit.files[..] else {
        let found = commit.files.len();
        return Err(Fault::new(
            FailureClass::Schema,
            format!("task {task} of the reference has {found} files instead of one"),
        ));
    };
    let bytes = bench
        .io
        .wait(get_verified(&bench.store, file))
        .or_fault(FailureClass::Io)?;
    parse(&bytes).or_fault(FailureClass::Schema)
}

fn parse(bytes: &[u8]) -> anyhow::Result<BTreeMap<String, Tensor>> {
    let tensors = SafeTensors::deserialize(bytes)?;
    let tensor = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
        anyhow::ensure!(view.dtype() == safetensors::Dtype::F32, "{name} is not F32");
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        let tensor = Tensor::from_data_size(view.data(), &shape, Kind::Float);
        Ok((name.to_owned(), tensor.to_device(Device::Cpu)))
    };
    tensors.iter().map(tensor).collect()
}

/// The latents called `name` of a task that was read.
pub fn pick<'a>(task: &'a BTreeMap<String, Tensor>, name: &str) -> Result<&'a Tensor, Fault> {
    task.get(name).ok_or_else(|| {
        Fault::new(
            FailureClass::Schema,
            format!("the teacher's samples lack {name}; they were drawn for other steps"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latents_come_back_as_they_were_written() {
        let latents = Tensor::from_slice(&[0.5f32, -1.25, 3.0, 1e-7]).view([2, 1, 1, 2]);
        let file = to_safetensors(
            &[(tensor_of(50), latents.shallow_clone())],
            &BTreeMap::new(),
        );
        let read = parse(&file.expect("f32 is written")).expect("it is readable");
        assert!(pick(&read, "ddim_50").expect("it is there").equal(&latents));
        let fault = pick(&read, "ddim_25").expect_err("it is not there");
        assert!(fault.to_string().contains("ddim_25"), "{fault}");
        assert!(parse(b"not a file").is_err());
    }
}
