//! Training in a simulated group: a state of one number that every step changes by what its rows add up to.
//!
//! The sum does not depend on the number of ranks, so each state follows from the stage and the step alone, and every
//! rank of every generation can be checked against it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use distillery_common::checkpoint::{
    self, Checkpoint, Dtype, Kind, Snapshot, StateSource, TensorSpec,
};
use distillery_common::group::{
    CheckpointCommitted, GroupId, Membership, Phase, Progress, batch_share,
};
use distillery_common::ids::Digest;
use distillery_common::proto::engine_link::{
    Command, CommitOutcome, CommitRequest, Committed, Event,
};
use distillery_common::task::{Failure, FailureClass};
use distillery_coordinator::plan::Work;

use super::engine::{Bench, failure, superseded};
use super::ring::Share;
use super::scene::{BATCH, FRESH, advance, contribution, inherit};
use super::world::{Host, moment};

/// How long a rank waits for the others' shares.
const COLLECTIVE: Duration = Duration::from_secs(20);

/// How training ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The engine is free for other work.
    Free,
    /// The engine was told to end.
    Drained,
}

/// One rank at work.
struct Rank<'a> {
    bench: &'a mut Bench,
    membership: &'a Membership,
    stage: usize,
    steps: u64,
    every: u64,
    state: u64,
}

/// Why a step did not come about.
enum Stop {
    Aborted,
    Draining(bool),
    Failed(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Takes part in a group until the stage, the group or the engine ends.
pub(super) async fn train(bench: &mut Bench, membership: &Membership) -> Result<Ending, Failure> {
    let world = Arc::clone(&bench.world);
    let plan = &world.scene.plan;
    let stage = plan.position(&membership.group.stage);
    let stage = stage.ok_or_else(|| failure(FailureClass::Config, "no such stage"))?;
    let Work::Training(training) = &plan.stages[stage].work else {
        return Err(failure(FailureClass::Config, "it has no steps"));
    };
    let mut rank = Rank {
        bench,
        membership,
        stage,
        steps: training.steps,
        every: training.checkpoint_every,
        state: 0,
    };
    match rank.run().await {
        Ok(()) => Ok(Ending::Free),
        Err(Stop::Aborted) => Err(superseded()),
        Err(Stop::Draining(_)) => Ok(Ending::Drained),
        Err(Stop::Failed(failure)) => Err(failure),
    }
}

impl Rank<'_> {
    async fn run(&mut self) -> Result<(), Stop> {
        let group = self.membership.group.clone();
        self.bench.spend(10 + self.bench.chance(200)).await;
        self.bench
            .say(Event::GroupReady {
                group: group.clone(),
                rank: self.membership.rank,
                address: format!("w{}:{}", self.bench.worker, self.bench.pid.0),
            })
            .await;
        self.state = self.load().await?;
        let first = self
            .bench
            .world
            .scene
            .state(self.stage, self.membership.base_step);
        self.bench.world.require("I12", self.state == first, || {
            format!(
                "{group} starts step {} from another state",
                self.membership.base_step
            )
        });
        self.tell(Phase::Exchanging, self.membership.base_step)
            .await;
        loop {
            self.interrupted()?;
            let peers = |command: &Command| matches!(command, Command::Peers { group: other, .. } if *other == group);
            if self.bench.take(peers).is_some() {
                break;
            }
            if !self.bench.listen(None).await {
                return Err(Stop::Aborted);
            }
        }
        let (rank, pid) = (self.membership.rank, self.bench.pid);
        {
            let mut state = self.bench.world.state();
            state.applied.insert(pid, self.membership.base_step);
            let ring = state.rings.entry(group.clone()).or_default();
            ring.members.insert(rank, pid);
        }
        match self.train().await {
            Err(Stop::Draining(true)) => self.last_checkpoint().await,
            other => other,
        }
    }

    async fn train(&mut self) -> Result<(), Stop> {
        let mut step = self.membership.base_step;
        while step < self.steps {
            self.bench.spend(100 + self.bench.chance(500)).await;
            self.interrupted()?;
            if self.bench.mishap(300) {
                return Err(failure(FailureClass::Collective, "a mishap").into());
            }
            self.share(step);
            let sum = self.shares(step).await?;
            self.state = advance(self.state, step, sum);
            step += 1;
            self.applied(step);
            if step == self.steps && self.membership.rank != 0 {
                // Nothing is left to give up.
                self.bench.works_on(None, None);
            }
            self.tell(Phase::Stepping, step).await;
            let due = step.is_multiple_of(self.every) || step == self.steps;
            if self.membership.rank == 0 && due {
                self.save(step).await?;
            }
        }
        Ok(())
    }

    /// A drained group commits what it has, once.
    async fn last_checkpoint(&mut self) -> Result<(), Stop> {
        let step = self
            .bench
            .world
            .state()
            .applied
            .get(&self.bench.pid)
            .copied();
        if let Some(step) = step.filter(|&step| {
            self.membership.rank == 0
                && step > self.membership.base_step
                && !step.is_multiple_of(self.every)
        }) {
            self.save(step).await?;
        }
        Err(Stop::Draining(false))
    }

    fn interrupted(&mut self) -> Result<(), Stop> {
        let group = self.membership.group.clone();
        let ours = |command: &Command| matches!(command, Command::Abort { group: other, .. } if *other == group);
        if self.bench.take(ours).is_some() {
            return Err(Stop::Aborted);
        }
        match self.bench.draining() {
            Some(checkpoint) => Err(Stop::Draining(checkpoint)),
            None => Ok(()),
        }
    }

    /// Gives this rank's share of a step to all others.
    fn share(&mut self, step: u64) {
        let Membership { rank, world, .. } = *self.membership;
        let own = batch_share(BATCH, rank, world);
        let rows = step * BATCH + own.start..step * BATCH + own.end;
        let here = Host::Worker(self.bench.worker);
        let fleet = Arc::clone(&self.bench.world);
        let peers: Vec<_> = {
            let state = fleet.state();
            let members = state.rings.get(&self.membership.group);
            let members = members.into_iter().flat_map(|ring| ring.members.values());
            members.map(|pid| state.processes[pid].host).collect()
        };
        let arrives = peers
            .into_iter()
            .filter(|&host| host != here)
            .map(|host| {
                fleet.link_opens(here, host).max(moment())
                    + fleet.latency(self.bench.stream, here, host)
            })
            .max()
            .unwrap_or_else(moment);
        let share = Share {
            sum: contribution(self.stage, rows.clone()),
            rows,
            state: self.state,
            arrives,
        };
        let mut state = fleet.state();
        let ring = state
            .rings
            .entry(self.membership.group.clone())
            .or_default();
        ring.add(step, rank, share);
    }

    /// Waits for everybody's share of a step, and gives their sum.
    async fn shares(&mut self, step: u64) -> Result<u64, Stop> {
        let deadline = moment() + COLLECTIVE;
        loop {
            self.interrupted()?;
            let (complete, stirred, broken) = self.look(step);
            let mut until = deadline;
            if let Some((sum, arrived)) = complete {
                if moment() >= arrived {
                    return Ok(sum);
                }
                until = deadline.min(arrived);
            } else if broken {
                // The abort may still be on its way: the coordinator hears of a lost member when we do.
                self.bench.spend(100).await;
                self.interrupted()?;
                return Err(failure(FailureClass::Collective, "a peer is gone").into());
            }
            if moment() >= deadline {
                return Err(failure(FailureClass::Collective, "a peer is silent").into());
            }
            tokio::select! {
                biased;
                () = stirred.notified() => {}
                _ = self.bench.listen(Some(until)) => {}
            }
        }
    }

    /// The sum of a step and when it has arrived, what to wait for, and whether a peer is known to be gone.
    fn look(&self, step: u64) -> (Option<(u64, Instant)>, Arc<tokio::sync::Notify>, bool) {
        let world = &self.bench.world;
        let mut state = world.state();
        let ring = state
            .rings
            .entry(self.membership.group.clone())
            .or_default();
        let stirred = ring.stirred();
        let members: Vec<_> = ring.members.values().copied().collect();
        let complete = ring.complete(step, self.membership.world).map(|shares| {
            let sum = shares
                .values()
                .map(|share| share.sum)
                .fold(0, u64::wrapping_add);
            let arrived = shares.values().map(|share| share.arrives).max();
            let rows: Vec<_> = shares
                .values()
                .flat_map(|share| share.rows.clone())
                .collect();
            let agree = shares.values().all(|share| share.state == self.state);
            (sum, arrived.expect("a world has ranks"), rows, agree)
        });
        let broken = members.iter().any(|pid| {
            let process = &state.processes[pid];
            !process.alive && !process.silent
        });
        drop(state);
        let complete = complete.map(|(sum, arrived, rows, agree)| {
            let group = &self.membership.group;
            let all = (step * BATCH..(step + 1) * BATCH).collect::<Vec<_>>();
            world.require("I12", rows == all, || {
                format!("step {step} of {group} consumes {rows:?}")
            });
            world.require("I4", agree, || {
                format!("ranks of {group} differ before step {step}")
            });
            (sum, arrived)
        });
        (complete, stirred, broken)
    }

    /// I4: the state after a step follows from the step alone.
    fn applied(&self, step: u64) {
        let world = &self.bench.world;
        world.state().applied.insert(self.bench.pid, step);
        let (group, rank) = (&self.membership.group, self.membership.rank);
        world.happened(format_args!("{group} rank {rank} applied step {step}"));
        world.require(
            "I4",
            self.state == world.scene.state(self.stage, step),
            || format!("rank {rank} of {group} has another state after step {step}"),
        );
    }

    async fn tell(&self, phase: Phase, step: u64) {
        self.bench
            .say(Event::GroupProgress(Progress {
                group: self.membership.group.clone(),
                phase,
                step,
                total_steps: self.steps,
                loss: 1.0,
                samples_per_second: 1.0,
                step_ms: 300.0,
            }))
            .await;
    }

    /// The state to start from: the group's own checkpoint, the parent's student, or a fresh one.
    async fn load(&mut self) -> Result<u64, Failure> {
        let base = self.membership.base_checkpoint.clone();
        let Some(key) = base.clone().or(self.membership.parent_checkpoint.clone()) else {
            return Ok(FRESH);
        };
        let loaded = async {
            Checkpoint::open(&self.bench.store, &key)
                .await?
                .load()
                .await
        };
        let loaded = match loaded.await {
            Ok(loaded) => loaded,
            Err(error) => return Err(self.cannot_load(&key, &error)),
        };
        let state = loaded
            .tensors
            .first()
            .and_then(|(_, bytes)| bytes.first_chunk::<8>());
        let state =
            u64::from_le_bytes(*state.ok_or_else(|| failure(FailureClass::Schema, "no state"))?);
        Ok(if base.is_some() {
            state
        } else {
            inherit(state)
        })
    }

    /// I9: whoever is in the live group finds what it starts from.
    fn cannot_load(&self, key: &str, error: &checkpoint::Error) -> Failure {
        let transient = matches!(error, checkpoint::Error::Storage(e) if e.is_transient());
        if transient {
            return failure(FailureClass::Io, error);
        }
        let group = &self.membership.group;
        let live = {
            let state = self.bench.world.state();
            let log = state.ledger.fold.stage(&group.stage);
            let last = log.generations.last().map(|formed| formed.generation);
            last == Some(group.generation) && log.ended != last && log.sealed.is_none()
        };
        self.bench.world.require("I9", !live, || {
            format!("{group} cannot start from {key}: {error}")
        });
        failure(FailureClass::Stale, error)
    }

    async fn save(&mut self, step: u64) -> Result<(), Stop> {
        let group: &GroupId = &self.membership.group;
        let snapshot = Arc::new(Snapshot::capture(&State(self.state), None));
        let metrics = Bytes::from(format!("{{\"step\":{step}}}\n"));
        let manifest = checkpoint::write(
            &self.bench.store,
            &group.stage,
            step,
            group.generation,
            self.training(),
            &snapshot,
            metrics,
        )
        .await
        .map_err(|error| failure(FailureClass::Io, error))?;
        let body = manifest.to_bytes();
        let key = manifest.commit_key();
        let committed = CheckpointCommitted {
            group: group.clone(),
            step,
            key: key.as_str().to_owned(),
            digest: Digest::of(&body),
            bytes: manifest.total_bytes(),
            is_final: step == self.steps,
        };
        let request = CommitRequest {
            what: Committed::Checkpoint(committed),
            key,
            body,
            rows: 0,
            bytes: manifest.total_bytes(),
        };
        match self.bench.commit(request).await {
            CommitOutcome::Won => Ok(()),
            CommitOutcome::Lost | CommitOutcome::Expired => {
                Err(failure(FailureClass::Stale, "the generation had ended").into())
            }
            CommitOutcome::Failed(message) => Err(failure(FailureClass::Io, message).into()),
        }
    }

    fn training(&self) -> checkpoint::Training {
        checkpoint::Training {
            run: "simulation".into(),
            recipe_digest: Digest::of(b"recipe").to_string(),
            dataset_digest: None,
            parent: self.membership.parent_checkpoint.clone(),
            milestones: vec![],
            schedule: "simulation".into(),
            prediction_type: "epsilon".into(),
            skip: 1,
            seed: 0,
            global_batch: BATCH,
            lora: None,
            libtorch: "none".into(),
            cpu_capability: "none".into(),
        }
    }
}

/// The state as a checkpoint holds it.
struct State(u64);

impl StateSource for State {
    fn tensors(&self) -> Vec<TensorSpec> {
        vec![TensorSpec {
            kind: Kind::Student,
            name: "state".into(),
            dtype: Dtype::I64,
            shape: vec![1],
        }]
    }

    fn copy(&self, _: usize, start: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.0.to_le_bytes()[start..start + out.len()]);
    }
}

/// The state that a stored checkpoint's file holds.
pub(super) fn state_in(file: &[u8]) -> Option<u64> {
    file.last_chunk::<8>()
        .map(|bytes| u64::from_le_bytes(*bytes))
}
