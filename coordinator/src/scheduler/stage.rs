//! Stages: waiting for what they read, looking at what is there, working, sealing.

use std::collections::BTreeMap;
use std::time::Duration;

use distillery_common::group::GroupId;
use distillery_common::ids::{Digest, Generation};
use distillery_common::task::{CommitSummary, Lease, TaskId};

use super::action::Action;
use super::decision::Decision;
use super::durable::Formed;
use super::event::{Finding, Trouble};
use super::group::Group;
use super::machine::Machine;
use super::record::Record;
use super::task::Board;
use crate::plan::{Tasks, Training, Work};

/// Where a stage is.
#[derive(Debug, Clone)]
pub(super) enum State {
    /// Something it reads is not sealed.
    Blocked,
    /// The driver looks at what the store holds.
    Inspecting { tries: u32 },
    /// Tasks are leased.
    Tasks(Board),
    /// A group trains.
    Training(Group),
    /// The driver writes the manifest.
    Sealing {
        commits: BTreeMap<u64, CommitSummary>,
        tries: u32,
    },
    /// Terminal.
    Sealed,
}

impl State {
    pub(super) fn group(&self) -> Option<&Group> {
        match self {
            Self::Training(group) => Some(group),
            Self::Blocked
            | Self::Inspecting { .. }
            | Self::Tasks(_)
            | Self::Sealing { .. }
            | Self::Sealed => None,
        }
    }

    pub(super) fn group_mut(&mut self) -> Option<&mut Group> {
        match self {
            Self::Training(group) => Some(group),
            Self::Blocked
            | Self::Inspecting { .. }
            | Self::Tasks(_)
            | Self::Sealing { .. }
            | Self::Sealed => None,
        }
    }

    pub(super) fn board_mut(&mut self) -> Option<&mut Board> {
        match self {
            Self::Tasks(board) => Some(board),
            Self::Blocked
            | Self::Inspecting { .. }
            | Self::Training(_)
            | Self::Sealing { .. }
            | Self::Sealed => None,
        }
    }
}

impl Machine {
    /// Starts every stage whose inputs are sealed.
    pub(super) fn start_stages(&mut self, out: &mut Vec<Action>) {
        for at in 0..self.stages.len() {
            let is_ready = matches!(self.stages[at], State::Blocked)
                && self.plan.stages[at]
                    .after
                    .iter()
                    .all(|&input| matches!(self.stages[input], State::Sealed));
            if !is_ready {
                continue;
            }
            let stage = self.plan.stages[at].name.clone();
            if !self.durable.stage(&stage).started {
                self.journal(Record::StageStarted { stage }, out);
            }
            self.stages[at] = State::Inspecting { tries: 0 };
            out.push(self.inspection(at, 0));
        }
    }

    /// The driver says what the store holds of a stage.
    pub(super) fn inspected(
        &mut self,
        at: usize,
        finding: Result<Finding, Trouble>,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let work = self.plan.stages[at].work.clone();
        match (finding, work) {
            (Err(trouble), _) => self.inspect_again(at, trouble, out),
            (Ok(Finding::Tasks { sealed, .. }), Work::Tasks(_)) if sealed.is_some() => {
                let digest = sealed.expect("the guard has just seen it");
                if matches!(self.stages[at], State::Inspecting { .. }) {
                    self.seal_stage(at, digest, true, out);
                    self.revoke_done(at, out);
                }
            }
            (
                Ok(Finding::Tasks {
                    commits, unindexed, ..
                }),
                Work::Tasks(tasks),
            ) => {
                self.start_tasks(at, &tasks, (commits, unindexed), now, out);
                self.index(at, out);
            }
            (Ok(Finding::Checkpoints(mut found)), Work::Training(training)) => {
                found.sort();
                let log = self.durable.stage(&self.plan.stages[at].name);
                if let Some(newest) = log.newest(&found).cloned() {
                    self.accept(at, &newest, now, out);
                }
                self.start_training(at, &training, now, out);
            }
            (Ok(Finding::Tasks { .. }), Work::Training(_))
            | (Ok(Finding::Checkpoints(_)), Work::Tasks(_)) => {
                unreachable!("the driver looks for what the plan says the stage makes")
            }
        }
    }

    fn inspect_again(&mut self, at: usize, trouble: Trouble, out: &mut Vec<Action>) {
        let tries = match &mut self.stages[at] {
            State::Inspecting { tries } => {
                *tries += 1;
                *tries
            }
            State::Blocked
            | State::Tasks(_)
            | State::Training(_)
            | State::Sealing { .. }
            | State::Sealed => 3,
        };
        let again = self.inspection(at, self.timings.retry_ms(tries));
        let what = format!("looking at stage {}", self.plan.stages[at].name);
        self.retry_or_fail(trouble, &what, again, out);
    }

    fn start_tasks(
        &mut self,
        at: usize,
        tasks: &Tasks,
        (commits, unindexed): (BTreeMap<u64, CommitSummary>, Vec<u64>),
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        if !matches!(self.stages[at], State::Inspecting { .. }) {
            return;
        }
        let stage = self.plan.stages[at].name.clone();
        let log = self.durable.stage(&stage);
        let (quarantined, granted_below) = (log.quarantined.clone(), log.granted_below);
        let commits = commits
            .into_iter()
            .filter(|(index, _)| *index < tasks.count && !quarantined.contains(index))
            .collect();
        let mut board = Board::new(tasks.count, commits, quarantined);
        // A short life may commit too little for a part of the index: what it found goes into the next one's.
        board.unindexed = unindexed;
        // Workers that outlived the last coordinator said what they hold before we knew what is done.
        let held: Vec<_> = self
            .fleet
            .iter()
            .flat_map(|(_, worker)| &worker.leases)
            .filter(|lease| lease.task.stage == stage && board.is_open(lease.task.index))
            .cloned()
            .collect();
        held.into_iter().for_each(|lease| board.lease(lease, now));
        let reserved = self.reserve(at, &mut board, granted_below, now);
        out.push(Action::Explain(Decision::StageStarted {
            stage,
            done: board.done(),
            total: tasks.count,
        }));
        out.extend(reserved);
        self.stages[at] = State::Tasks(board);
        self.revoke_done(at, out);
    }

    /// Workers that outlived the last coordinator may hold what was found to be done, or what another one holds.
    fn revoke_done(&mut self, at: usize, out: &mut Vec<Action>) {
        let stage = self.plan.stages[at].name.clone();
        let held = self.fleet.iter().flat_map(|(_, worker)| &worker.leases);
        let of_stage = held.filter(|lease| lease.task.stage == stage).cloned();
        let of_stage: Vec<Lease> = of_stage.collect();
        for lease in of_stage {
            let counts = self
                .board(&lease.task)
                .is_some_and(|b| b.attempt(&lease).is_some());
            if !counts {
                self.revoke(lease, "another attempt has committed", out);
            }
        }
    }

    /// After a restart: keeps what workers of an earlier life may still hold for them, until they must have come
    /// back. What was never leased can be leased at once.
    fn reserve(
        &self,
        at: usize,
        board: &mut Board,
        granted_below: u64,
        now: Duration,
    ) -> Option<Action> {
        let wait = self.timings.reattach;
        let reserved: Vec<_> = board.pending.range(..granted_below).copied().collect();
        if wait.is_zero() || reserved.is_empty() {
            return None;
        }
        for &index in &reserved {
            board.postpone(index, now + wait);
        }
        Some(Action::Explain(Decision::Reserved {
            stage: self.plan.stages[at].name.clone(),
            tasks: reserved.len() as u64,
            wait,
        }))
    }

    /// The request to look at what the store holds of a stage.
    pub(super) fn inspection(&self, at: usize, after_ms: u64) -> Action {
        let below = self.durable.stage(&self.plan.stages[at].name).granted_below;
        Action::Inspect {
            stage: at,
            granted_below: (below > 0).then_some(below),
            after_ms,
        }
    }

    fn start_training(
        &mut self,
        at: usize,
        training: &Training,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let stage = self.plan.stages[at].name.clone();
        let log = self.durable.stage(&stage).clone();
        match &mut self.stages[at] {
            State::Training(Group::Gathering { inspected, .. }) => *inspected = true,
            State::Inspecting { .. } => {
                out.push(Action::Explain(Decision::StageStarted {
                    stage: stage.clone(),
                    done: log.newest(&[]).map_or(0, |checkpoint| checkpoint.step),
                    total: training.steps,
                }));
                let group = self.reattachable(&stage, now);
                if group.is_none() {
                    self.let_go(&stage, out);
                }
                self.stages[at] =
                    State::Training(group.unwrap_or_else(|| Group::gathering(now, true)));
            }
            State::Training(
                Group::Reattaching { .. } | Group::Exchanging { .. } | Group::Stepping { .. },
            )
            | State::Blocked
            | State::Tasks(_)
            | State::Sealing { .. }
            | State::Sealed => {}
        }
        self.reattached(at, now, out);
    }

    /// The group of the last life, if its members may still be at work.
    fn reattachable(&self, stage: &str, now: Duration) -> Option<Group> {
        let last = self.last_formed(stage)?;
        if self.timings.reattach.is_zero() || last.members.iter().all(|m| m.term() == self.term) {
            return None;
        }
        Some(Group::Reattaching {
            id: GroupId {
                stage: stage.to_owned(),
                generation: last.generation,
            },
            members: last.members.clone(),
            deadline: now + self.timings.reattach,
        })
    }

    /// The formation that a returning worker may still belong to.
    pub(super) fn last_generation(&self, stage: &str) -> Option<Generation> {
        self.last_formed(stage).map(|last| last.generation)
    }

    /// The last group of a stage, unless it is over: it ended, or one of its members went on to a younger group of
    /// whatever stage.
    fn last_formed(&self, stage: &str) -> Option<&Formed> {
        let log = self.durable.stage(stage);
        let last = log.generations.last()?;
        let all = self
            .durable
            .stages
            .values()
            .flat_map(|log| &log.generations);
        let went_on = all
            .filter(|other| other.generation > last.generation)
            .any(|other| other.members.iter().any(|m| last.members.contains(m)));
        let is_over = log.sealed.is_some() || log.ended == Some(last.generation) || went_on;
        (!is_over).then_some(last)
    }

    /// Members of a stage's last group that came back to it, although it turned out to be over, are free.
    fn let_go(&mut self, stage: &str, out: &mut Vec<Action>) {
        let Some(last) = self.durable.stage(stage).generations.last().cloned() else {
            return;
        };
        let id = GroupId {
            stage: stage.to_owned(),
            generation: last.generation,
        };
        self.release_members(&id, &last.members, "the group was given up", out);
    }

    /// The driver has read a task's COMMIT.
    pub(super) fn commit_verified(
        &mut self,
        task: &TaskId,
        commit: Result<Option<CommitSummary>, Trouble>,
        out: &mut Vec<Action>,
    ) {
        let retry = self.timings.clone();
        let Some(at) = self.plan.position(&task.stage) else {
            return;
        };
        let Some(board) = self.stages[at].board_mut() else {
            return;
        };
        let commit = match commit {
            Ok(commit) => commit,
            Err(trouble) => {
                let verification = board.verifying.entry(task.index).or_default();
                verification.tries += 1;
                let again = Action::VerifyCommit {
                    task: task.clone(),
                    after_ms: retry.retry_ms(verification.tries),
                };
                let what = format!("reading the COMMIT of {task}");
                self.retry_or_fail(trouble, &what, again, out);
                return;
            }
        };
        if commit.is_none() {
            let what = format!("{task} was reported committed, but has no COMMIT");
            out.push(Action::Explain(Decision::Ignored { what }));
        }
        let is_done = commit.is_some();
        let verification = board.verified(task.index, commit);
        let others = is_done.then(|| board.leased.remove(&task.index)).flatten();
        self.index(at, out);
        self.acknowledge(verification, out);
        for other in others.into_iter().flatten() {
            self.revoke(other.lease, "another attempt has committed", out);
        }
    }

    /// Hands the commit index its next part, once enough was committed for one.
    fn index(&mut self, at: usize, out: &mut Vec<Action>) {
        let enough = self.timings.indexed_at_once;
        let Some(board) = self.stages[at].board_mut() else {
            return;
        };
        if board.unindexed.len() < enough {
            return;
        }
        let indexed = std::mem::take(&mut board.unindexed).into_iter();
        let commits = indexed
            .filter_map(|index| Some((index, board.committed.get(&index)?.clone())))
            .collect();
        let part = board.index_parts;
        board.index_parts += 1;
        out.push(Action::Index {
            stage: at,
            term: self.term,
            part,
            commits,
        });
    }

    /// Seals task stages in which nothing is open.
    pub(super) fn seal_complete(&mut self, out: &mut Vec<Action>) {
        for at in 0..self.stages.len() {
            let Some(board) = self.stages[at].board_mut() else {
                continue;
            };
            if board.done() < board.count || !board.verifying.is_empty() {
                continue;
            }
            let commits = std::mem::take(&mut board.committed);
            out.push(Action::Seal {
                stage: at,
                commits: commits.clone(),
                after_ms: 0,
            });
            self.stages[at] = State::Sealing { commits, tries: 0 };
        }
    }

    /// The driver has sealed a task stage, or could not.
    pub(super) fn sealed(
        &mut self,
        at: usize,
        result: Result<Digest, Trouble>,
        out: &mut Vec<Action>,
    ) {
        let retry = self.timings.clone();
        let State::Sealing { commits, tries } = &mut self.stages[at] else {
            return;
        };
        match result {
            Ok(digest) => self.seal_stage(at, digest, false, out),
            Err(trouble) => {
                *tries += 1;
                let again = Action::Seal {
                    stage: at,
                    commits: commits.clone(),
                    after_ms: retry.retry_ms(*tries),
                };
                let what = format!("sealing stage {}", self.plan.stages[at].name);
                self.retry_or_fail(trouble, &what, again, out);
            }
        }
    }

    /// A stage is complete and immutable.
    pub(super) fn seal_stage(
        &mut self,
        at: usize,
        digest: Digest,
        cached: bool,
        out: &mut Vec<Action>,
    ) {
        let stage = self.plan.stages[at].name.clone();
        self.journal(
            Record::StageSealed {
                stage: stage.clone(),
                digest,
            },
            out,
        );
        out.push(Action::Explain(Decision::StageSealed { stage, cached }));
        self.stages[at] = State::Sealed;
    }
}
