//! Training in a group: a student of a few numbers that follows the rows it is shown.
//!
//! A step adds up whole numbers over the rows of the global batch, which is exact in any order, and only then
//! rounds; so the student does not depend on the number of members.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use distillery_common::checkpoint::{
    self, Checkpoint, Dtype, Kind, Snapshot, StateSource, TensorSpec, Training,
};
use distillery_common::curves::{self, StepRecord, TIME_BINS};
use distillery_common::group::{self, CheckpointCommitted, Held, Membership, Phase, Progress};
use distillery_common::ids::{Digest, Generation};
use distillery_common::latents::loader::Order;
use distillery_common::latents::{self, Dataset, Options, Staging};
use distillery_common::ledger::{Ledger, PLACES};
use distillery_common::proto::engine_link::{CommitOutcome, CommitRequest, Committed, Event};
use distillery_common::recipe;
use distillery_common::run::dataset_store;
use distillery_common::seed::{Purpose, Stream};
use distillery_common::storage::{Store, layout};
use distillery_common::task::{Failure, FailureClass};
use distillery_common::telemetry::peak_memory;

use super::wires::{Broken, SUMS, Star, WIDTH};
use super::{Bench, fault, superseded};

/// How training ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The engine is free for other work; failures have been reported.
    Free,
    /// The engine was told to end, and did what was asked first.
    Drained,
}

/// Takes part in a group until the stage, the group or the engine ends.
pub(super) fn train(bench: &mut Bench, membership: &Membership) -> Ending {
    tracing::info!(group = %membership.group, rank = membership.rank, "joining");
    match Work::prepare(bench, membership).and_then(|mut work| work.run(bench)) {
        Ok(ending) => ending,
        Err(failure) => {
            bench.link.send(Event::GroupFailed {
                group: membership.group.clone(),
                rank: membership.rank,
                failure,
            });
            Ending::Free
        }
    }
}

/// A stage's state in memory, as far as it was trained.
#[derive(Clone)]
pub(super) struct Trained {
    step: u64,
    /// Generation that held it last.
    generation: Generation,
    state: State,
    curves: Vec<StepRecord>,
}

/// The student and what its optimizer remembers.
#[derive(Clone)]
struct State {
    weight: [f32; WIDTH],
    momentum: [f32; WIDTH],
}

impl StateSource for State {
    fn tensors(&self) -> Vec<TensorSpec> {
        [Kind::Student, Kind::AdamM]
            .map(|kind| TensorSpec {
                kind,
                name: "sim.weight".into(),
                dtype: Dtype::F32,
                shape: vec![WIDTH as u64],
            })
            .into()
    }

    fn copy(&self, index: usize, start: usize, out: &mut [u8]) {
        let values = if index == 0 {
            &self.weight
        } else {
            &self.momentum
        };
        for (bytes, value) in out.chunks_exact_mut(4).zip(&values[start / 4..]) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}

impl State {
    fn fresh(seed: u64) -> Self {
        let mut stream = Stream::new(seed, Purpose::AdapterInit, 0, 0);
        Self {
            weight: std::array::from_fn(|_| stream.next_u32() as f32 / u32::MAX as f32),
            momentum: [0.0; WIDTH],
        }
    }

    /// Moves towards the mean of what the batch showed.
    fn step(&mut self, sum: &[i64; SUMS], batch: u64, rate: f32) {
        for ((weight, momentum), &sum) in self.weight.iter_mut().zip(&mut self.momentum).zip(sum) {
            let seen = sum as f32 / (batch as f32 * 32768.0);
            *momentum = 0.9 * *momentum + (seen - *weight);
            *weight += rate * *momentum;
        }
    }
}

impl Trained {
    fn held(&self) -> Held {
        Held {
            step: self.step,
            generation: self.generation,
        }
    }

    /// Step, generation, numbers, curves.
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.step.to_le_bytes().to_vec();
        bytes.extend(self.generation.0.to_le_bytes());
        let values = self.state.weight.iter().chain(&self.state.momentum);
        bytes.extend(values.flat_map(|value| value.to_le_bytes()));
        bytes.extend(curves::to_jsonl(&self.curves));
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (step, rest) = bytes.split_first_chunk::<8>()?;
        let (generation, rest) = rest.split_first_chunk::<8>()?;
        let (values, curves) = rest.split_at_checked(8 * WIDTH)?;
        let value = |at: usize| f32::from_le_bytes(std::array::from_fn(|i| values[4 * at + i]));
        Some(Self {
            step: u64::from_le_bytes(*step),
            generation: Generation(u64::from_le_bytes(*generation)),
            state: State {
                weight: std::array::from_fn(value),
                momentum: std::array::from_fn(|at| value(WIDTH + at)),
            },
            curves: curves::from_jsonl(curves).ok()?,
        })
    }
}

struct Work {
    membership: Membership,
    stage: recipe::Stage,
    listener: TcpListener,
    trained: Trained,
    dataset: Dataset,
    order: Order,
    manifest: Digest,
}

impl Work {
    fn prepare(bench: &mut Bench, membership: &Membership) -> Result<Self, Failure> {
        let name = &membership.group.stage;
        let number = bench
            .recipe
            .stages
            .iter()
            .position(|stage| stage.name == *name);
        let number =
            number.ok_or_else(|| fault(FailureClass::Config, format!("no stage {name}")))?;
        let stage = bench.recipe.stages[number].clone();
        let io = |error: std::io::Error| fault(FailureClass::Io, error);
        let listener = TcpListener::bind((bench.advertise, 0)).map_err(io)?;
        let address = listener.local_addr().map_err(io)?;
        bench.link.send(Event::GroupReady {
            group: membership.group.clone(),
            rank: membership.rank,
            address: address.to_string(),
        });
        let digest = bench
            .record
            .dataset_digest
            .ok_or_else(|| fault(FailureClass::Config, "the run's record names no dataset"))?;
        let folder = layout::dataset(&digest.short());
        let store = dataset_store(&bench.store, &bench.recipe)
            .map_err(|error| fault(FailureClass::Config, error))?;
        let manifest = bench
            .runtime
            .block_on(latents::manifest::find(&store, &folder))
            .map_err(|error| fault(FailureClass::Schema, error))?
            .ok_or_else(|| fault(FailureClass::Schema, "the trajectories are not sealed"))?;
        let digest = manifest.digest();
        let dataset = Dataset::new(store, manifest, Options::default());
        let order = Order {
            seed: bench.recipe.seed,
            stage: number as u64,
            rows: dataset.rows(),
            global_batch: stage.batch.global,
            virtual_ranks: None,
        };
        Ok(Self {
            membership: membership.clone(),
            stage,
            listener,
            trained: Trained {
                step: membership.base_step,
                generation: membership.group.generation,
                state: State::fresh(bench.recipe.seed),
                curves: Vec::new(),
            },
            dataset,
            order,
            manifest: digest,
        })
    }

    fn run(&mut self, bench: &mut Bench) -> Result<Ending, Failure> {
        let group = self.membership.group.clone();
        self.tell(bench, Phase::Exchanging, self.membership.base_step);
        let peers = loop {
            if let Some(peers) = bench.inbox.peers(&group) {
                break peers;
            }
            if bench.inbox.aborted(&group) {
                return Err(superseded());
            }
            if bench.inbox.draining().is_some() {
                return Ok(Ending::Drained);
            }
            bench.inbox.listen(Duration::from_millis(20));
        };
        let secret = bench.setup.group_secret;
        let inbox = &mut bench.inbox;
        let stop = &mut || interrupted(inbox, &group);
        let star = Star::connect(&self.listener, &self.membership, &peers, secret, stop);
        let outcome = match star {
            Ok(mut star) => self
                .sync(bench, &mut star)
                .and_then(|()| self.steps(bench, &mut star)),
            Err(broken) => Err(broken.into()),
        };
        match outcome {
            Ok(()) => Ok(Ending::Free),
            Err(Stop::Failed(failure)) => Err(failure),
            Err(Stop::Broken(broken)) => self.left(bench, broken),
        }
    }

    /// A step did not come about: somebody told us to stop, or a peer is gone.
    fn left(&self, bench: &mut Bench, broken: Broken) -> Result<Ending, Failure> {
        let step = self.trained.step;
        if let Some(checkpoint) = bench.inbox.draining() {
            if checkpoint && self.membership.rank == 0 && step > self.membership.base_step {
                self.save(bench, step)?;
            }
            return Ok(Ending::Drained);
        }
        // The abort may still be on its way: the coordinator hears of a lost member when we do.
        bench.inbox.listen(Duration::from_millis(100));
        match broken {
            _ if bench.inbox.aborted(&self.membership.group) => Err(superseded()),
            Broken::Stopped => Err(superseded()),
            Broken::Peer(error) => Err(fault(FailureClass::Collective, error)),
        }
    }

    /// Takes over the newest state that a member holds, or else what rank 0 reads from the store.
    fn sync(&mut self, bench: &mut Bench, star: &mut Star) -> Result<(), Stop> {
        let membership = &self.membership;
        let base = membership.base_checkpoint.as_deref();
        let base = base.and_then(layout::parse_checkpoint_commit);
        let base = base.map(|(_, step, generation)| Held { step, generation });
        let kept = bench.kept.take().filter(|(stage, trained)| {
            *stage == membership.group.stage && trained.held().continues(base)
        });
        let own = kept.map_or(Vec::new(), |(_, trained)| trained.to_bytes());
        let chosen = {
            let (runtime, store, recipe) = (&bench.runtime, &bench.store, &bench.recipe);
            let inbox = &mut bench.inbox;
            let stop = &mut || interrupted(inbox, &membership.group);
            let choose = |all: Vec<Vec<u8>>| {
                let held: Vec<Option<Held>> = all
                    .iter()
                    .map(|bytes| Some(Trained::parse(bytes)?.held()))
                    .collect();
                match group::source(&held) {
                    Some(source) => Ok::<_, Stop>(all[source as usize].clone()),
                    None => {
                        let (state, curves) = start(runtime, store, recipe.seed, membership)?;
                        let loaded = Trained {
                            state,
                            curves,
                            ..self.trained.clone()
                        };
                        Ok(loaded.to_bytes())
                    }
                }
            };
            star.choose(own, choose, stop)?
        };
        let nonsense = || fault(FailureClass::Collective, "a peer's state makes no sense");
        let chosen = Trained::parse(&chosen).ok_or_else(nonsense)?;
        self.trained = Trained {
            generation: membership.group.generation,
            ..chosen
        };
        self.keep(bench);
        Ok(())
    }

    fn keep(&self, bench: &mut Bench) {
        bench.kept = Some((self.membership.group.stage.clone(), self.trained.clone()));
    }

    fn steps(&mut self, bench: &mut Bench, star: &mut Star) -> Result<(), Stop> {
        let group = self.membership.group.clone();
        self.tell(bench, Phase::Stepping, self.trained.step);
        if self.trained.step > self.membership.base_step {
            self.save_if_due(bench)?;
        }
        while self.trained.step < self.stage.steps {
            bench
                .inbox
                .listen(Duration::from_millis(bench.pace.step_ms));
            if interrupted(&mut bench.inbox, &group) {
                return Err(Broken::Stopped.into());
            }
            let step = self.trained.step;
            let own = self.contribution(bench, step)?;
            let inbox = &mut bench.inbox;
            let sum = star.sum(step, own, &mut || interrupted(inbox, &group))?;
            self.trained.state.step(
                &sum,
                self.stage.batch.global,
                self.stage.optimizer.lr as f32,
            );
            self.trained.step += 1;
            let record = self.record(self.trained.step, &sum);
            self.trained.curves.push(record);
            self.keep(bench);
            self.tell(bench, Phase::Stepping, self.trained.step);
            self.save_if_due(bench)?;
        }
        Ok(())
    }

    fn save_if_due(&self, bench: &mut Bench) -> Result<(), Failure> {
        let step = self.trained.step;
        let due = step.is_multiple_of(bench.recipe.checkpoint.every_steps);
        if self.membership.rank == 0 && (due || step == self.stage.steps) {
            self.save(bench, step)?;
        }
        Ok(())
    }

    /// What this rank's rows add to the sum: their first numbers, as whole numbers, and their ledger.
    fn contribution(&self, bench: &Bench, step: u64) -> Result<[i64; SUMS], Stop> {
        let Membership { rank, world, .. } = self.membership;
        let positions = self.order.positions(step, rank, world);
        let rows: Vec<u64> = positions
            .map(|position| self.order.row_at(position))
            .collect();
        let mut staging = Staging::default();
        bench
            .runtime
            .block_on(self.dataset.read_rows(&rows, &mut staging))
            .map_err(|error| Stop::Failed(fault(FailureClass::Schema, error)))?;
        let wide = self.dataset.manifest().schema.row_bytes();
        let mut sum = [0; SUMS];
        let consumed = Ledger::of(rows.iter().copied()).sums();
        for (sum, more) in sum[WIDTH..].iter_mut().zip(consumed) {
            *sum = i64::from(more);
        }
        for row in staging.latent.chunks_exact(wide) {
            for (sum, half) in sum[..WIDTH].iter_mut().zip(row.chunks_exact(2)) {
                *sum += i64::from(i16::from_le_bytes([half[0], half[1]]));
            }
        }
        Ok(sum)
    }

    fn save(&self, bench: &mut Bench, step: u64) -> Result<(), Failure> {
        let group = &self.membership.group;
        let snapshot = Arc::new(Snapshot::capture(&self.trained.state, None));
        let metrics = Bytes::from(curves::to_jsonl(&self.trained.curves));
        let manifest = bench
            .runtime
            .block_on(checkpoint::write(
                &bench.store,
                &group.stage,
                step,
                group.generation,
                self.training(bench),
                &snapshot,
                metrics,
            ))
            .map_err(|error| fault(FailureClass::Io, error))?;
        let body = manifest.to_bytes();
        let key = manifest.commit_key();
        let outcome = bench.link.commit(CommitRequest {
            what: Committed::Checkpoint(CheckpointCommitted {
                group: group.clone(),
                step,
                key: key.as_str().to_owned(),
                digest: Digest::of(&body),
                bytes: manifest.total_bytes(),
                is_final: step == self.stage.steps,
            }),
            key,
            body,
            rows: 0,
            bytes: manifest.total_bytes(),
        });
        match outcome {
            CommitOutcome::Won => Ok(()),
            CommitOutcome::Lost | CommitOutcome::Expired => {
                Err(fault(FailureClass::Stale, "the generation had ended"))
            }
            CommitOutcome::Failed(message) => Err(fault(FailureClass::Io, message)),
        }
    }

    fn training(&self, bench: &Bench) -> Training {
        Training {
            run: bench.record.run_id.to_string(),
            recipe_digest: bench.record.recipe_digest.to_string(),
            dataset_digest: Some(self.manifest.to_string()),
            parent: self.membership.parent_checkpoint.clone(),
            milestones: (0..=self.stage.segments)
                .map(|segment| 999 * segment / self.stage.segments)
                .collect(),
            schedule: "stand-in".into(),
            prediction_type: "epsilon".into(),
            skip: self.stage.skip,
            seed: bench.recipe.seed,
            global_batch: self.stage.batch.global,
            lora: None,
            libtorch: "none".into(),
            cpu_capability: "none".into(),
        }
    }

    /// Only the step and its rows are real; the curve falls so that a report has something to draw.
    fn record(&self, step: u64, sum: &[i64; SUMS]) -> StepRecord {
        let rows: [u32; PLACES] = std::array::from_fn(|place| sum[WIDTH + place] as u32);
        let loss = 1.0 / step as f64;
        StepRecord {
            step,
            generation: self.membership.group.generation.0,
            world: self.membership.world,
            loss: Some(loss),
            loss_by_segment: vec![Some(loss); self.stage.segments as usize],
            loss_by_time: vec![Some(loss); TIME_BINS],
            grad_norm: Some(loss),
            lr: self.stage.optimizer.lr,
            skipped: false,
            rows: Some(Ledger::from(rows)),
            step_ms: 1.0,
            wait_ms: 0.0,
            sum_ms: None,
            save_ms: None,
            peak_bytes: peak_memory(),
        }
    }

    fn tell(&self, bench: &Bench, phase: Phase, step: u64) {
        bench.link.send(Event::GroupProgress(Progress {
            group: self.membership.group.clone(),
            phase,
            step,
            total_steps: self.stage.steps,
            loss: self
                .trained
                .curves
                .last()
                .and_then(|r| r.loss)
                .unwrap_or(0.0),
            samples_per_second: 0.0,
            step_ms: 0.0,
        }));
    }
}

/// Why the steps ended early.
enum Stop {
    Broken(Broken),
    Failed(Failure),
}

impl From<Broken> for Stop {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Whether the group or the engine was told to end. The command stays, but for an abort's.
fn interrupted(inbox: &mut super::Inbox, group: &distillery_common::group::GroupId) -> bool {
    inbox.draining().is_some() || inbox.aborted(group)
}

/// The state that the group starts from: its own checkpoint, or its parent's student, or a fresh one.
fn start(
    runtime: &tokio::runtime::Runtime,
    store: &Store,
    seed: u64,
    membership: &Membership,
) -> Result<(State, Vec<StepRecord>), Failure> {
    let mut state = State::fresh(seed);
    let base = membership.base_checkpoint.as_deref();
    let Some(key) = base.or(membership.parent_checkpoint.as_deref()) else {
        return Ok((state, Vec::new()));
    };
    let loaded = runtime
        .block_on(async { Checkpoint::open(store, key).await?.load().await })
        .map_err(|error| fault(FailureClass::Schema, error))?;
    for (spec, bytes) in &loaded.tensors {
        let values = match spec.kind {
            Kind::Student => &mut state.weight,
            Kind::AdamM if base.is_some() => &mut state.momentum,
            Kind::AdamM | Kind::AdamV | Kind::Ema => continue,
        };
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(4)) {
            *value = f32::from_le_bytes(std::array::from_fn(|i| bytes[i]));
        }
    }
    let records = match base {
        Some(_) => curves::from_jsonl(&loaded.metrics)
            .map_err(|error| fault(FailureClass::Schema, error))?,
        None => Vec::new(),
    };
    Ok((state, records))
}
