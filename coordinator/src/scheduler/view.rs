//! What people see of the machine.

use std::time::Duration;

use distillery_common::group::Progress;
use distillery_common::ids::{Incarnation, Term};

use super::fleet::Link;
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
    /// Its registration.
    pub incarnation: Incarnation,
    /// One word.
    pub state: &'static str,
    /// What it holds.
    pub doing: String,
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
        }
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
                WorkerView {
                    name: worker.name.clone(),
                    host: worker.host.clone(),
                    incarnation,
                    state: match (worker.link, worker.draining, doing.is_empty()) {
                        (Link::Down(_), _, _) => "disconnected",
                        (Link::Up(_), _, _) if worker.suspect => "suspect",
                        (Link::Up(_), true, _) => "draining",
                        (Link::Up(_), false, true) => "idle",
                        (Link::Up(_), false, false) => "busy",
                    },
                    doing: doing.join(", "),
                    rss_bytes: worker.rss_bytes,
                    silent: now.saturating_sub(worker.heard),
                }
            })
            .collect()
    }
}
