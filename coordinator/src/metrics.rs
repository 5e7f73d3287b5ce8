//! What has happened so far, counted: events, decisions, messages, records. For people and Prometheus: nothing follows
//! from it.
//!
//! The driver tells what it sees; how the run *is* at a moment comes from its snapshot instead (`http`). Must never
//! decide anything, nor read the clock.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use distillery_common::task::{Failure, FailureClass};
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::scheduler::{Action, ConnectionId, Decision, Event, FromWorker, ToWorker, Why};

/// One label and its value.
pub(crate) type Labels = Vec<(&'static str, String)>;
type Counters = Family<Labels, Counter>;

/// Counts. Clones count together.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    received: Counters,
    sent: Counters,
    grants: Counters,
    commits: Counter,
    checkpoints: Counters,
    failures: Counters,
    retries: Counter,
    quarantined: Counter,
    formed: Counters,
    given_up: Counters,
    joined: Counters,
    lost: Counters,
    suspected: Counter,
    status: Counter,
    turned_away: Counters,
    records: Counter,
    append: Histogram,
    step: Histogram,
    beat_gap: Histogram,
    /// When each stream last brought a beat.
    beats: Arc<Mutex<BTreeMap<ConnectionId, Duration>>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("distillery");
        let seconds = |low| Histogram::new(exponential_buckets(low, 2.0, 16));
        let mut metrics = Self {
            registry: Arc::default(),
            received: Counters::default(),
            sent: Counters::default(),
            grants: Counters::default(),
            commits: Counter::default(),
            checkpoints: Counters::default(),
            failures: Counters::default(),
            retries: Counter::default(),
            quarantined: Counter::default(),
            formed: Counters::default(),
            given_up: Counters::default(),
            joined: Counters::default(),
            lost: Counters::default(),
            suspected: Counter::default(),
            status: Counter::default(),
            turned_away: Counters::default(),
            records: Counter::default(),
            append: seconds(0.0005),
            step: seconds(0.00001),
            beat_gap: seconds(0.05),
            beats: Arc::default(),
        };
        metrics.register_work(&mut registry);
        metrics.register_fleet(&mut registry);
        metrics.registry = Arc::new(registry);
        metrics.begin_at_zero();
        metrics
    }
}

impl Metrics {
    /// Series with known labels are there from the start, so that a rate sees the first of each.
    fn begin_at_zero(&self) {
        let begin = |counters: &Counters, label, values: &[&str]| {
            for value in values {
                drop(counters.get_or_create(&vec![(label, (*value).to_owned())]));
            }
        };
        begin(&self.grants, "why", &["next", "again", "straggler"]);
        begin(&self.joined, "how", &["new", "returned"]);
        begin(&self.lost, "how", &["goodbye", "lost"]);
        begin(&self.turned_away, "said", &["nothing", "something"]);
        let classes = FailureClass::ALL.map(|class| format!("{class:?}"));
        let classes: Vec<_> = classes.iter().map(String::as_str).collect();
        begin(&self.failures, "class", &classes);
    }

    fn register_work(&self, registry: &mut Registry) {
        let counters = [
            ("grants", "Tasks given to workers, by reason", &self.grants),
            (
                "checkpoints",
                "Checkpoints that count, by stage",
                &self.checkpoints,
            ),
            (
                "failures",
                "Failed attempts and members of groups, by class",
                &self.failures,
            ),
            (
                "generations_formed",
                "Training groups formed, by stage",
                &self.formed,
            ),
            (
                "generations_given_up",
                "Training groups given up, by stage",
                &self.given_up,
            ),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        let counters = [
            (
                "commits",
                "COMMITs of tasks that were verified",
                &self.commits,
            ),
            (
                "retries",
                "Attempts after which a task waits for another",
                &self.retries,
            ),
            (
                "quarantined_tasks",
                "Tasks set aside for bad input",
                &self.quarantined,
            ),
            (
                "journal_records",
                "Records made durable in the journal",
                &self.records,
            ),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        let append = "Time to make the records of one decision durable";
        registry.register("journal_append_seconds", append, self.append.clone());
        let step = "Time from an event to the end of what follows from it, journal included";
        registry.register("decision_seconds", step, self.step.clone());
    }

    fn register_fleet(&self, registry: &mut Registry) {
        let counters = [
            (
                "worker_messages_received",
                "Messages from workers, by kind",
                &self.received,
            ),
            (
                "worker_messages_sent",
                "Messages to workers, by kind",
                &self.sent,
            ),
            (
                "workers_joined",
                "Workers that joined or came back",
                &self.joined,
            ),
            (
                "workers_lost",
                "Workers that left, on purpose or not",
                &self.lost,
            ),
            (
                "connections_turned_away",
                "Connections that came to nothing: they said nothing, or never showed the token",
                &self.turned_away,
            ),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        let suspected = "Workers that fell silent and were given nothing new";
        registry.register("workers_suspected", suspected, self.suspected.clone());
        let status = "Times that somebody asked how the run is";
        registry.register("status_requests", status, self.status.clone());
        let gap = "Time between two beats of one worker";
        registry.register("beat_gap_seconds", gap, self.beat_gap.clone());
    }

    /// Something happened at `now`.
    pub fn heard(&self, now: Duration, event: &Event) {
        match event {
            Event::Said {
                connection,
                message,
            } => self.said(now, *connection, message),
            Event::Closed { connection } => {
                self.beats().remove(connection);
            }
            Event::CommitVerified {
                commit: Ok(Some(_)),
                ..
            } => drop(self.commits.inc()),
            _ => {}
        }
    }

    fn said(&self, now: Duration, connection: ConnectionId, message: &FromWorker) {
        let kind = match message {
            FromWorker::Beat { .. } => {
                let last = self.beats().insert(connection, now);
                if let Some(last) = last {
                    let gap = now.saturating_sub(last);
                    self.beat_gap.observe(gap.as_secs_f64());
                }
                "beat"
            }
            FromWorker::TaskCommitted { .. } => "task_committed",
            FromWorker::TaskFailed { failure, .. } => {
                self.failed(failure);
                "task_failed"
            }
            FromWorker::GroupReady { .. } => "group_ready",
            FromWorker::CheckpointCommitted { .. } => "checkpoint_committed",
            FromWorker::GroupFailed { failure, .. } => {
                self.failed(failure);
                "group_failed"
            }
            FromWorker::Goodbye { .. } => "goodbye",
        };
        count(&self.received, "kind", kind);
    }

    fn failed(&self, failure: &Failure) {
        count(&self.failures, "class", &format!("{:?}", failure.class));
    }

    /// This is to be done.
    pub fn acts(&self, action: &Action) {
        match action {
            Action::Send(_, message) => count(&self.sent, "kind", kind_sent(message)),
            Action::Explain(decision) => self.decided(decision),
            _ => {}
        }
    }

    fn decided(&self, decision: &Decision) {
        match decision {
            Decision::Granted { why, .. } => {
                let why = match why {
                    Why::Next => "next",
                    Why::Again => "again",
                    Why::Straggler { .. } => "straggler",
                };
                count(&self.grants, "why", why);
            }
            Decision::Retrying { .. } => drop(self.retries.inc()),
            Decision::Quarantined { .. } => drop(self.quarantined.inc()),
            Decision::Formed { group, .. } => count(&self.formed, "stage", &group.stage),
            Decision::Aborted { group, .. } => count(&self.given_up, "stage", &group.stage),
            Decision::Checkpoint { stage, .. } => count(&self.checkpoints, "stage", stage),
            Decision::Suspected { .. } => drop(self.suspected.inc()),
            Decision::Welcomed { returned, .. } => {
                let how = if *returned { "returned" } else { "new" };
                count(&self.joined, "how", how);
            }
            Decision::Lost { on_purpose, .. } => {
                let how = if *on_purpose { "goodbye" } else { "lost" };
                count(&self.lost, "how", how);
            }
            _ => {}
        }
    }

    /// So many records became durable, and it took so long.
    pub fn appended(&self, records: usize, took: Duration) {
        self.records.inc_by(records as u64);
        self.append.observe(took.as_secs_f64());
    }

    /// An event and all that follows from it took so long.
    pub fn stepped(&self, took: Duration) {
        self.step.observe(took.as_secs_f64());
    }

    /// Somebody asked how the run is.
    pub fn asked(&self) {
        self.status.inc();
    }

    /// A connection came to nothing, on which nothing was said or something.
    pub fn turned_away(&self, wordless: bool) {
        let said = if wordless { "nothing" } else { "something" };
        count(&self.turned_away, "said", said);
    }

    /// Adds all counts to `text`, in the text form of OpenMetrics without its end.
    pub fn write(&self, text: &mut String) -> fmt::Result {
        encode_registry(text, &self.registry)
    }

    fn beats(&self) -> std::sync::MutexGuard<'_, BTreeMap<ConnectionId, Duration>> {
        self.beats.lock().expect("no holder of this lock can panic")
    }
}

fn count(counters: &Counters, label: &'static str, value: &str) {
    counters
        .get_or_create(&vec![(label, value.to_owned())])
        .inc();
}

fn kind_sent(message: &ToWorker) -> &'static str {
    match message {
        ToWorker::Welcome { .. } => "welcome",
        ToWorker::BeatAck { .. } => "beat_ack",
        ToWorker::Grant(_) => "grant",
        ToWorker::Revoke { .. } => "revoke",
        ToWorker::GroupJoin(_) => "group_join",
        ToWorker::GroupPeers { .. } => "group_peers",
        ToWorker::GroupAbort { .. } => "group_abort",
        ToWorker::ReportAck { .. } => "report_ack",
        ToWorker::Drain { .. } => "drain",
    }
}
