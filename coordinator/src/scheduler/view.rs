//! What people see of the machine.

use std::time::Duration;

use distillery_common::group::{Phase, Progress};
use distillery_common::ids::{Incarnation, Term};

use super::fleet::{Link, Worker};
use super::group::Group;
use super::machine::Machine;
use super::run;
use super::stage::State;
use crate::plan::{Kind, Work};

/// The run at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// The coordinator's life.
    pub term: Term,
    /// `running`, `stopping` or how it ended.
    pub state: String,
    /// In plan order.
    pub stages: Vec<StageView>,
    /// By registration.
    pub workers: Vec<WorkerView>,
    /// What everything waits for, and what to do, where that is not plain.
    pub note: Option<String>,
}

/// A stage at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct StageView {
    /// Unique in the plan.
    pub name: String,
    /// What happens in it.
    pub kind: Kind,
    /// One word.
    pub state: &'static str,
    /// Tasks or steps done.
    pub done: u64,
    /// Tasks or steps in all.
    pub total: u64,
    /// Units that leased tasks have done and have to do, together.
    pub in_flight: (u64, u64),
    /// How far the group is.
    pub group: Option<Progress>,
    /// Members of the group.
    pub world: u32,
}

/// A worker at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerView {
    /// For people.
    pub name: String,
    /// Where it runs.
    pub host: String,
    /// What it computes on.
    pub device: String,
    /// Its registration.
    pub incarnation: Incarnation,
    /// One word.
    pub state: &'static str,
    /// What it holds.
    pub doing: String,
    /// How far it is with that.
    pub detail: String,
    /// How long it has been here.
    pub age: Duration,
    /// Memory of it and its engines.
    pub rss_bytes: u64,
    /// How long it was not heard.
    pub silent: Duration,
}

impl Machine {
    /// The run at `now`.
    pub fn view(&self, now: Duration) -> View {
        View {
            term: self.term,
            state: match &self.run {
                run::State::Running => "running".into(),
                run::State::Paused => "paused".into(),
                run::State::Stopping { .. } => "stopping".into(),
                run::State::Finished(outcome) => outcome.to_string(),
            },
            stages: (0..self.stages.len())
                .map(|at| self.stage_view(at))
                .collect(),
            workers: self.worker_views(now),
            note: self.note(),
        }
    }

    /// What everything waits for, and what to do, where that is not plain.
    fn note(&self) -> Option<String> {
        if let (run::State::Paused, Some(reason)) = (&self.run, &self.durable.paused) {
            return Some(format!(
                "paused: {reason}; `coordinator resume` lets it go on"
            ));
        }
        if !self.is_running() {
            return None;
        }
        if self.fleet.is_empty() {
            return Some("no worker is here; they join with `worker join`".into());
        }
        let stages = self.stages.iter().zip(&self.plan.stages);
        let is_at_work = |state: &State| {
            matches!(state, State::Training(group) if group.formed().is_some())
                || matches!(state, State::Tasks(board) if !board.leased.is_empty())
        };
        if self.stages.iter().any(is_at_work) {
            return None;
        }
        stages
            .into_iter()
            .find_map(|(state, stage)| match (state, &stage.work) {
                (State::Training(Group::Gathering { .. }), Work::Training(training)) => {
                    self.gathers(&stage.name, training.min_world as usize)
                }
                _ => None,
            })
    }

    fn gathers(&self, stage: &str, fewest: usize) -> Option<String> {
        let (free, here) = (self.fleet.free().count(), self.fleet.eligible());
        if here < fewest {
            return Some(format!(
                "stage {stage} waits for workers: {here} of at least {fewest} are here (cluster.workers.min)"
            ));
        }
        (free < fewest)
            .then(|| format!("stage {stage} waits for {fewest} engines to be ready: {free} are"))
    }

    fn stage_view(&self, at: usize) -> StageView {
        let stage = &self.plan.stages[at];
        let total = match &stage.work {
            Work::Tasks(tasks) => tasks.count,
            Work::Training(training) => training.steps,
        };
        let log = self.durable.stage(&stage.name);
        let committed = log.newest(&[]).map_or(0, |checkpoint| checkpoint.step);
        let mut view = StageView {
            name: stage.name.clone(),
            kind: stage.kind,
            state: "blocked",
            done: 0,
            total,
            in_flight: (0, 0),
            group: None,
            world: 0,
        };
        match &self.stages[at] {
            State::Blocked => {}
            State::Inspecting { .. } => view.state = "starting",
            State::Tasks(board) => {
                view.state = "active";
                view.done = board.done();
                view.in_flight = self.in_flight(&stage.name);
            }
            State::Training(group) => {
                view.done = committed;
                view.world = group
                    .formed()
                    .map_or(0, |(_, members)| members.len() as u32);
                view.state = match group {
                    Group::Gathering { .. } => "gathering",
                    Group::Reattaching { .. } => "reattaching",
                    Group::Exchanging { .. } => "connecting",
                    Group::Stepping { progress, .. } => {
                        view.done = progress
                            .as_ref()
                            .map_or(committed, |p| p.step.max(committed));
                        view.group.clone_from(progress);
                        "training"
                    }
                };
            }
            State::Sealing { .. } => {
                view.state = "sealing";
                view.done = total;
            }
            State::Sealed => {
                view.state = "sealed";
                view.done = total;
            }
        }
        view
    }

    fn in_flight(&self, stage: &str) -> (u64, u64) {
        self.fleet
            .iter()
            .filter(|(_, worker)| worker.leases.iter().any(|lease| lease.task.stage == stage))
            .filter_map(|(_, worker)| worker.progress)
            .fold((0, 0), |sum: (u64, u64), part| {
                (sum.0.saturating_add(part.0), sum.1.saturating_add(part.1))
            })
    }

    fn worker_views(&self, now: Duration) -> Vec<WorkerView> {
        self.fleet
            .iter()
            .map(|(incarnation, worker)| {
                let leases = worker.leases.iter().map(|lease| lease.task.to_string());
                let group = worker.group.iter().map(ToString::to_string);
                let doing: Vec<_> = leases.chain(group).collect();
                let detail = self.detail(worker);
                WorkerView {
                    name: worker.name.clone(),
                    host: worker.host.clone(),
                    device: worker.device.clone(),
                    incarnation,
                    state: match (worker.link, worker.draining, doing.is_empty()) {
                        (Link::Down(_), _, _) => "disconnected",
                        (Link::Up(_), _, _) if worker.suspect => "suspect",
                        (Link::Up(_), true, _) => "draining",
                        (Link::Up(_), false, true) => "idle",
                        (Link::Up(_), false, false) => "busy",
                    },
                    doing: doing.join(", "),
                    detail,
                    age: now.saturating_sub(worker.since),
                    rss_bytes: worker.rss_bytes,
                    silent: now.saturating_sub(worker.heard),
                }
            })
            .collect()
    }

    /// How far a worker is with what it holds.
    fn detail(&self, worker: &Worker) -> String {
        let mut parts = Vec::new();
        for lease in &worker.leases {
            parts.push(format!("attempt {}", lease.attempt));
        }
        let at = worker.group.as_ref().and_then(|id| self.live_group(id));
        match at.map(|at| self.stages[at].group()) {
            Some(Some(Group::Stepping {
                progress: Some(progress),
                ..
            })) => parts.push(format!(
                "{}, step {} of {}",
                phase(progress.phase),
                progress.step,
                progress.total_steps
            )),
            Some(Some(Group::Exchanging { .. })) => parts.push("connecting".into()),
            _ => {}
        }
        if let (Some((done, total)), false) = (worker.progress, worker.leases.is_empty()) {
            parts.push(format!("{done} of {total}"));
        }
        if worker.starting {
            parts.push("engine starting".into());
        }
        parts.join(", ")
    }
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Exchanging => "connecting",
        Phase::Syncing => "copying the state",
        Phase::Stepping => "stepping",
        Phase::Sealing => "writing the last checkpoint",
    }
}
