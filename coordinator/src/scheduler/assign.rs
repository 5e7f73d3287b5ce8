//! Workers come, talk and go; idle ones get work.

use std::time::Duration;

use distillery_common::group::GroupId;
use distillery_common::ids::Incarnation;
use distillery_common::task::{Lease, TaskId};

use super::action::{Action, ToWorker};
use super::decision::Decision;
use super::event::{ConnectionId, FromWorker, Hello};
use super::fleet::{Link, Worker};
use super::group::{self, Group};
use super::machine::Machine;
use super::stage::State;

impl Machine {
    /// A worker introduces itself.
    pub(super) fn arrive(
        &mut self,
        connection: ConnectionId,
        hello: Hello,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let kept = hello.incarnation.filter(|&held| self.may_return(held));
        let incarnation = kept.unwrap_or_else(|| self.register());
        if self.fleet.get(incarnation).is_some() {
            let old = self.fleet.connect(incarnation, connection, now);
            out.extend(old.map(Action::Close));
            self.fleet
                .update(incarnation, |worker| worker.starting = hello.starting);
        } else {
            if self.fleet.is_empty() {
                // Nobody was looked for, so that no look is overdue.
                self.swept = now;
            }
            let worker = Worker {
                name: hello.name.clone(),
                host: hello.host.clone(),
                link: Link::Up(connection),
                heard: now,
                suspect: false,
                device: hello.device.clone(),
                since: now,
                slots: hello.slots.max(1),
                leases: Default::default(),
                group: None,
                draining: false,
                starting: hello.starting,
                rss_bytes: 0,
                progress: None,
            };
            self.fleet.insert(incarnation, worker);
        }
        out.push(Action::Send(connection, ToWorker::Welcome { incarnation }));
        out.push(Action::Explain(Decision::Welcomed {
            worker: hello.name.clone(),
            incarnation,
            returned: kept.is_some(),
        }));
        if kept.is_some() {
            self.reconcile_leases(incarnation, &hello.leases, now, out);
            self.reconcile_group(incarnation, hello.group, now, out);
        }
        if self.is_stopping() {
            self.drain(incarnation, true, "the run is stopping", out);
        } else if self.fleet.get(incarnation).is_some_and(|w| w.draining) {
            // It may not have heard so: the message may have been lost with the last stream.
            self.drain(incarnation, true, "asked to leave", out);
        }
    }

    /// Whether a registration still counts: it is known, or it is of an earlier life and was not lost in this one.
    fn may_return(&self, held: Incarnation) -> bool {
        self.fleet.get(held).is_some()
            || (held.term() < self.term && held.term().0 > 0 && !self.fleet.is_fenced(held))
    }

    fn register(&mut self) -> Incarnation {
        self.registrations += 1;
        Incarnation::new(self.term, self.registrations)
    }

    /// Makes what a returning worker holds and what we think it holds the same.
    fn reconcile_leases(
        &mut self,
        holder: Incarnation,
        held: &[Lease],
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let known = self.fleet.get(holder).map(|w| w.leases.clone());
        for lease in known.unwrap_or_default() {
            if !held.contains(&lease) {
                self.release(&lease);
            }
        }
        for lease in held {
            if self
                .fleet
                .get(holder)
                .is_some_and(|w| w.leases.contains(lease))
            {
                continue;
            }
            if self.adoptable(lease, holder) {
                if let Some(board) = self.board(&lease.task) {
                    board.lease(lease.clone(), now);
                }
                self.fleet.update(holder, |worker| {
                    worker.leases.insert(lease.clone());
                });
            } else {
                let revoke = ToWorker::Revoke {
                    lease: lease.clone(),
                    reason: "the lease has ended".into(),
                };
                self.send(holder, revoke, out);
            }
        }
    }

    /// Whether `lease` may be one that an earlier life gave `holder`, of a task that is open. Those of this life are
    /// known.
    fn adoptable(&self, lease: &Lease, holder: Incarnation) -> bool {
        let task = &lease.task;
        let Some(at) = self.plan.position(&task.stage) else {
            return false;
        };
        if lease.incarnation != holder || lease.term >= self.term {
            return false;
        }
        match &self.stages[at] {
            State::Inspecting { .. } => true,
            State::Tasks(board) => board.is_open(task.index),
            State::Blocked | State::Training(_) | State::Sealing { .. } | State::Sealed => false,
        }
    }

    /// The same for the group; then looks at every group that waits for its members.
    fn reconcile_group(
        &mut self,
        member: Incarnation,
        held: Option<GroupId>,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        self.reconcile_membership(member, held, now, out);
        for at in 0..self.stages.len() {
            self.reattached(at, now, out);
        }
    }

    fn reconcile_membership(
        &mut self,
        member: Incarnation,
        held: Option<GroupId>,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let known = self
            .fleet
            .get(member)
            .and_then(|worker| worker.group.clone());
        if known == held && known.is_some() {
            return;
        }
        if let Some(id) = &known
            && let Some(at) = self.live_group(id)
        {
            self.abort(at, "a member came back without its group", true, now, out);
        }
        let Some(id) = held else {
            return;
        };
        let may_go_on =
            self.last_generation(&id.stage) == Some(id.generation) && self.awaits(&id, member);
        if may_go_on {
            self.fleet
                .update(member, |worker| worker.group = Some(id.clone()));
        } else {
            let abort = ToWorker::GroupAbort {
                group: id,
                reason: "the group was given up".into(),
            };
            self.send(member, abort, out);
        }
    }

    /// Whether the group `id` of an earlier life may still want `member`.
    fn awaits(&self, id: &GroupId, member: Incarnation) -> bool {
        let Some(at) = self.plan.position(&id.stage) else {
            return false;
        };
        let log = self.durable.stage(&id.stage);
        let is_member = log
            .generations
            .last()
            .is_some_and(|last| last.members.contains(&member));
        let is_awaited = matches!(self.stages[at], State::Inspecting { .. })
            || matches!(self.stages[at], State::Training(Group::Reattaching { .. }));
        is_member && is_awaited && !self.timings.reattach.is_zero()
    }

    /// Lets a group go on when all its members are back, and gives it up when one came back without it: that one
    /// is free for another group.
    pub(super) fn reattached(&mut self, at: usize, now: Duration, out: &mut Vec<Action>) {
        let Some(Group::Reattaching { id, members, .. }) = self.stages[at].group() else {
            return;
        };
        let back: Vec<bool> = members
            .iter()
            .filter_map(|&member| self.fleet.get(member))
            .map(|worker| worker.group.as_ref() == Some(id))
            .collect();
        if back.contains(&false) {
            self.abort(at, "a member came back without its group", false, now, out);
        } else if back.len() == members.len() {
            let group = group::stepping(id.clone(), members.clone(), None, now);
            self.stages[at] = State::Training(group);
        }
    }

    /// A worker says something; gives back whether decisions may change.
    pub(super) fn said(
        &mut self,
        connection: ConnectionId,
        message: FromWorker,
        now: Duration,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some((who, was_suspect)) = self.heard(connection, now, out) else {
            return false;
        };
        match message {
            FromWorker::Beat {
                seq,
                tasks,
                group,
                rss_bytes,
                starting,
                leaving,
            } => {
                let progress = tasks.first().map(|task| (task.done, task.total));
                if leaving {
                    self.fleet.update(who, |worker| worker.draining = true);
                }
                let changed = self.fleet.note(who, rss_bytes, progress, starting);
                if let Some(progress) = group {
                    self.group_progress(who, progress, now, out);
                }
                self.send(who, ToWorker::BeatAck { seq }, out);
                return changed || was_suspect;
            }
            FromWorker::TaskCommitted { seq, lease } => {
                self.task_committed(who, seq, &lease, now, out);
            }
            FromWorker::TaskFailed {
                seq,
                lease,
                failure,
            } => {
                self.task_failed(who, &lease, failure, now, out);
                self.send(who, ToWorker::ReportAck { seq }, out);
            }
            FromWorker::GroupReady {
                seq,
                group,
                rank,
                address,
            } => {
                self.group_ready((who, rank), &group, address, now, out);
                self.send(who, ToWorker::ReportAck { seq }, out);
            }
            FromWorker::CheckpointCommitted { seq, checkpoint } => {
                let key = (checkpoint.group.clone(), checkpoint.step);
                let is_first = !self.checkpoints.contains_key(&key);
                let verification = self.checkpoints.entry(key).or_default();
                verification.reports.insert((who, seq));
                if is_first {
                    out.push(Action::VerifyCheckpoint {
                        checkpoint,
                        after_ms: 0,
                    });
                }
            }
            FromWorker::GroupFailed {
                seq,
                group,
                rank,
                failure,
            } => {
                self.group_failed((who, rank), &group, &failure, now, out);
                self.send(who, ToWorker::ReportAck { seq }, out);
            }
            FromWorker::Goodbye { reason } => {
                let cause = format!("it said goodbye: {reason}");
                self.lose_worker(who, &cause, false, now, out);
            }
        }
        true
    }

    /// The worker that speaks on `connection`, which is no longer suspect, and whether it had been; streams that do not
    /// count are ended.
    fn heard(
        &mut self,
        connection: ConnectionId,
        now: Duration,
        out: &mut Vec<Action>,
    ) -> Option<(Incarnation, bool)> {
        let Some(who) = self.fleet.at(connection) else {
            out.push(Action::Close(connection));
            return None;
        };
        let was_suspect = self.fleet.heard(who, now);
        if was_suspect && let Some(worker) = self.fleet.get(who) {
            let worker = worker.name.clone();
            out.push(Action::Explain(Decision::Cleared { worker }));
        }
        Some((who, was_suspect))
    }

    /// Whoever reports a COMMIT is believed once it was read; the lease no longer matters. It ends if its holder says
    /// so, and goes on while somebody else does.
    fn task_committed(
        &mut self,
        who: Incarnation,
        seq: u64,
        lease: &Lease,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        self.fleet.update(who, |worker| {
            worker.leases.remove(lease);
        });
        let index = lease.task.index;
        let Some(board) = self.board(&lease.task) else {
            if !self.is_inspecting(&lease.task) {
                self.send(who, ToWorker::ReportAck { seq }, out);
            }
            return;
        };
        let since = board.attempt(lease).map(|attempt| attempt.since);
        if let Some(since) = since.filter(|_| lease.incarnation == who) {
            board.lived(now.saturating_sub(since));
        }
        if index >= board.count || board.committed.contains_key(&index) {
            self.send(who, ToWorker::ReportAck { seq }, out);
            return;
        }
        if board.quarantined.contains(&index) {
            let what = format!("COMMIT of {}, which was set aside", lease.task);
            out.push(Action::Explain(Decision::Ignored { what }));
            self.send(who, ToWorker::ReportAck { seq }, out);
        } else if board.verify(lease, who, seq) {
            out.push(Action::VerifyCommit {
                task: lease.task.clone(),
                after_ms: 0,
            });
        }
    }

    /// Whether what is stored of the task's stage is being looked at, so that a report cannot be judged yet: it is
    /// not acknowledged, and comes again with the next stream, or is found in the store.
    fn is_inspecting(&self, task: &TaskId) -> bool {
        self.plan
            .position(&task.stage)
            .is_some_and(|at| matches!(self.stages[at], State::Inspecting { .. }))
    }

    /// The one place where a worker is lost, whatever the cause.
    pub(super) fn lose_worker(
        &mut self,
        incarnation: Incarnation,
        cause: &str,
        counts: bool,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let connection = self.fleet.connection(incarnation);
        let Some(worker) = self.fleet.remove(incarnation) else {
            return;
        };
        out.extend(connection.map(Action::Close));
        for lease in &worker.leases {
            if let Some(board) = self.board(&lease.task) {
                board.release(lease);
            }
        }
        out.push(Action::Explain(Decision::Lost {
            worker: worker.name.clone(),
            incarnation,
            cause: cause.to_owned(),
            requeued: worker.leases.len(),
            // What counts against nobody was said by the worker itself.
            on_purpose: !counts,
        }));
        if let Some(id) = &worker.group
            && let Some(at) = self.live_group(id)
        {
            let reason = format!("worker {} left: {cause}", worker.name);
            let counts = counts && !self.is_stopping() && self.loss_counts(at);
            self.abort(at, &reason, counts, now, out);
        }
    }

    /// Ends a lease on both sides.
    pub(super) fn release(&mut self, lease: &Lease) {
        self.fleet.update(lease.incarnation, |worker| {
            worker.leases.remove(lease);
        });
        if let Some(board) = self.board(&lease.task) {
            board.release(lease);
        }
    }

    /// Tells a holder to stop.
    pub(super) fn revoke(&mut self, lease: Lease, reason: &str, out: &mut Vec<Action>) {
        let holder = lease.incarnation;
        self.fleet.update(holder, |worker| {
            worker.leases.remove(&lease);
        });
        let revoke = ToWorker::Revoke {
            lease,
            reason: reason.to_owned(),
        };
        self.send(holder, revoke, out);
    }
}
