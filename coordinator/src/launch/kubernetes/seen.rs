//! What the API server says of the Job and its pods, cut down to what decisions need.

use std::time::Duration;

use kube::api::DynamicObject;
use serde::Deserialize;

use super::objects::{CONTAINER, SETTINGS};

/// One look at the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// The Job of the run's name, if there is one.
    pub(super) job: Option<SeenJob>,
    /// The Job's pods, by name.
    pub(super) pods: Vec<SeenPod>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SeenJob {
    pub(super) uid: String,
    /// Whether it was made from the settings that hold now.
    pub(super) current: bool,
    /// It is being deleted.
    pub(super) leaving: bool,
    pub(super) finished: Option<Finished>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Finished {
    /// Every worker has left.
    Complete,
    /// No pod is started any more.
    Failed { reason: String, message: String },
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SeenPod {
    pub(super) name: String,
    pub(super) uid: String,
    /// `Pending`, `Running`, `Succeeded` or `Failed`.
    pub(super) phase: String,
    /// It is being deleted, and has so long to end.
    pub(super) leaving: Option<Duration>,
    /// Why its container does not start: reason and message.
    pub(super) waiting: Option<(String, String)>,
    /// Why it is placed nowhere.
    pub(super) unplaced: Option<String>,
    /// Why it was made to leave.
    pub(super) disrupted: Option<String>,
    /// How its container ended: code and last words.
    pub(super) ended: Option<(i32, String)>,
}

impl SeenPod {
    pub(super) fn is_over(&self) -> bool {
        self.phase == "Succeeded" || self.phase == "Failed"
    }
}

/// The parts of a status that are read. The whole types would make this program half as large again.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    phase: String,
    conditions: Vec<Condition>,
    container_statuses: Vec<Container>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
    message: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Container {
    name: String,
    state: State,
}

/// How a container is: at most one of these.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct State {
    waiting: Option<Why>,
    terminated: Option<Why>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Why {
    exit_code: i32,
    reason: String,
    message: String,
}

/// What is not understood counts as not said.
fn status(found: &DynamicObject) -> Status {
    let status = found.data.get("status");
    status.map_or_else(Status::default, |status| {
        Status::deserialize(status).unwrap_or_default()
    })
}

/// The Job `found`, made from `settings` or not.
pub(super) fn job(found: &DynamicObject, settings: &str) -> SeenJob {
    let meta = &found.metadata;
    let held = status(found).conditions.into_iter();
    let finished = held
        .filter(|condition| condition.status == "True")
        .find_map(|condition| match condition.kind.as_str() {
            "Complete" => Some(Finished::Complete),
            "Failed" => Some(Finished::Failed {
                reason: condition.reason,
                message: condition.message,
            }),
            _ => None,
        });
    let marked = meta.annotations.as_ref().and_then(|all| all.get(SETTINGS));
    SeenJob {
        uid: meta.uid.clone().unwrap_or_default(),
        current: marked.is_some_and(|mark| mark == settings),
        leaving: meta.deletion_timestamp.is_some(),
        finished,
    }
}

/// Whether `pod` belongs to the Job of this uid.
pub(super) fn is_of(pod: &DynamicObject, job: &str) -> bool {
    let mut owners = pod.metadata.owner_references.iter().flatten();
    owners.any(|owner| owner.uid == job)
}

/// What matters of a pod.
pub(super) fn pod(found: &DynamicObject) -> SeenPod {
    let meta = &found.metadata;
    let status = status(found);
    let condition = |kind: &str, value: &str| {
        let mut all = status.conditions.iter();
        all.find(|condition| condition.kind == kind && condition.status == value)
    };
    let own = status.container_statuses.iter();
    let state = own
        .filter(|container| container.name == CONTAINER)
        .map(|container| &container.state)
        .next();
    let grace = meta.deletion_grace_period_seconds.unwrap_or_default();
    let grace = Duration::from_secs(u64::try_from(grace).unwrap_or_default());
    SeenPod {
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        leaving: meta.deletion_timestamp.as_ref().map(|_| grace),
        waiting: state
            .and_then(|state| state.waiting.as_ref())
            .map(|why| (why.reason.clone(), why.message.clone())),
        unplaced: condition("PodScheduled", "False").map(|found| found.message.clone()),
        disrupted: condition("DisruptionTarget", "True").map(|found| found.reason.clone()),
        ended: state.and_then(|state| state.terminated.as_ref()).map(ended),
        phase: status.phase,
    }
}

/// Exit code and last words; a container without any has a reason, such as `OOMKilled`.
fn ended(why: &Why) -> (i32, String) {
    let words = if why.message.is_empty() {
        &why.reason
    } else {
        &why.message
    };
    (why.exit_code, words.trim_end().to_owned())
}
