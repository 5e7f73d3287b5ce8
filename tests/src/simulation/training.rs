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
    self, CheckpointCommitted, GroupId, Held, Membership, Phase, Progress, batch_share,
};
use distillery_common::ids::Digest;
use distillery_common::proto::engine_link::{
    Command, CommitOutcome, CommitRequest, Committed, Event,
};
use distillery_common::storage::layout;
use distillery_common::task::{Failure, FailureClass};
use distillery_coordinator::plan::Work;

use super::engine::{Bench, failure, superseded};
use super::ring::{Hold, Ring, Share};
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
    /// Steps applied in `state`.
    step: u64,
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
        step: membership.base_step,
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
        self.sync().await?;
        match self.train().await {
            Err(Stop::Draining(true)) => self.last_checkpoint().await,
            other => other,
        }
    }

    /// Takes over the newest state that a member holds, or else the checkpoint's, which rank 0 reads for all.
    async fn sync(&mut self) -> Result<(), Stop> {
        let Membership { rank, world, .. } = *self.membership;
        let base = self.membership.base_checkpoint.as_deref();
        let base = base.and_then(layout::parse_checkpoint_commit);
        let base = base.map(|(_, step, generation)| Held { step, generation });
        let kept = self
            .bench
            .kept
            .filter(|(stage, held, _)| *stage == self.stage && held.continues(base));
        let hold = Hold {
            held: kept.map(|(_, held, _)| held),
            state: kept.map_or(0, |(_, _, state)| state),
            arrives: self.reaches_others(),
        };
        let pid = self.bench.pid;
        self.on_ring(|ring| {
            ring.members.insert(rank, pid);
            ring.hold(rank, hold);
        });
        let holds = self
            .wait(|ring| {
                let holds = ring.holds(world)?;
                let arrived = holds.iter().map(|hold| hold.arrives).max()?;
                Some((holds, arrived))
            })
            .await?;
        let held: Vec<_> = holds.iter().map(|hold| hold.held).collect();
        (self.step, self.state) = match group::source(&held) {
            Some(source) => {
                let hold = holds[source as usize];
                (hold.held.map_or(0, |held| held.step), hold.state)
            }
            None => self.loaded().await?,
        };
        self.agreed();
        Ok(())
    }

    /// The state that nobody holds: rank 0 reads it.
    async fn loaded(&mut self) -> Result<(u64, u64), Stop> {
        if self.membership.rank == 0 {
            let state = self.load().await?;
            let arrives = self.reaches_others();
            let step = self.membership.base_step;
            self.on_ring(|ring| {
                ring.loaded = Some((step, state, arrives));
                ring.stir();
            });
        }
        self.wait(|ring| {
            let (step, state, arrived) = ring.loaded?;
            Some(((step, state), arrived))
        })
        .await
    }

    /// The group goes on from here. I12: whoever held it, it is the state that this step leads to.
    fn agreed(&mut self) {
        let (group, step) = (&self.membership.group, self.step);
        let world = &self.bench.world;
        let follows = (self.membership.base_step..=self.steps).contains(&step)
            && self.state == world.scene.state(self.stage, step);
        world.require("I12", follows, || {
            format!("{group} starts step {step} from another state")
        });
        let rank = self.membership.rank;
        world.happened(format_args!("{group} rank {rank} goes on from step {step}"));
        self.keep();
    }

    /// Notes what this engine holds from now on.
    fn keep(&mut self) {
        let held = Held {
            step: self.step,
            generation: self.membership.group.generation,
        };
        self.bench.kept = Some((self.stage, held, self.state));
        let mut state = self.bench.world.state();
        state.applied.insert(self.bench.pid, self.step);
    }

    async fn train(&mut self) -> Result<(), Stop> {
        self.tell(Phase::Stepping, self.step).await;
        if self.step > self.membership.base_step {
            self.save_if_due().await?;
        }
        while self.step < self.steps {
            self.bench.spend(100 + self.bench.chance(500)).await;
            self.interrupted()?;
            if self.bench.mishap(300) {
                return Err(failure(FailureClass::Collective, "a mishap").into());
            }
            self.share(self.step);
            let sum = self.shares(self.step).await?;
            self.state = advance(self.state, self.step, sum);
            self.step += 1;
            self.keep();
            self.applied(self.step);
            self.tell(Phase::Stepping, self.step).await;
            self.save_if_due().await?;
        }
        Ok(())
    }

    async fn save_if_due(&mut self) -> Result<(), Stop> {
        let is_last = self.step == self.steps;
        match self.membership.rank {
            0 if is_last || self.step.is_multiple_of(self.every) => self.save(self.step).await,
            0 => Ok(()),
            _ => {
                if is_last {
                    // Nothing is left to give up.
                    self.bench.works_on(None, None);
                }
                Ok(())
            }
        }
    }

    /// A drained group commits what it has, once.
    async fn last_checkpoint(&mut self) -> Result<(), Stop> {
        let is_new = self.step > self.membership.base_step && !self.step.is_multiple_of(self.every);
        if is_new && self.membership.rank == 0 {
            self.save(self.step).await?;
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

    /// When something that is said now has reached every rank that is known.
    fn reaches_others(&self) -> Instant {
        let here = Host::Worker(self.bench.worker);
        let fleet = &self.bench.world;
        let peers: Vec<_> = {
            let state = fleet.state();
            let members = state.rings.get(&self.membership.group);
            let members = members.into_iter().flat_map(|ring| ring.members.values());
            members.map(|pid| state.processes[pid].host).collect()
        };
        peers
            .into_iter()
            .filter(|&host| host != here)
            .map(|host| {
                fleet.link_opens(here, host).max(moment())
                    + fleet.latency(self.bench.stream, here, host)
            })
            .max()
            .unwrap_or_else(moment)
    }

    fn on_ring<T>(&self, change: impl FnOnce(&mut Ring) -> T) -> T {
        let mut state = self.bench.world.state();
        let group = self.membership.group.clone();
        change(state.rings.entry(group).or_default())
    }

    /// Gives this rank's share of a step to all others.
    fn share(&mut self, step: u64) {
        let Membership { rank, world, .. } = *self.membership;
        let own = batch_share(BATCH, rank, world);
        let rows = step * BATCH + own.start..step * BATCH + own.end;
        let share = Share {
            sum: contribution(self.stage, rows.clone()),
            rows,
            state: self.state,
            arrives: self.reaches_others(),
        };
        self.on_ring(|ring| ring.add(step, rank, share));
    }

    /// Waits for everybody's share of a step, and gives their sum.
    async fn shares(&mut self, step: u64) -> Result<u64, Stop> {
        let world = self.membership.world;
        let shares = self
            .wait(|ring| {
                let shares: Vec<_> = ring.complete(step, world)?.values().cloned().collect();
                let arrived = shares.iter().map(|share| share.arrives).max()?;
                Some((shares, arrived))
            })
            .await?;
        let group = &self.membership.group;
        let rows: Vec<u64> = shares.iter().flat_map(|share| share.rows.clone()).collect();
        let all: Vec<u64> = (step * BATCH..(step + 1) * BATCH).collect();
        let fleet = &self.bench.world;
        fleet.require("I12", rows == all, || {
            format!("step {step} of {group} consumes {rows:?}")
        });
        let agree = shares.iter().all(|share| share.state == self.state);
        fleet.require("I4", agree, || {
            format!("ranks of {group} differ before step {step}")
        });
        Ok(shares
            .iter()
            .map(|share| share.sum)
            .fold(0, u64::wrapping_add))
    }

    /// Waits for what `look` finds on the ring, and until it has arrived.
    async fn wait<T>(&mut self, look: impl Fn(&Ring) -> Option<(T, Instant)>) -> Result<T, Stop> {
        let deadline = moment() + COLLECTIVE;
        loop {
            self.interrupted()?;
            let (found, stirred) = self.on_ring(|ring| (look(ring), ring.stirred()));
            let mut until = deadline;
            if let Some((found, arrived)) = found {
                if moment() >= arrived {
                    return Ok(found);
                }
                until = deadline.min(arrived);
            } else if self.misses_a_peer() {
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

    /// Whether a rank that was there is known to be gone.
    fn misses_a_peer(&self) -> bool {
        let state = self.bench.world.state();
        let members = state.rings.get(&self.membership.group);
        let mut members = members.into_iter().flat_map(|ring| ring.members.values());
        members.any(|pid| {
            let process = &state.processes[pid];
            !process.alive && !process.silent
        })
    }

    /// I4: the state after a step follows from the step alone.
    fn applied(&self, step: u64) {
        let world = &self.bench.world;
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
