//! Where samples of a run are drawn: the teacher, the held-out prompts, their text states, and the blocks that
//! samples are drawn in.
//!
//! Work goes in aligned blocks of `evaluate.batch` samples, always full: what lies beyond the count is computed
//! and dropped, so that no bit of a sample depends on where a task ends.

use std::rc::Rc;

use distillery_common::commit::TaskCommit;
use distillery_common::prompts::{self, Prompt};
use distillery_common::recipe::{Dtype, Evaluate, Recipe};
use distillery_common::seed::Purpose;
use distillery_common::storage::FileEntry;
use distillery_common::storage::layout::{self, PromptList};
use distillery_common::task::{FailureClass, Lease};
use tch::{Device, Tensor};

use super::samples::{Drawer, LCM_ORIGINAL_STEPS, Noise, Texts, Way, text_of};
use super::{Fault, OrFault as _};
use crate::diffusion::denoiser::{Conditioning, Denoiser};
use crate::link::{CommitRequest, Committed};
use crate::workbench::{TeacherModel, Workbench};

/// Samples that are drawn together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// A full batch of ordinals.
    pub ordinals: Vec<u64>,
    /// How many of them count.
    pub count: u64,
}

impl Block {
    /// Block `index`; none beyond the last sample.
    pub fn new(evaluate: &Evaluate, index: u64) -> Option<Self> {
        let first = index.checked_mul(evaluate.batch)?;
        let count = evaluate
            .samples
            .checked_sub(first)
            .filter(|&left| left > 0)?
            .min(evaluate.batch);
        Some(Self {
            ordinals: (first..first + evaluate.batch).collect(),
            count,
        })
    }

    /// The blocks of task `index` of the stage `reference`, which has whole ones; none beyond the last sample.
    pub fn of_task(evaluate: &Evaluate, index: u64) -> Vec<Self> {
        let at_a_time = evaluate.reference_block() / evaluate.batch;
        let Some(first) = index.checked_mul(at_a_time) else {
            return vec![];
        };
        (first..first.saturating_add(at_a_time))
            .map_while(|at| Self::new(evaluate, at))
            .collect()
    }

    /// Tasks of the stage `reference`.
    pub fn tasks(evaluate: &Evaluate) -> u64 {
        evaluate.samples.div_ceil(evaluate.reference_block())
    }

    /// The rows of `[B, …]` that count.
    pub fn trim(&self, rows: &Tensor) -> Tensor {
        rows.narrow(0, 0, self.count as i64)
    }
}

/// What drawing samples of a run needs.
pub struct Studio {
    /// Whose schedule, texts and pictures these are.
    pub teacher: Rc<TeacherModel>,
    /// Texts that training never saw.
    pub holdout: Vec<Prompt>,
    /// Guidance scale of the teacher.
    pub guidance: f64,
    null: Conditioning,
    texts: Texts,
    seed: u64,
    device: Device,
    lcm_original_steps: u32,
}

impl Studio {
    /// Loads the teacher, computing in `dtype`, and the held-out prompts.
    pub fn open(bench: &mut Workbench, dtype: Dtype) -> Result<Self, Fault> {
        let teacher = bench.teacher(dtype)?;
        let holdout = read_prompts(bench, PromptList::Holdout)?.ok_or_else(|| {
            Fault::new(
                FailureClass::Schema,
                "the run has no list of held-out prompts",
            )
        })?;
        if holdout.is_empty() {
            return Err(Fault::config(
                "no prompt is held out: raise prompts.holdout, or name a file there",
            ));
        }
        let guidance = bench.recipe.teacher.guidance;
        let original_steps = lcm_original_steps(&bench.recipe);
        let studio = Self::over(
            teacher,
            guidance,
            original_steps,
            bench.recipe.seed,
            bench.device,
        );
        Ok(Self { holdout, ..studio })
    }

    /// A studio without prompts of its own.
    pub fn over(
        teacher: Rc<TeacherModel>,
        guidance: f64,
        lcm_original_steps: u32,
        seed: u64,
        device: Device,
    ) -> Self {
        Self {
            null: tch::no_grad(|| teacher.parts.null_conditioning(1)),
            teacher,
            holdout: vec![],
            guidance,
            texts: Texts::default(),
            seed,
            device,
            lcm_original_steps,
        }
    }

    /// The texts of a block's samples.
    pub fn captions(&self, block: &Block) -> Vec<String> {
        block
            .ordinals
            .iter()
            .map(|&o| text_of(&self.holdout, o).to_owned())
            .collect()
    }

    /// The text states of a block's samples.
    pub fn conditioning(&mut self, block: &Block) -> Conditioning {
        let captions = self.captions(block);
        let captions: Vec<&str> = captions.iter().map(String::as_str).collect();
        self.conditioning_of(&captions)
    }

    /// The text states of `texts`, one row each.
    pub fn conditioning_of(&mut self, texts: &[&str]) -> Conditioning {
        self.texts.encode(&self.teacher.parts, texts)
    }

    /// Final latents of a block, without the rows that only fill it.
    pub fn draw(
        &self,
        denoiser: &dyn Denoiser,
        guidance: f64,
        way: Way,
        purpose: Purpose,
        block: &Block,
        conditioning: &Conditioning,
    ) -> Result<Tensor, Fault> {
        let noise = Noise {
            purpose,
            ..self.noise(self.seed, &block.ordinals)
        };
        let drawn = self
            .drawer(denoiser, guidance)
            .draw(way, noise, conditioning)?;
        Ok(block.trim(&drawn))
    }

    /// Final latents `[1, C, H, W]` of one picture: the same for the same text, seed and way, wherever it is drawn.
    pub fn draw_one(
        &mut self,
        denoiser: &dyn Denoiser,
        guidance: f64,
        way: Way,
        text: &str,
        seed: u64,
    ) -> Result<Tensor, Fault> {
        let conditioning = self.conditioning_of(&[text]);
        let noise = self.noise(seed, &[0]);
        self.drawer(denoiser, guidance)
            .draw(way, noise, &conditioning)
    }

    /// Where tensors live.
    pub fn device(&self) -> Device {
        self.device
    }

    fn noise<'a>(&self, seed: u64, ordinals: &'a [u64]) -> Noise<'a> {
        Noise {
            seed,
            purpose: Purpose::EvaluationNoise,
            ordinals,
            shape: self.teacher.parts.latent_shape(),
            device: self.device,
        }
    }

    fn drawer<'a>(&'a self, denoiser: &'a dyn Denoiser, guidance: f64) -> Drawer<'a> {
        Drawer {
            denoiser,
            schedule: &self.teacher.schedule,
            prediction: self.teacher.prediction,
            guidance,
            null: &self.null,
            lcm_original_steps: self.lcm_original_steps,
        }
    }
}

/// `original_inference_steps` of students made by `recipe`: their time grid.
pub fn lcm_original_steps(recipe: &Recipe) -> u32 {
    recipe.trajectories.time_grid.unwrap_or(LCM_ORIGINAL_STEPS)
}

/// A list of prompts of the run; none where it has no such list.
pub fn read_prompts(bench: &Workbench, list: PromptList) -> Result<Option<Vec<Prompt>>, Fault> {
    let Some(bytes) = bench.io.wait(bench.store.find(&layout::prompts(list)))? else {
        return Ok(None);
    };
    prompts::from_parquet(&bytes)
        .or_fault(FailureClass::Schema)
        .map(Some)
}

/// The section that evaluation tasks work by.
pub fn evaluate_section(recipe: &Recipe) -> Result<Evaluate, Fault> {
    recipe
        .evaluate
        .clone()
        .ok_or_else(|| Fault::config("the recipe says evaluate: false, yet it is asked for"))
}

/// The request that makes a task's files count. They lie below the task's folder.
pub fn finished(
    bench: &Workbench,
    lease: &Lease,
    files: Vec<FileEntry>,
    ordinals: std::ops::Range<u64>,
    result: serde_json::Value,
) -> CommitRequest {
    let commit = TaskCommit {
        lease: lease.clone(),
        inputs: bench.record.recipe_digest,
        files,
        rows: ordinals.end - ordinals.start,
        schema: String::new(),
        ordinals,
        result,
        cost: Some(bench.meter.cost()),
    };
    CommitRequest {
        key: layout::commit(&layout::task(&lease.task.stage, lease.task.index)),
        bytes: commit.total_bytes(),
        rows: commit.rows,
        body: commit.to_bytes(),
        what: Committed::Task(lease.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_every_sample_once_and_are_always_full() {
        let evaluate = Evaluate {
            samples: 10,
            steps: vec![],
            teacher_steps: vec![],
            samplers: vec![],
            metrics: vec![],
            batch: 4,
        };
        assert_eq!(Block::tasks(&evaluate), 3);
        assert_eq!(
            Block::of_task(&evaluate, 1),
            [Block {
                ordinals: vec![4, 5, 6, 7],
                count: 4
            }]
        );
        let last = Block::new(&evaluate, 2).expect("the last block");
        assert_eq!((last.ordinals, last.count), (vec![8, 9, 10, 11], 2));
        let counts: u64 = (0..3)
            .filter_map(|i| Block::new(&evaluate, i))
            .map(|b| b.count)
            .sum();
        assert_eq!(counts, 10);
        assert_eq!(Block::new(&evaluate, 3), None);
        let many = Evaluate {
            samples: 200,
            ..evaluate
        };
        let tasks: Vec<Vec<Block>> = (0..Block::tasks(&many))
            .map(|i| Block::of_task(&many, i))
            .collect();
        let ordinals: Vec<u64> = tasks
            .iter()
            .flatten()
            .flat_map(|b| b.ordinals.clone())
            .collect();
        assert_eq!(ordinals, (0..200).collect::<Vec<u64>>());
        assert!(tasks.iter().all(|blocks| !blocks.is_empty()) && tasks.len() <= 16);
        let evaluate = many;
        assert_eq!(Block::new(&evaluate, u64::MAX), None);
    }
}
