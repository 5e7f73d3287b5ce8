//! The last failures with what the engines printed, for people. Text never decides anything.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use distillery_common::task::{Failure, Remedy};

use crate::scheduler::{ConnectionId, Event, FromWorker};

/// Failures that are kept.
const KEPT: usize = 20;
/// Lines of output that the log shows of each; the whole of it is in `status`, and all that was printed in the store.
const LOGGED: usize = 20;

/// One failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailureSeen {
    /// Name of the worker.
    pub worker: String,
    /// A task, or a formation of a group.
    pub what: String,
    /// What happened, in one line.
    pub message: String,
    /// The last lines of the engine's output.
    pub output: String,
    /// When, since this process began.
    pub at: Duration,
}

/// The last failures, newest last.
#[derive(Debug, Default)]
pub(super) struct Failures {
    names: BTreeMap<ConnectionId, String>,
    seen: VecDeque<FailureSeen>,
}

impl Failures {
    /// Takes in what happened at `now`, and logs the output of an engine that failed.
    pub(super) fn heard(&mut self, now: Duration, event: &Event) {
        match event {
            Event::Arrived { connection, hello } => {
                self.names.insert(*connection, hello.name.clone());
            }
            Event::Closed { connection } => {
                self.names.remove(connection);
            }
            Event::Said {
                connection,
                message: FromWorker::TaskFailed { lease, failure, .. },
            } => self.note(now, *connection, lease.to_string(), failure),
            Event::Said {
                connection,
                message: FromWorker::GroupFailed { group, failure, .. },
            } => self.note(now, *connection, group.to_string(), failure),
            _ => {}
        }
    }

    fn note(&mut self, now: Duration, from: ConnectionId, what: String, failure: &Failure) {
        let is_told = failure.class.remedy() == Remedy::RetryFree && failure.below().is_empty();
        if is_told {
            return;
        }
        let worker = self.names.get(&from).cloned().unwrap_or_default();
        let output = failure.below().trim_start_matches('\n').to_owned();
        if !output.is_empty() {
            let lines: Vec<_> = output.lines().collect();
            let shown = lines[lines.len().saturating_sub(LOGGED)..].join("\n");
            tracing::warn!("the last output of the engine of worker {worker}:\n{shown}");
        }
        if self.seen.len() == KEPT {
            self.seen.pop_front();
        }
        self.seen.push_back(FailureSeen {
            worker,
            what,
            message: failure.to_string(),
            output,
            at: now,
        });
    }

    pub(super) fn seen(&self) -> Vec<FailureSeen> {
        self.seen.iter().cloned().collect()
    }
}
