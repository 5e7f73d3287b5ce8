//! What the API server says of the Job and its pods, cut down to what decisions need.

use std::time::Duration;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

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

/// The job `found`, made from `settings` or not.
pub(super) fn job(found: &Job, settings: &str) -> SeenJob {
    let meta = &found.metadata;
    let conditions = found
        .status
        .iter()
        .flat_map(|s| s.conditions.iter().flatten());
    let finished = conditions
        .filter(|condition| condition.status == "True")
        .find_map(|condition| match condition.type_.as_str() {
            "Complete" => Some(Finished::Complete),
            "Failed" => Some(Finished::Failed {
                reason: condition.reason.clone().unwrap_or_default(),
                message: condition.message.clone().unwrap_or_default(),
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
pub(super) fn is_of(pod: &Pod, job: &str) -> bool {
    let owners = pod.metadata.owner_references.iter().flatten();
    owners.into_iter().any(|owner| owner.uid == job)
}

/// What matters of a pod.
pub(super) fn pod(found: &Pod) -> SeenPod {
    let meta = &found.metadata;
    let status = found.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    let condition = |kind: &str, value: &str| {
        conditions
            .iter()
            .find(|c| c.type_ == kind && c.status == value)
    };
    let container = status
        .container_statuses
        .unwrap_or_default()
        .into_iter()
        .find(|container| container.name == CONTAINER);
    let grace = meta.deletion_grace_period_seconds.unwrap_or_default();
    SeenPod {
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        phase: status.phase.unwrap_or_default(),
        leaving: meta
            .deletion_timestamp
            .as_ref()
            .map(|_| Duration::from_secs(u64::try_from(grace).unwrap_or_default())),
        waiting: container.as_ref().and_then(waiting),
        unplaced: condition("PodScheduled", "False").map(|c| c.message.clone().unwrap_or_default()),
        disrupted: condition("DisruptionTarget", "True")
            .map(|c| c.reason.clone().unwrap_or_default()),
        ended: container.as_ref().and_then(ended),
    }
}

fn waiting(container: &ContainerStatus) -> Option<(String, String)> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    Some((
        waiting.reason.clone().unwrap_or_default(),
        waiting.message.clone().unwrap_or_default(),
    ))
}

fn ended(container: &ContainerStatus) -> Option<(i32, String)> {
    let ended = container.state.as_ref()?.terminated.as_ref()?;
    let words = ended.message.clone().or_else(|| ended.reason.clone());
    Some((ended.exit_code, words.unwrap_or_default()))
}
