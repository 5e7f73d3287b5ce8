//! What the API server says of the Job and its pods, cut down to what decisions need.

use std::time::Duration;

use kube::api::DynamicObject;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

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
    /// How its container ended: exit code, if one is said, and last words.
    pub(super) ended: Option<(Option<i32>, String)>,
}

impl SeenPod {
    pub(super) fn is_over(&self) -> bool {
        self.phase == "Succeeded" || self.phase == "Failed"
    }
}

/// The parts of a status that are read. The whole types would make this program half as large again.
///
/// Each part stands for itself: what is missing, null or of another form counts as not said, and takes nothing else along.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    #[serde(deserialize_with = "lenient")]
    phase: String,
    #[serde(deserialize_with = "lenient_list")]
    conditions: Vec<Condition>,
    #[serde(deserialize_with = "lenient_list")]
    container_statuses: Vec<Container>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Condition {
    #[serde(rename = "type", deserialize_with = "lenient")]
    kind: String,
    #[serde(deserialize_with = "lenient")]
    status: String,
    #[serde(deserialize_with = "lenient")]
    reason: String,
    #[serde(deserialize_with = "lenient")]
    message: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Container {
    #[serde(deserialize_with = "lenient")]
    name: String,
    #[serde(deserialize_with = "lenient")]
    state: State,
}

/// How a container is: at most one of these.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct State {
    #[serde(deserialize_with = "lenient")]
    waiting: Option<Why>,
    #[serde(deserialize_with = "lenient")]
    terminated: Option<Why>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Why {
    #[serde(deserialize_with = "lenient")]
    exit_code: Option<i32>,
    #[serde(deserialize_with = "lenient")]
    reason: String,
    #[serde(deserialize_with = "lenient")]
    message: String,
}

fn lenient<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned + Default,
{
    let value = Value::deserialize(from)?;
    Ok(T::deserialize(value).unwrap_or_default())
}

fn lenient_list<'de, D, T>(from: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let values: Vec<Value> = lenient(from)?;
    let read = values.into_iter().map(T::deserialize);
    Ok(read.filter_map(Result::ok).collect())
}

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
fn ended(why: &Why) -> (Option<i32>, String) {
    let words = if why.message.is_empty() {
        &why.reason
    } else {
        &why.message
    };
    (why.exit_code, words.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(object: Value) -> DynamicObject {
        serde_json::from_value(object).expect("an object")
    }

    /// Go writes an empty list as null, and a field that another version knows may be missing or more than text.
    #[test]
    fn what_is_null_missing_or_strange_takes_nothing_else_along() {
        let found = read(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "w-0", "uid": "u", "labels": null, "ownerReferences": null},
            "status": {
                "phase": "Failed", "conditions": [
                    null, 7, {"type": "Ready", "status": null, "reason": null, "message": {}},
                    {"type": "DisruptionTarget", "status": "True", "reason": "Evicted", "message": null},
                ],
                "containerStatuses": [
                    null, {"name": null, "state": null},
                    {"name": CONTAINER, "state": {
                        "waiting": null, "running": null,
                        "terminated": {"exitCode": 137, "reason": "OOMKilled", "message": null, "signal": null},
                    }},
                ],
            },
        }));
        let seen = pod(&found);
        assert_eq!((seen.name.as_str(), seen.phase.as_str()), ("w-0", "Failed"));
        assert_eq!(seen.disrupted.as_deref(), Some("Evicted"));
        assert_eq!(seen.ended, Some((Some(137), "OOMKilled".into())));
        assert_eq!((seen.waiting, seen.unplaced), (None, None));
        assert!(!is_of(&found, "job"));
    }

    #[test]
    fn an_exit_code_that_is_not_said_is_not_a_good_one() {
        for terminated in [
            json!({"reason": "ContainerStatusUnknown"}),
            json!({"exitCode": null, "reason": "ContainerStatusUnknown"}),
            json!({"exitCode": "?", "reason": "ContainerStatusUnknown"}),
        ] {
            let found = read(json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {},
                "status": {"containerStatuses": [{"name": CONTAINER, "state": {"terminated": terminated}}]},
            }));
            let words = "ContainerStatusUnknown".to_owned();
            assert_eq!(pod(&found).ended, Some((None, words)));
        }
    }

    #[test]
    fn nulls_in_place_of_everything_are_a_pod_of_which_nothing_is_known() {
        let nothing = [
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {}}),
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": null}, "status": null}),
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {}, "status": {
                "phase": null, "conditions": null, "containerStatuses": null}}),
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {}, "status": {
                "phase": [], "conditions": {}, "containerStatuses": "?"}}),
        ];
        for object in nothing {
            assert_eq!(pod(&read(object.clone())), SeenPod::default(), "{object}");
        }
        let mark = "settings";
        let found = read(json!({
            "apiVersion": "batch/v1", "kind": "Job",
            "metadata": {"uid": "j", "annotations": {SETTINGS: mark}},
            "status": {"conditions": [{"type": "Failed", "status": "True", "reason": "X", "message": null}]},
        }));
        let seen = job(&found, mark);
        assert!(seen.current && !seen.leaving);
        let (reason, message) = ("X".to_owned(), String::new());
        assert_eq!(seen.finished, Some(Finished::Failed { reason, message }));
    }
}
