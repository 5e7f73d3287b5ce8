//! Our side: the engine's own types, driven as its tasks drive them.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use distillery_common::recipe::{Batch, RateSchedule, Stage};
use distillery_common::telemetry::Stopwatch;
use distillery_engine::collective::solo::Solo;
use distillery_engine::diffusion::denoiser::Conditioning;
use distillery_engine::diffusion::guidance::Guided;
use distillery_engine::diffusion::prediction::heads;
use distillery_engine::diffusion::solver::ddim;
use distillery_engine::distill::{Objective, Rows, objective};
use distillery_engine::raw_tensor::keep_freed_memory;
use distillery_engine::task::student::Student;
use distillery_engine::train::{Notice, Plan, Trainer};
use distillery_engine::workbench::TeacherModel;
use serde_json::json;
use tch::{Device, Tensor};

use super::problem::{self, Numbers, Tensors, Work};

/// Answers requests on standard input until it ends; see `tests/python/bench_reference.py` for what is said.
pub(crate) fn answer(folder: &Path) -> Result<()> {
    let (numbers, tensors) = problem::read(folder)?;
    keep_freed_memory();
    tch::set_num_threads(numbers.threads);
    let mut side = Side {
        teacher: problem::load_teacher(&numbers)?,
        numbers,
        tensors,
        trainings: BTreeMap::new(),
    };
    for line in std::io::stdin().lines() {
        let line = line?;
        let (what, work) = line.split_once(' ').context("a request is two words")?;
        let reply = match what {
            "check" => json!({"values": side.check(work)?}),
            "measure" => json!({"seconds": side.measure(work)?}),
            _ => bail!("{what:?} is no request"),
        };
        println!("{reply}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

struct Side {
    numbers: Numbers,
    tensors: Tensors,
    teacher: TeacherModel,
    /// By the name of the work.
    trainings: BTreeMap<String, Training>,
}

impl Side {
    fn check(&mut self, work: &str) -> Result<Vec<f64>> {
        if work == Work::Guided.name() {
            let landed = self.guided();
            let square = landed.square().mean(landed.kind());
            return Ok(vec![square.double_value(&[])]);
        }
        // Adapters start from other random numbers here and there, and so only their first loss is the same.
        let steps = match work == Work::MlcmLora.name() {
            true => 1,
            false => 3,
        };
        let training = self.training(work)?;
        let mut values = vec![training.student.parameters().layout().len() as f64];
        for _ in 0..steps {
            values.push(training.step()?);
        }
        Ok(values)
    }

    /// Seconds of one evaluation or step.
    fn measure(&mut self, work: &str) -> Result<f64> {
        let repeats = self.numbers.repeats;
        if work == Work::Guided.name() {
            let watch = Stopwatch::start();
            for _ in 0..repeats {
                let _ = self.guided();
            }
            return Ok(watch.elapsed().as_secs_f64() / f64::from(repeats));
        }
        let training = self.training(work)?;
        let watch = Stopwatch::start();
        for _ in 0..repeats {
            training.step()?;
        }
        Ok(watch.elapsed().as_secs_f64() / f64::from(repeats))
    }

    /// One step of the walk that draws trajectories.
    fn guided(&self) -> Tensor {
        let Tensors { z, t, t_next, .. } = &self.tensors;
        let TeacherModel {
            parts,
            schedule,
            prediction,
        } = &self.teacher;
        let null = texts(&self.tensors.null);
        let guided = Guided {
            denoiser: &parts.unet,
            null: &null,
            scale: self.numbers.guidance,
        };
        tch::no_grad(|| {
            let n = guided.predict(z, t, &texts(&self.tensors.context));
            ddim(schedule, &heads(schedule, *prediction, z, &n, t), t_next)
        })
    }

    fn training(&mut self, work: &str) -> Result<&mut Training> {
        if !self.trainings.contains_key(work) {
            let training = Training::new(&self.teacher, &self.tensors, work)?;
            self.trainings.insert(work.to_owned(), training);
        }
        self.trainings
            .get_mut(work)
            .context("it has just been put there")
    }
}

/// A student in training on one batch.
struct Training {
    student: Student,
    trainer: Trainer,
    objective: Box<dyn Objective>,
    rows: [Vec<Rows>; 1],
    group: Solo,
}

impl Training {
    fn new(teacher: &TeacherModel, tensors: &Tensors, work: &str) -> Result<Self> {
        let full = problem::full_recipe()?.stages.remove(0);
        let stage = if work == Work::MlcmFull.name() {
            full
        } else if work == Work::MlcmLora.name() {
            Stage {
                student: problem::lora_recipe()?.stages.remove(0).student,
                ..full
            }
        } else {
            bail!("{work:?} is not measured on our side");
        };
        let Tensors {
            z,
            eps_w,
            t,
            context,
            ..
        } = tensors;
        let rows = Rows {
            numbers: (0..t.numel() as u64).collect(),
            z: z.shallow_clone(),
            eps_w: eps_w.shallow_clone(),
            t: t.shallow_clone(),
            conditioning: texts(context),
        };
        let mut plan = Plan::from(&stage);
        plan.steps = u64::MAX;
        plan.optimizer.schedule = RateSchedule::Constant;
        plan.optimizer.warmup = 0;
        plan.batch = Batch {
            global: rows.len() as u64,
            micro: None,
            virtual_ranks: None,
        };
        let student = Student::fresh(teacher, &stage, 0, Device::Cpu);
        let student = student.map_err(|fault| anyhow!("{fault}"))?;
        let schedule = teacher.schedule.to_device(Device::Cpu);
        Ok(Self {
            trainer: Trainer::new(plan, student.parameters()),
            student,
            objective: objective(&stage, schedule, teacher.prediction)?,
            rows: [vec![rows]],
            group: Solo::default(),
        })
    }

    /// One step; gives its loss.
    fn step(&mut self) -> Result<f64> {
        let report = self.trainer.step(
            &self.rows,
            &mut Notice::default,
            self.objective.as_ref(),
            &self.student.unet,
            None,
            &mut self.group,
        )?;
        Ok(report.loss)
    }
}

fn texts(context: &Tensor) -> Conditioning {
    Conditioning {
        context: context.shallow_clone(),
        pooled: None,
        time_ids: None,
    }
}
