//! Tests 11, 12 and 13: that training by the objectives reaches what the closed forms say, in seconds.

use std::ops::Range;
use std::thread;

use distillery_common::latents::loader::Order;
use distillery_common::recipe::{Batch, Loss, Optimizer, RateSchedule};
use distillery_common::seed::{Purpose, Stream, normal};
use distillery_engine::collective::solo::Solo;
use distillery_engine::diffusion::denoiser::{Conditioning, Denoiser};
use distillery_engine::diffusion::guidance::Guided;
use distillery_engine::diffusion::prediction::Prediction;
use distillery_engine::diffusion::prediction::heads;
use distillery_engine::diffusion::sampler::{
    Output, Reading, ddim_times, deterministic, segments_times, stochastic, tlcm9_times,
};
use distillery_engine::diffusion::schedule::Schedule;
use distillery_engine::diffusion::segments::{Segments, TimeGrid};
use distillery_engine::diffusion::solver::ddim;
use distillery_engine::diffusion::trajectory::Choices;
use distillery_engine::distill::mlcm::Mlcm;
use distillery_engine::distill::{Rows, Setting};
use distillery_engine::train::flat::Parameters;
use distillery_engine::train::{Control, Plan, Sink, Source, StepReport, Trainer};
use tch::{Device, Kind, Tensor};

use crate::analytic::{Gaussian, Mixture, Z, batch, condition, scalar, unconditional, value};

fn objective(m: u32) -> Mlcm {
    Mlcm::new(Setting {
        schedule: Schedule::stable_diffusion(),
        prediction: Prediction::Epsilon,
        segments: Segments::new(m).unwrap(),
        skip: 25,
        loss: Loss::L2,
    })
}

fn plan(steps: u64, lr: f64, global: u64) -> Plan {
    Plan {
        steps,
        batch: Batch {
            global,
            micro: None,
            virtual_ranks: None,
        },
        optimizer: Optimizer {
            lr,
            betas: (0.9, 0.99),
            epsilon: 1e-10,
            weight_decay: 0.0,
            grad_clip: None,
            schedule: RateSchedule::Cosine,
            warmup: 10,
            max_skipped: 1,
            sharded: false,
        },
        ema_decay: None,
    }
}

struct Silent;

impl Sink for Silent {
    fn after_step(&mut self, _: &Trainer, report: &StepReport) -> anyhow::Result<Control> {
        assert!(!report.skipped);
        Ok(Control::Continue)
    }
}

/// A student that is affine in z at every point of the 40-grid: `eps = eps_teacher + A_t z + b_t`.
struct Affine {
    teacher: Gaussian,
    /// A and b of every time, `[2, 1000]`.
    table: Tensor,
}

impl Affine {
    fn new() -> Self {
        Self {
            teacher: Gaussian::new(),
            table: Tensor::zeros([2, 1000], (Kind::Float, Device::Cpu)).set_requires_grad(true),
        }
    }

    fn train(&self, m: u32, steps: u64) {
        let parameters = Parameters::new(vec![("table".to_owned(), self.table.shallow_clone())]);
        let mut trainer = Trainer::new(plan(steps, 0.01, 160), parameters);
        let mut rows = GridRows {
            teacher: Gaussian::new(),
        };
        trainer
            .run(
                &objective(m),
                self,
                None,
                &mut Solo::default(),
                &mut rows,
                &mut Silent,
            )
            .unwrap();
    }

    fn deterministic(&self, times: &[i64]) -> f64 {
        let end = deterministic(self.teacher.reading(), times, &scalar(Z), &mut |z, t| {
            self.predict(z, t, &unconditional(z.size()[0]))
        });
        value(&end)
    }

    /// Variance of the two-step stochastic sampler's output from N(0, 1).
    fn stochastic_variance(&self) -> f64 {
        let impulse = |row: usize| batch(&[0, 1, 2].map(|i| f64::from(u8::from(i == row))));
        let out = stochastic(
            self.teacher.reading(),
            Output::X0,
            &tlcm9_times(2).unwrap(),
            &impulse(1),
            &mut |z, t| self.predict(z, t, &unconditional(3)),
            &mut |_| impulse(2),
        );
        let out = Vec::<f64>::try_from(out.view([-1])).unwrap();
        (out[1] - out[0]).powi(2) + (out[2] - out[0]).powi(2)
    }
}

impl Denoiser for Affine {
    fn predict(&self, z: &Tensor, t: &Tensor, c: &Conditioning) -> Tensor {
        let at = |row: i64| {
            let values = self.table.get(row).index_select(0, t);
            values.view([-1, 1, 1, 1]).to_kind(z.kind())
        };
        self.teacher.predict(z, t, c) + at(0) * z + at(1)
    }
}

/// Every point of the 40-grid four times, at z of both signs and two sizes: enough to fix an affine map.
struct GridRows {
    teacher: Gaussian,
}

impl Source for GridRows {
    fn rows(&mut self, positions: Range<u64>) -> anyhow::Result<Rows> {
        let times: Vec<i64> = positions
            .clone()
            .map(|p| 25 * (p % 40) as i64 + 24)
            .collect();
        let states: Vec<f32> = positions
            .map(|p| [1.5, -1.5, 0.5, -0.5][(p / 40 % 4) as usize])
            .collect();
        let z = Tensor::from_slice(&states).view([-1, 1, 1, 1]);
        let t = Tensor::from_slice(&times);
        let conditioning = unconditional(t.size()[0]);
        Ok(Rows {
            numbers: (0..times.len() as u64).collect(),
            eps_w: self.teacher.predict(&z, &t, &conditioning),
            z,
            t,
            conditioning,
        })
    }
}

/// Test 11: the closed forms T5, the table of §6.2 and T10 are reached by training, stage after stage.
#[test]
fn an_affine_student_learns_the_closed_forms_stage_by_stage() {
    let student = Affine::new();
    let landing = |t: i64, s: i64| student.deterministic(&[t, s]);
    let mut learned = Vec::new();
    for (m, steps) in [(8, 400), (4, 400), (2, 600)] {
        student.train(m, steps);
        if m == 8 {
            assert!((landing(999, 874) - 1.340595835456).abs() < 1e-3);
            assert!((landing(124, 0) - 1.222444760673).abs() < 1e-3);
        }
        let two_steps = student.deterministic(&segments_times(2).unwrap());
        learned.push((two_steps, student.stochastic_variance()));
    }
    for ((end, variance), (expected_end, expected_variance)) in
        learned
            .iter()
            .zip([(0.944450, 0.0277), (0.998798, 0.0434), (1.290028, 0.1847)])
    {
        assert!((end - expected_end).abs() < 3e-3, "{learned:?}");
        assert!((variance - expected_variance).abs() < 3e-3, "{learned:?}");
    }
}

/// A conditional student: the exact unguided denoiser and a trainable correction that starts at zero.
struct Corrected {
    base: Mixture,
    weights: Vec<(String, Tensor)>,
}

const HIDDEN: i64 = 48;

impl Corrected {
    fn new() -> Self {
        let shapes: [(&str, [i64; 2]); 4] = [
            ("0.weight", [6, HIDDEN]),
            ("1.weight", [HIDDEN + 1, HIDDEN]),
            ("2.weight", [HIDDEN + 1, HIDDEN]),
            ("3.weight", [HIDDEN + 1, 1]),
        ];
        let weights = (0..)
            .zip(shapes)
            .map(|(ordinal, (name, shape))| {
                let len = (shape[0] * shape[1]) as usize;
                let values = normal(3, Purpose::AdapterInit, ordinal, 0, len);
                let scale = if ordinal == 3 {
                    0.0
                } else {
                    1.0 / (shape[0] as f64).sqrt()
                };
                let tensor = Tensor::from_slice(&values).view(shape) * scale;
                (name.to_owned(), tensor.set_requires_grad(true))
            })
            .collect();
        Self {
            base: mixture(),
            weights,
        }
    }

    fn parameters(&self) -> Parameters {
        let share = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shallow_clone());
        Parameters::new(self.weights.iter().map(share).collect())
    }
}

impl Denoiser for Corrected {
    fn predict(&self, z: &Tensor, t: &Tensor, c: &Conditioning) -> Tensor {
        let z = z.to_kind(Kind::Float);
        let schedule = &self.base.schedule;
        let flat = |x: Tensor| x.view([-1, 1]).to_kind(Kind::Float);
        let (alpha, sigma) = (
            flat(schedule.alpha_at(t, &z)),
            flat(schedule.sigma_at(t, &z)),
        );
        let (state, kind) = (flat(z.shallow_clone()), flat(c.context.shallow_clone()));
        let ones = state.ones_like();
        let input = Tensor::cat(
            &[&state, &alpha, &sigma, &kind, &(&alpha * &state), &ones],
            1,
        );
        let mut x = input;
        for (_, weight) in &self.weights[..3] {
            x = Tensor::cat(&[&x.matmul(weight).silu(), &ones], 1);
        }
        let correction = x.matmul(&self.weights[3].1).view([-1, 1, 1, 1]);
        self.base.predict(&z, t, c) + correction
    }
}

fn mixture() -> Mixture {
    Mixture {
        schedule: Schedule::stable_diffusion(),
        s: 0.4,
    }
}

const GUIDANCE: f64 = 2.0;
const RUN_SEED: u64 = 11;

/// States of one aligned block of trajectories: (ordinal, step, t, condition, z, eps_w) row by row.
type Row = (u64, usize, i64, f32, f32, f32);

/// Draws a block of teacher trajectories; a pure function of the ordinals.
fn trajectories(ordinals: Range<u64>) -> Vec<Row> {
    let teacher = mixture();
    let null = condition(0.0, 1);
    let guided = Guided {
        denoiser: &teacher,
        null: &null,
        scale: GUIDANCE,
    };
    let segments = Segments::new(8).unwrap();
    let choices = Choices::new(&segments, Some(&TimeGrid::new(40).unwrap())).unwrap();
    let rows: Vec<u64> = ordinals.collect();
    let kinds: Vec<f32> = rows
        .iter()
        .map(|r| if r % 2 == 0 { 1.0 } else { -1.0 })
        .collect();
    let plans: Vec<Vec<i64>> = rows
        .iter()
        .map(|&r| {
            let mut stream = Stream::new(RUN_SEED, Purpose::TrajectoryTimes, r, 0);
            choices.stratified(&mut |bound| stream.below(bound))
        })
        .collect();
    let start: Vec<f32> = rows
        .iter()
        .flat_map(|&r| normal(RUN_SEED, Purpose::InitialNoise, r, 0, 1))
        .collect();
    let mut z = Tensor::from_slice(&start).view([-1, 1, 1, 1]);
    let conditioning = Conditioning {
        context: Tensor::from_slice(&kinds).view([-1, 1, 1]),
        ..condition(0.0, 1)
    };
    let mut out = Vec::new();
    for step in 0..plans[0].len() {
        let times = |step: usize| {
            let times: Vec<i64> = plans.iter().map(|plan| plan[step]).collect();
            Tensor::from_slice(&times)
        };
        let t = times(step);
        let eps = guided.predict(&z, &t, &conditioning);
        let list = |x: &Tensor| Vec::<f32>::try_from(x.view([-1])).unwrap();
        for (i, (z, eps)) in list(&z).into_iter().zip(list(&eps)).enumerate() {
            out.push((rows[i], step, plans[i][step], kinds[i], z, eps));
        }
        if step + 1 < plans[0].len() {
            let read = heads(&teacher.schedule, Prediction::Epsilon, &z, &eps, &t);
            z = ddim(&teacher.schedule, &read, &times(step + 1));
        }
    }
    out
}

/// Stored rows, taken by a keyed stream of positions.
struct Stored {
    rows: Vec<Row>,
    stage: u64,
}

impl Source for Stored {
    fn rows(&mut self, positions: Range<u64>) -> anyhow::Result<Rows> {
        let order = Order {
            seed: RUN_SEED,
            stage: self.stage,
            rows: self.rows.len() as u64,
            global_batch: 1,
            virtual_ranks: None,
        };
        let rows: Vec<&Row> = positions
            .map(|p| &self.rows[order.row_at(p) as usize])
            .collect();
        let column = |of: &dyn Fn(&Row) -> f32| {
            Tensor::from_slice(&rows.iter().map(|r| of(r)).collect::<Vec<f32>>())
        };
        let times: Vec<i64> = rows.iter().map(|r| r.2).collect();
        Ok(Rows {
            numbers: (0..rows.len() as u64).collect(),
            z: column(&|r| r.4).view([-1, 1, 1, 1]),
            eps_w: column(&|r| r.5).view([-1, 1, 1, 1]),
            t: Tensor::from_slice(&times),
            conditioning: Conditioning {
                context: column(&|r| r.3).view([-1, 1, 1]),
                pooled: None,
                time_ids: None,
            },
        })
    }
}

/// 2-Wasserstein distance of two equally large samples of numbers.
fn w2(a: &Tensor, b: &Tensor) -> f64 {
    let sorted = |x: &Tensor| x.view([-1]).to_kind(Kind::Double).sort(0, false).0;
    (sorted(a) - sorted(b))
        .square()
        .mean(Kind::Double)
        .sqrt()
        .double_value(&[])
}

/// Test 12: trajectories of a guided teacher of two kinds of data, three stages, samples.
#[test]
fn a_student_of_a_guided_mixture_draws_like_its_teacher_in_two_steps() {
    let rows: Vec<Row> = (0..8)
        .flat_map(|b| trajectories(b * 128..(b + 1) * 128))
        .collect();
    let student = Corrected::new();
    let untrained = Corrected::new();
    for (stage, m) in [8, 4, 2].into_iter().enumerate() {
        let mut trainer = Trainer::new(plan(500, 3e-3, 256), student.parameters());
        let mut source = Stored {
            rows: rows.clone(),
            stage: stage as u64,
        };
        trainer
            .run(
                &objective(m),
                &student,
                None,
                &mut Solo::default(),
                &mut source,
                &mut Silent,
            )
            .unwrap();
    }
    let teacher = mixture();
    let null = condition(0.0, 1);
    let guided = Guided {
        denoiser: &teacher,
        null: &null,
        scale: GUIDANCE,
    };
    let reading = Reading {
        schedule: &teacher.schedule,
        prediction: Prediction::Epsilon,
    };
    let samples = 1000;
    let noise = normal(RUN_SEED, Purpose::EvaluationNoise, 0, 0, samples);
    let start = Tensor::from_slice(&noise).view([-1, 1, 1, 1]);
    for kind in [1.0, -1.0] {
        let c = condition(kind, samples as i64);
        let draw = |times: &[i64], predict: &dyn Fn(&Tensor, &Tensor) -> Tensor| {
            tch::no_grad(|| deterministic(reading, times, &start, &mut |z, t| predict(z, t)))
        };
        let fine = ddim_times(250).unwrap();
        let truth = draw(&fine, &|z, t| guided.predict(z, t, &c));
        let two = segments_times(2).unwrap();
        let distilled = w2(&draw(&two, &|z, t| student.predict(z, t, &c)), &truth);
        let teacher_two = w2(&draw(&two, &|z, t| guided.predict(z, t, &c)), &truth);
        let undistilled = w2(&draw(&two, &|z, t| untrained.predict(z, t, &c)), &truth);
        assert!(
            distilled < 0.5 * teacher_two && distilled < 0.5 * undistilled && distilled < 0.1,
            "{distilled} against {teacher_two} and {undistilled}"
        );
    }
}

/// Test 13: neither the number of generators, nor their order, nor work done twice changes a bit.
#[test]
fn trajectories_are_the_same_whoever_draws_them() {
    let blocks = 8u64;
    let block = |b: u64| trajectories(b * 16..(b + 1) * 16);
    let alone: Vec<Row> = (0..blocks).flat_map(block).collect();
    let shared = thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|w| {
                scope.spawn(move || {
                    let mine: Vec<u64> = (0..blocks).rev().filter(|b| b % 4 == w).collect();
                    if w == 1 {
                        // Killed after its first block: what it drew is lost, and drawn again.
                        drop(block(mine[0]));
                    }
                    mine.into_iter().flat_map(block).collect::<Vec<Row>>()
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|w| w.join().unwrap())
            .collect::<Vec<Row>>()
    });
    let sorted = |mut rows: Vec<Row>| {
        rows.sort_by_key(|r| (r.0, r.1));
        rows.into_iter()
            .map(|r| (r.0, r.1, r.2, r.4.to_bits(), r.5.to_bits()))
            .collect::<Vec<_>>()
    };
    assert_eq!(sorted(alone), sorted(shared));
}
