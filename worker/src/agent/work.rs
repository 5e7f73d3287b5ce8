//! What the agent does when the coordinator or the engine says something.

use bytes::Bytes;
use distillery_common::group::Membership;
use distillery_common::ids::Digest;
use distillery_common::proto::engine_link::{
    Command, CommitOutcome, CommitRequest, Committed, Event, Setup,
};
use distillery_common::storage::{self, Created};
use distillery_common::task::{CommitSummary, Failure, FailureClass, Lease, Remedy};
use tokio::time::Instant;

use super::client::FromCoordinator;
use super::outbox::Report;
use super::{Agent, Ended, FAILED_STARTS, OBEY, Put, Seat, now};
use crate::engine_process::{Exit, FromEngine, Output, Program, Request};

impl Agent {
    /// Acts on what the coordinator said.
    pub(super) fn coordinator_said(&mut self, message: FromCoordinator) {
        let moment = now();
        self.heard = moment;
        match message {
            FromCoordinator::Welcome(_) => tracing::error!("a second welcome on one stream"),
            FromCoordinator::BeatAck(seq) => self.held.beat_acknowledged(seq),
            FromCoordinator::ReportAck(seq) => self.outbox.acknowledge(seq),
            FromCoordinator::Grant(lease) => self.granted(lease, moment),
            FromCoordinator::Revoke(lease, reason) => {
                tracing::info!(%lease, reason, "revoked");
                if self.held.release(&lease) {
                    self.end(Ended::Task(lease), moment);
                }
            }
            FromCoordinator::Join(membership) => self.joined(membership, moment),
            FromCoordinator::Peers(group, addresses) => {
                if self.held.member_of(&group).is_some() {
                    self.tell(Command::Peers { group, addresses });
                }
            }
            FromCoordinator::Abort(group, reason) => {
                if self.held.member_of(&group).is_some() {
                    self.leave_group(&reason, moment);
                }
            }
            FromCoordinator::Drain {
                checkpoint,
                returns,
                reason,
            } => {
                self.returns |= returns;
                self.depart(&reason, checkpoint);
            }
        }
    }

    fn granted(&mut self, lease: Lease, moment: Instant) {
        if Some(lease.incarnation) != self.incarnation {
            tracing::warn!(%lease, "granted to another registration of this worker; ignored");
            return;
        }
        if self.departure.is_some() {
            self.report(Report::TaskFailed {
                failure: preempted("the worker is leaving"),
                lease,
            });
            return;
        }
        for stale in self.held.take_foreign(lease.incarnation) {
            self.end(Ended::Task(stale), moment);
        }
        tracing::info!(%lease, "granted");
        self.held.grant(lease.clone());
        self.tell(Command::Start(lease));
    }

    fn joined(&mut self, membership: Membership, moment: Instant) {
        let group = membership.group.clone();
        if self.departure.is_some() {
            self.report(Report::GroupFailed {
                group,
                rank: membership.rank,
                failure: preempted("the worker is leaving"),
            });
            return;
        }
        if let Some(member) = self.held.member() {
            let known = &member.membership.group;
            if known.generation >= group.generation {
                tracing::warn!(%group, %known, "asked to join an older generation; ignored");
                return;
            }
            self.leave_group("a later generation was formed", moment);
        }
        tracing::info!(%group, rank = membership.rank, world = membership.world, "joining");
        self.held.join(membership.clone());
        self.tell(Command::Join(membership));
    }

    /// Leaves the group, if there is one; the engine must follow in time unless it has nothing more to do.
    pub(super) fn leave_group(&mut self, reason: &str, moment: Instant) {
        let Some(member) = self.held.leave() else {
            return;
        };
        let finished = member.is_finished();
        let group = member.membership.group;
        tracing::info!(%group, reason, "leaving the group");
        self.tell(Command::Abort {
            group: group.clone(),
            reason: reason.to_owned(),
        });
        if !finished && matches!(self.seat, Seat::Taken { .. }) {
            self.ending.insert(Ended::Group(group), moment + OBEY);
        }
    }

    /// Makes the engine stop a task that is no longer held.
    pub(super) fn end(&mut self, what: Ended, moment: Instant) {
        if let Ended::Task(lease) = &what {
            self.tell(Command::Cancel(lease.clone()));
        }
        if matches!(self.seat, Seat::Taken { .. }) {
            self.ending.insert(what, moment + OBEY);
        }
    }

    fn tell(&self, command: Command) {
        if let Seat::Taken { engine, .. } = &self.seat {
            engine.tell(command);
        }
    }

    pub(super) fn kill_engine(&mut self, why: &str) {
        if let Seat::Taken { engine, .. } = &self.seat {
            tracing::warn!(engine = engine.id, why, "killing the engine");
            engine.kill();
        }
        self.ending.clear();
    }

    /// Starts an engine where there is none, and gives it what is held.
    pub(super) fn fill_seat(&mut self, moment: Instant) -> anyhow::Result<()> {
        let Seat::Empty(at) = self.seat else {
            return Ok(());
        };
        let Some((run_uri, _)) = self.run.as_ref().filter(|_| moment >= at) else {
            return Ok(());
        };
        self.engines += 1;
        let program = Program {
            path: self.config.engine.clone(),
            device: self.device,
            threads: self.config.threads,
            advertise: self.advertise,
        };
        let setup = Setup {
            run_uri: run_uri.clone(),
            worker: self.name.clone(),
            incarnation: self.incarnation.unwrap_or_default(),
            group_secret: self.group_secret,
        };
        let outputs = self.outputs.0.clone();
        let started = self
            .outside
            .start_engine(self.engines, &program, setup, outputs);
        let engine = started.map_err(|error| {
            let path = program.path.display();
            anyhow::anyhow!("the engine {path} cannot be started: {error}")
        })?;
        tracing::info!(engine = engine.id, pid = engine.pid(), "started the engine");
        for lease in self.held.leases() {
            engine.tell(Command::Start(lease.clone()));
        }
        if let Some(member) = self.held.member() {
            engine.tell(Command::Join(member.membership.clone()));
        }
        self.seat = Seat::Taken {
            engine,
            ready: false,
        };
        Ok(())
    }

    /// Acts on what engine `id` put out.
    pub(super) fn engine_output(&mut self, id: u64, output: Output) -> anyhow::Result<()> {
        let Seat::Taken { engine, .. } = &self.seat else {
            return Ok(());
        };
        if engine.id != id {
            return Ok(());
        }
        match output {
            Output::Said(FromEngine::Event(event)) => self.engine_said(event),
            Output::Said(FromEngine::Commit(request)) => self.asked_to_commit(id, request),
            Output::Exited(exit) => self.engine_exited(&exit)?,
        }
        Ok(())
    }

    fn engine_said(&mut self, event: Event) {
        match event {
            Event::Ready {
                device,
                device_name,
                libtorch_version,
            } => {
                tracing::info!(device, device_name, libtorch_version, "the engine is ready");
                self.failed_starts = 0;
                if let Seat::Taken { ready, .. } = &mut self.seat {
                    *ready = true;
                }
                self.beat(now());
            }
            Event::Progress { lease, done, total } => self.held.progressed(&lease, done, total),
            Event::TaskFailed { lease, failure } => {
                self.ending.remove(&Ended::Task(lease.clone()));
                if self.held.release(&lease) {
                    tracing::warn!(%lease, %failure, "the task failed");
                    let failure = self.with_output(failure);
                    self.report(Report::TaskFailed { lease, failure });
                }
            }
            Event::GroupReady {
                group,
                rank,
                address,
            } => {
                if self.held.member_of(&group).is_some() {
                    self.report(Report::GroupReady {
                        group,
                        rank,
                        address,
                    });
                }
            }
            Event::GroupProgress(progress) => {
                if self.held.progressed_in_group(progress) {
                    self.beat(now());
                }
            }
            Event::GroupFailed {
                group,
                rank,
                failure,
            } => {
                self.ending.remove(&Ended::Group(group.clone()));
                if self.held.member_of(&group).is_some() {
                    tracing::warn!(%group, %failure, "the engine left its group");
                    self.held.leave();
                    let failure = self.with_output(failure);
                    self.report(Report::GroupFailed {
                        group,
                        rank,
                        failure,
                    });
                }
            }
        }
    }

    /// A failure of the living engine, with its last output unless it is none of its faults.
    fn with_output(&self, failure: Failure) -> Failure {
        match (failure.class.remedy(), &self.seat) {
            (Remedy::RetryFree, _) | (_, Seat::Empty(_)) => failure,
            (_, Seat::Taken { engine, .. }) => failure.with_output(&engine.tail()),
        }
    }

    /// Puts a COMMIT if what it ends is still this agent's.
    fn asked_to_commit(&mut self, engine: u64, request: Request) {
        let live = match &request.commit.what {
            Committed::Task(lease) => self.held.is_live(lease, now()),
            Committed::Checkpoint(checkpoint) => self.held.member_of(&checkpoint.group).is_some(),
        };
        let store = self.run.as_ref().map(|(_, store)| store.clone());
        let Some(store) = store.filter(|_| live) else {
            if let Committed::Task(lease) = &request.commit.what {
                tracing::warn!(%lease, "not committed: the lease had ended");
                self.ending.remove(&Ended::Task(lease.clone()));
            }
            self.answer(engine, request.id, &CommitOutcome::Expired);
            return;
        };
        let puts = self.puts.0.clone();
        tokio::spawn(async move {
            let CommitRequest { key, body, .. } = &request.commit;
            let result = store.create(key, body.clone()).await;
            let _ = puts
                .send(Put {
                    engine,
                    request,
                    result,
                })
                .await;
        });
    }

    /// Reports what became of a COMMIT and tells the engine.
    pub(super) fn commit_put(&mut self, put: Put) {
        let outcome = match &put.result {
            Ok(Created::Won) => CommitOutcome::Won,
            Ok(Created::Exists(_)) => CommitOutcome::Lost,
            Err(error) => CommitOutcome::Failed(error.to_string()),
        };
        tracing::info!(key = %put.request.commit.key, ?outcome, "put a COMMIT");
        match put.request.commit.what.clone() {
            Committed::Task(lease) => self.task_put(lease, &put.request.commit, put.result),
            Committed::Checkpoint(checkpoint) if outcome == CommitOutcome::Won => {
                if let Some(member) = self.held.member_of(&checkpoint.group) {
                    member.sealed |= checkpoint.is_final;
                }
                self.report(Report::CheckpointCommitted(checkpoint));
            }
            // The engine knows whether it can go on without this checkpoint.
            Committed::Checkpoint(_) => {}
        }
        self.answer(put.engine, put.request.id, &outcome);
    }

    fn task_put(
        &mut self,
        lease: Lease,
        commit: &CommitRequest,
        result: Result<Created, storage::Error>,
    ) {
        self.held.release(&lease);
        self.ending.remove(&Ended::Task(lease.clone()));
        let committed = |body: &Bytes| CommitSummary {
            key: commit.key.as_str().to_owned(),
            rows: commit.rows,
            bytes: commit.bytes,
            digest: Digest::of(body),
        };
        self.report(match result {
            Ok(Created::Won) => Report::TaskCommitted {
                commit: committed(&commit.body),
                lease,
                won: true,
            },
            Ok(Created::Exists(winner)) => Report::TaskCommitted {
                commit: committed(&winner),
                lease,
                won: false,
            },
            Err(error) => Report::TaskFailed {
                lease,
                failure: Failure {
                    class: FailureClass::Io,
                    message: format!("the COMMIT could not be put: {error}"),
                },
            },
        });
    }

    fn answer(&self, engine: u64, request: u64, outcome: &CommitOutcome) {
        if let Seat::Taken { engine: seated, .. } = &self.seat
            && seated.id == engine
        {
            seated.answer(request, outcome);
        }
    }

    fn engine_exited(&mut self, exit: &Exit) -> anyhow::Result<()> {
        let ready = matches!(self.seat, Seat::Taken { ready: true, .. });
        self.ending.clear();
        let moment = now();
        if self.departure.is_some() {
            self.seat = Seat::Empty(moment);
            self.nothing_in_hand();
            return Ok(());
        }
        self.failed_starts = if ready { 0 } else { self.failed_starts + 1 };
        if ready {
            self.restart.reset();
        }
        let jitter = self.jitter();
        self.seat = Seat::Empty(moment + self.restart.next_delay(jitter));
        // Before anything is reported: what is decided then should count on this worker no more.
        self.beat(moment);
        let failure = engine_failure(&self.name, exit, ready);
        tracing::warn!(%failure, "the engine ended");
        self.give_back(&failure);
        anyhow::ensure!(
            self.failed_starts < FAILED_STARTS,
            "the engine ended {FAILED_STARTS} times before it was ready: {}",
            failure.message
        );
        Ok(())
    }
}

/// An engine that something outside killed, or that never got as far as its task, is no fault of the task; any other
/// end may be.
fn engine_failure(worker: &str, exit: &Exit, was_ready: bool) -> Failure {
    let class = if exit.killed || !was_ready {
        FailureClass::HostLost
    } else {
        FailureClass::Unknown
    };
    let message = format!("the engine of worker {worker} {}", exit.how);
    Failure { class, message }.with_output(&exit.tail)
}

fn preempted(message: &str) -> Failure {
    Failure {
        class: FailureClass::Preempted,
        message: message.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_does_not_pay_for_an_engine_that_never_started() {
        let exit = |killed| Exit {
            how: "exited with code 1".into(),
            killed,
            clean: false,
            tail: vec!["no CUDA here".into()],
        };
        let class = |killed, was_ready| engine_failure("w", &exit(killed), was_ready).class;
        assert_eq!(class(false, false), FailureClass::HostLost);
        assert_eq!(class(true, true), FailureClass::HostLost);
        assert_eq!(class(false, true), FailureClass::Unknown);
        let message = engine_failure("w", &exit(false), false).message;
        assert!(message.ends_with("\n  no CUDA here"), "{message}");
    }
}
