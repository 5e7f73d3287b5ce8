//! Judges one model in one task: the teacher, the teacher under the students' samplers, or one student.
//!
//! Samples are drawn a block at a time and only what they measure up to is kept. Every model starts from the
//! same noise for the same held-out prompts, so differences between models are differences of pairs.

use std::collections::BTreeMap;
use std::ops::Range;

use distillery_common::figures::{Figure, TEACHER, UNDISTILLED, UNDISTILLED_GUIDED};
use distillery_common::recipe::{Evaluate, Metric, Sampler, Stage};
use distillery_common::seed::Purpose;
use distillery_common::task::{FailureClass, Lease};
use serde_json::json;
use tch::Tensor;

use super::finished_student::Found;
use super::preview;
use super::samples::{Way, name_of, pictures};
use super::student::Student;
use super::studio::{Block, Studio, evaluate_section, finished};
use super::{Fault, OrFault as _, reference};
use crate::diffusion::denoiser::{Conditioning, Denoiser};
use crate::evaluation::frechet::{MIN_SAMPLES, Reference, features};
use crate::evaluation::interval::Estimate;
use crate::evaluation::scorer::{self, Rules};
use crate::evaluation::tally::Tally;
use crate::link::{CommitRequest, Event};
use crate::workbench::Workbench;

/// Latents by name.
type Tensors = BTreeMap<String, Tensor>;

/// Judges the model that `lease` names, and gives the request that makes its figures count; none when the worker
/// took the lease back in between.
pub fn judge(bench: &mut Workbench, lease: &Lease) -> Result<Option<CommitRequest>, Fault> {
    let evaluate = evaluate_section(&bench.recipe)?;
    let subject = Subject::of(bench, lease.task.index)?;
    let dtype = subject
        .stage
        .as_ref()
        .map_or(bench.recipe.teacher.dtype, |s| s.compute.dtype);
    let studio = Studio::open(bench, dtype)?;
    let student = match &subject.stage {
        Some(stage) => {
            let found = Found::at(&bench.io, &bench.store, &stage.name, stage.steps)?;
            let (seed, device) = (bench.recipe.seed, bench.device);
            Some(found.load(&bench.io, &studio.teacher, stage, dtype, seed, device)?)
        }
        None => None,
    };
    let columns = subject.columns(&evaluate, studio.guidance);
    let mut session = Session {
        lease: lease.clone(),
        tallies: columns.iter().map(|_| Tally::default()).collect(),
        columns,
        rules: rules(bench, &evaluate)?,
        studio,
        student,
        evaluate,
    };
    if !session.draw_all(bench)? {
        return Ok(None);
    }
    let figures = session.figures(bench)?;
    let mut result = json!({"figures": figures});
    let mut files = vec![];
    if let (Some(stage), Some(student)) = (&subject.stage, &session.student) {
        let grid = preview::grid(
            bench,
            lease,
            &mut session.studio,
            &student.unet,
            &stage.name,
        )?;
        let Some(grid) = grid else { return Ok(None) };
        result["grid"] = grid.described;
        files.push(grid.file);
    }
    let samples = session.evaluate.samples;
    Ok(Some(finished(bench, lease, files, 0..samples, result)))
}

/// Whom a task judges: task 0 the teacher, 1 the teacher under the students' samplers, from 2 on the students in
/// the order of their stages.
struct Subject {
    index: u64,
    stage: Option<Stage>,
}

impl Subject {
    fn of(bench: &Workbench, index: u64) -> Result<Self, Fault> {
        let stage = match index.checked_sub(2) {
            None => None,
            Some(at) => {
                let stage = usize::try_from(at)
                    .ok()
                    .and_then(|at| bench.recipe.stages.get(at));
                let missing = || Fault::config(format!("there is no student {at} to evaluate"));
                Some(stage.ok_or_else(missing)?.clone())
            }
        };
        Ok(Self { index, stage })
    }

    fn columns(&self, evaluate: &Evaluate, guidance: f64) -> Vec<Column> {
        let under_samplers = |model: &str, guidance: f64| -> Vec<Column> {
            let pairs = evaluate.samplers.iter().flat_map(|&sampler| {
                evaluate
                    .steps
                    .iter()
                    .map(move |&steps| Way { sampler, steps })
            });
            pairs
                .map(|way| Column {
                    model: model.to_owned(),
                    way,
                    guidance,
                })
                .collect()
        };
        match (&self.stage, self.index) {
            (Some(stage), _) => under_samplers(&stage.name, 1.0),
            (None, 0) => evaluate
                .teacher_steps
                .iter()
                .map(|&steps| Column {
                    model: TEACHER.to_owned(),
                    way: Way {
                        sampler: Sampler::Ddim,
                        steps,
                    },
                    guidance,
                })
                .collect(),
            (None, _) if guidance == 1.0 => under_samplers(UNDISTILLED, 1.0),
            (None, _) => {
                let mut columns = under_samplers(UNDISTILLED, 1.0);
                columns.extend(under_samplers(UNDISTILLED_GUIDED, guidance));
                columns
            }
        }
    }
}

/// One model under one sampler with one number of steps.
struct Column {
    model: String,
    way: Way,
    guidance: f64,
}

/// An evaluation under way.
struct Session {
    lease: Lease,
    evaluate: Evaluate,
    studio: Studio,
    student: Option<Student>,
    rules: Option<Rules>,
    columns: Vec<Column>,
    tallies: Vec<Tally>,
}

impl Session {
    /// Draws and measures every block; false when the worker took the lease back.
    fn draw_all(&mut self, bench: &mut Workbench) -> Result<bool, Fault> {
        let target = reference::tensor_of(reference::largest(&self.evaluate)?);
        let total = self.evaluate.samples.div_ceil(self.evaluate.batch) * self.columns.len() as u64;
        let mut done = 0;
        for task in 0..Block::tasks(&self.evaluate) {
            let stored = reference::read(bench, task)?;
            let mut row = 0;
            for block in Block::of_task(&self.evaluate, task) {
                let own = row..row + block.count as i64;
                row = own.end;
                let stored = Stored {
                    tensors: rows(&stored, own)?,
                    target: target.clone(),
                };
                let captions = self.studio.captions(&block);
                let conditioning = self.studio.conditioning(&block);
                for at in 0..self.columns.len() {
                    if bench.inbox.cancelled(&self.lease) {
                        return Ok(false);
                    }
                    let latents = self.latents(at, &block, &stored, &conditioning)?;
                    self.measure(at, &latents, &stored, &captions)?;
                    done += 1;
                    bench.link.send(Event::Progress {
                        lease: self.lease.clone(),
                        done,
                        total,
                    });
                }
            }
        }
        Ok(true)
    }

    fn latents(
        &self,
        at: usize,
        block: &Block,
        stored: &Stored,
        conditioning: &Conditioning,
    ) -> Result<Tensor, Fault> {
        let Column {
            model,
            way,
            guidance,
        } = &self.columns[at];
        if model == TEACHER {
            let latents = reference::pick(&stored.tensors, &reference::tensor_of(way.steps))?;
            return Ok(latents.to_device(self.studio.device()));
        }
        let denoiser: &dyn Denoiser = match &self.student {
            Some(student) => &student.unet,
            None => &self.studio.teacher.parts.unet,
        };
        self.studio.draw(
            denoiser,
            *guidance,
            *way,
            Purpose::EvaluationNoise,
            block,
            conditioning,
        )
    }

    fn measure(
        &mut self,
        at: usize,
        latents: &Tensor,
        stored: &Stored,
        captions: &[String],
    ) -> Result<(), Fault> {
        let target = reference::pick(&stored.tensors, &stored.target)?;
        self.tallies[at].add_latents(&latents.to_device(tch::Device::Cpu), Some(target));
        let Some(rules) = &self.rules else {
            return Ok(());
        };
        for (picture, caption) in pictures(&self.studio.teacher, latents).iter().zip(captions) {
            let score = scorer::score(rules, caption, picture).or_fault(FailureClass::Config)?;
            self.tallies[at].add_score(score);
        }
        Ok(())
    }

    /// The figures of all columns, in the order of the recipe's metrics.
    fn figures(&self, bench: &Workbench) -> Result<Vec<Figure>, Fault> {
        let seed = bench.recipe.seed;
        let wants = |metric| self.evaluate.metrics.contains(&metric);
        let reference = if wants(Metric::LatentFrechet) {
            self.reference(bench)?
        } else {
            None
        };
        let mut figures = Vec::new();
        for (column, tally) in self.columns.iter().zip(&self.tallies) {
            let mut add = |metric: &str, estimate: Option<Estimate>, samples: u64| {
                figures.extend(estimate.map(|e| figure(column, metric, e, samples)));
            };
            if wants(Metric::PromptAdherence) {
                add("prompt_adherence", tally.adherence(seed), tally.scored());
            }
            if let Some(reference) = &reference {
                add("latent_frechet", tally.frechet(reference), tally.samples());
            }
            if wants(Metric::TeacherDistance) {
                add(
                    "teacher_distance",
                    tally.teacher_distance(seed),
                    tally.samples(),
                );
            }
        }
        Ok(figures)
    }

    /// The teacher's independent set; none when there are too few samples for a covariance.
    fn reference(&self, bench: &Workbench) -> Result<Option<Reference>, Fault> {
        if self.evaluate.samples < MIN_SAMPLES as u64 {
            return Ok(None);
        }
        let rows = (0..Block::tasks(&self.evaluate))
            .map(|task| {
                let stored = reference::read(bench, task)?;
                Ok(features(reference::pick(&stored, reference::INDEPENDENT)?))
            })
            .collect::<Result<Vec<_>, Fault>>()?;
        Ok(Some(Reference::new(&Tensor::cat(&rows, 0))))
    }
}

/// The teacher's samples of a block, and the name of those that others are compared with.
struct Stored {
    tensors: Tensors,
    target: String,
}

/// Rows `own` of every tensor.
fn rows(stored: &Tensors, own: Range<i64>) -> Result<Tensors, Fault> {
    let cut = |(name, tensor): (&String, &Tensor)| {
        let found = tensor.size()[0];
        if found < own.end {
            return Err(Fault::new(
                FailureClass::Schema,
                format!(
                    "the teacher's samples {name} have {found} rows, expected at least {}",
                    own.end
                ),
            ));
        }
        Ok((
            name.clone(),
            tensor.narrow(0, own.start, own.end - own.start),
        ))
    };
    stored.iter().map(cut).collect()
}

/// An unbounded interval says nothing, and JSON has no word for it.
fn figure(column: &Column, metric: &str, estimate: Estimate, samples: u64) -> Figure {
    let (low, high) = estimate.interval;
    Figure {
        model: column.model.clone(),
        steps: column.way.steps,
        sampler: name_of(column.way.sampler).to_owned(),
        metric: metric.to_owned(),
        value: estimate.value,
        interval: (low.is_finite() && high.is_finite()).then_some((low, high)),
        samples,
    }
}

/// The rules of the teacher's scorer, where adherence is asked for.
fn rules(bench: &Workbench, evaluate: &Evaluate) -> Result<Option<Rules>, Fault> {
    if !evaluate.metrics.contains(&Metric::PromptAdherence) {
        return Ok(None);
    }
    Rules::open(&bench.recipe.teacher.model)
        .or_fault(FailureClass::Config)
        .map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluate() -> Evaluate {
        Evaluate {
            samples: 8,
            steps: vec![1, 2],
            teacher_steps: vec![2, 50],
            samplers: vec![Sampler::Tlcm9, Sampler::Lcm],
            metrics: vec![Metric::TeacherDistance],
            batch: 4,
        }
    }

    fn columns(index: u64, guidance: f64) -> Vec<String> {
        let columns = Subject { index, stage: None }.columns(&evaluate(), guidance);
        let text = |c: &Column| {
            format!(
                "{} {} {} w{}",
                c.model,
                name_of(c.way.sampler),
                c.way.steps,
                c.guidance
            )
        };
        columns.iter().map(text).collect()
    }

    #[test]
    fn the_teacher_is_judged_under_its_own_solver() {
        assert_eq!(columns(0, 3.0), ["teacher ddim 2 w3", "teacher ddim 50 w3"]);
    }

    #[test]
    fn the_undistilled_teacher_is_judged_with_and_without_guidance() {
        let both = columns(1, 3.0);
        assert_eq!(both.len(), 8);
        assert_eq!(both[0], "undistilled tlcm9 1 w1");
        assert_eq!(both[7], "undistilled_guided lcm 2 w3");
        assert_eq!(
            columns(1, 1.0).len(),
            4,
            "without guidance both are the same"
        );
    }

    #[test]
    fn an_interval_that_says_nothing_is_none() {
        let column = Column {
            model: "seg2".into(),
            way: Way {
                sampler: Sampler::Tlcm9,
                steps: 2,
            },
            guidance: 1.0,
        };
        let open = Estimate {
            value: 1.5,
            interval: (0.0, f64::INFINITY),
        };
        assert_eq!(figure(&column, "latent_frechet", open, 3).interval, None);
        let closed = Estimate {
            value: 1.5,
            interval: (1.0, 2.0),
        };
        let figure = figure(&column, "latent_frechet", closed, 64);
        assert_eq!(figure.interval, Some((1.0, 2.0)));
        assert_eq!(
            (figure.steps, figure.sampler.as_str(), figure.samples),
            (2, "tlcm9", 64)
        );
    }
}
