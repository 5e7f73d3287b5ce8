//! What the cluster holds: objects with versions, what watches are told, and what is done to it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::kubelet::Running;
use super::{Program, Ways};

/// Events that watches may still ask for.
const HISTORY: usize = 500;

/// One kind of request, or what a Role allows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// `get`, `list`, `watch`, `create`, `patch` or `delete`.
    pub verb: String,
    /// Empty for the core group.
    pub group: String,
    /// Plural, with a subresource after a slash.
    pub resource: String,
}

/// A refusal that waits for a request.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// Which request.
    pub verb: &'static str,
    /// Of which resource.
    pub resource: &'static str,
    /// HTTP status.
    pub code: u16,
    /// Seconds in `Retry-After`, if any.
    pub retry_after: Option<u32>,
}

/// What the job controller remembers of an index.
#[derive(Debug, Default, Clone)]
pub(super) struct Index {
    pub(super) succeeded: bool,
    pub(super) failures: u32,
    pub(super) not_before: Duration,
}

/// Everything.
#[derive(Debug)]
pub struct World {
    pub(super) ways: Ways,
    pub(super) program: Program,
    pub(super) folder: PathBuf,
    version: u64,
    oldest: u64,
    pub(super) jobs: BTreeMap<String, Value>,
    pub(super) pods: BTreeMap<String, Value>,
    pub(super) secrets: BTreeMap<String, Value>,
    pub(super) indexes: BTreeMap<(String, usize), Index>,
    pub(super) processes: BTreeMap<String, Running>,
    pub(super) events: VecDeque<(u64, &'static str, Value)>,
    /// Nodes without power.
    pub(super) dead: BTreeSet<String>,
    /// When the node controller makes pods of dead nodes leave, by pod uid.
    pub(super) doomed: BTreeMap<String, Duration>,
    /// Requests that were allowed.
    pub asked: BTreeSet<Rule>,
    /// Requests that the Role did not allow.
    pub forbidden: Vec<Rule>,
    /// Refusals to come.
    pub refusals: Vec<Refusal>,
    /// How many requests were refused that way.
    pub refused: usize,
    /// Watches that ended because their version was too old.
    pub expired: usize,
    /// How many pods were made.
    pub made: usize,
    /// Uids of Jobs that were made.
    pub jobs_made: Vec<String>,
}

impl World {
    /// Whether the account may do it.
    pub(super) fn allows(&self, rule: &Rule) -> bool {
        let role = self.ways.role.as_ref();
        role.is_none_or(|role| role.contains(rule))
    }

    pub(super) fn new(ways: Ways, program: Program, folder: &Path) -> Self {
        Self {
            ways,
            program,
            folder: folder.to_owned(),
            version: 1,
            oldest: 0,
            jobs: BTreeMap::new(),
            pods: BTreeMap::new(),
            secrets: BTreeMap::new(),
            indexes: BTreeMap::new(),
            processes: BTreeMap::new(),
            events: VecDeque::new(),
            dead: BTreeSet::new(),
            doomed: BTreeMap::new(),
            asked: BTreeSet::new(),
            forbidden: Vec::new(),
            refusals: Vec::new(),
            refused: 0,
            expired: 0,
            made: 0,
            jobs_made: Vec::new(),
        }
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn is_too_old(&self, version: u64) -> bool {
        version < self.oldest
    }

    /// Forgets what changed before now.
    pub(super) fn compact(&mut self) {
        self.version += 1;
        self.oldest = self.version;
        self.events.clear();
    }

    /// A name for an object that none had before.
    pub(super) fn uid(&mut self) -> String {
        self.version += 1;
        format!("00000000-0000-4000-8000-{:012}", self.version)
    }

    /// Gives `object` the next version.
    pub(super) fn touch(&mut self, object: &mut Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
    }

    /// Keeps a pod and tells the watches.
    pub(super) fn put_pod(&mut self, mut pod: Value) {
        self.touch(&mut pod);
        let name = text(&pod, "/metadata/name");
        let kind = if self.pods.contains_key(&name) {
            "MODIFIED"
        } else {
            "ADDED"
        };
        self.tell(kind, pod.clone());
        self.pods.insert(name, pod);
    }

    /// Takes a pod away and tells the watches.
    pub(super) fn drop_pod(&mut self, name: &str) {
        if let Some(mut pod) = self.pods.remove(name) {
            self.touch(&mut pod);
            self.tell("DELETED", pod);
        }
    }

    fn tell(&mut self, kind: &'static str, pod: Value) {
        self.events.push_back((self.version, kind, pod));
        while self.events.len() > HISTORY {
            self.events.pop_front();
        }
    }

    /// A change to a pod that is there.
    pub(super) fn change_pod(&mut self, name: &str, change: impl FnOnce(&mut Value)) {
        if let Some(mut pod) = self.pods.get(name).cloned() {
            change(&mut pod);
            self.put_pod(pod);
        }
    }

    /// Asks a pod to go, with a grace in place of its own if one is given. One that nothing holds goes at once.
    pub(super) fn delete_pod(&mut self, name: &str, grace: Option<i64>) {
        let Some(pod) = self.pods.get(name) else {
            return;
        };
        let own = pod["spec"]["terminationGracePeriodSeconds"]
            .as_i64()
            .unwrap_or(30);
        let grace = grace.unwrap_or(own);
        let is_bound = pod["spec"]["nodeName"].is_string();
        let is_held = pod["metadata"]["finalizers"]
            .as_array()
            .is_some_and(|all| !all.is_empty());
        if (grace == 0 || !is_bound || is_over(pod)) && !is_held {
            self.drop_pod(name);
            return;
        }
        self.change_pod(name, |pod| {
            pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
            if !is_bound {
                // Nobody will ever start it.
                pod["status"]["phase"] = json!("Failed");
            }
        });
    }

    /// The eviction API: marks the pod and asks it to go.
    pub fn evict(&mut self, name: &str) {
        self.change_pod(name, |pod| {
            condition(
                pod,
                "DisruptionTarget",
                "True",
                "EvictionByEvictionAPI",
                "eviction",
            );
        });
        self.delete_pod(name, None);
    }

    /// The node of a pod.
    pub fn node_of(&self, pod: &str) -> Option<String> {
        let pod = self.pods.get(pod)?;
        Some(pod["spec"]["nodeName"].as_str()?.to_owned())
    }

    /// The process of a pod's container.
    pub fn pid_of(&self, pod: &str) -> Option<u32> {
        self.processes.get(pod).map(Running::pid)
    }

    /// Cuts the power of a node: all on it ends at once, and its kubelet says nothing any more.
    pub fn power_off(&mut self, node: &str) {
        self.dead.insert(node.to_owned());
        let names: Vec<String> = self
            .pods
            .iter()
            .filter(|(_, pod)| pod["spec"]["nodeName"] == node)
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            if let Some(mut process) = self.processes.remove(&name) {
                process.kill();
            }
        }
    }

    /// Takes a Job away with all that belongs to it.
    pub(super) fn delete_job(&mut self, name: &str) {
        let Some(job) = self.jobs.remove(name) else {
            return;
        };
        self.version += 1;
        let uid = text(&job, "/metadata/uid");
        self.indexes.retain(|(of, _), _| *of != uid);
        self.secrets.retain(|_, secret| !belongs_to(secret, &uid));
        let orphans = self.pods.iter().filter(|(_, pod)| belongs_to(pod, &uid));
        let names: Vec<String> = orphans.map(|(name, _)| name.clone()).collect();
        for name in names {
            self.change_pod(&name, |pod| pod["metadata"]["finalizers"] = json!([]));
            self.delete_pod(&name, None);
        }
    }

    /// The pods that run now, by name.
    pub fn running(&self) -> Vec<String> {
        let alive = |pod: &Value| {
            pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null()
        };
        let running = self.pods.iter().filter(|(_, pod)| alive(pod));
        running.map(|(name, _)| name.clone()).collect()
    }

    /// All pods by name, with their phases.
    pub fn phases(&self) -> BTreeMap<String, String> {
        let phase = |pod: &Value| text(pod, "/status/phase");
        self.pods
            .iter()
            .map(|(name, pod)| (name.clone(), phase(pod)))
            .collect()
    }

    /// Whether a pod is being deleted.
    pub fn is_leaving(&self, pod: &str) -> bool {
        self.pods
            .get(pod)
            .is_some_and(|pod| pod["metadata"]["deletionTimestamp"].is_string())
    }

    /// Names of the Jobs.
    pub fn jobs(&self) -> Vec<String> {
        self.jobs.keys().cloned().collect()
    }

    /// Deletes a Job as a person would.
    pub fn delete_a_job(&mut self, name: &str) {
        self.delete_job(name);
    }

    /// Names of the Secrets.
    pub fn secrets(&self) -> Vec<String> {
        self.secrets.keys().cloned().collect()
    }

    /// A Job as it is stored.
    pub fn job(&self, name: &str) -> Option<&Value> {
        self.jobs.get(name)
    }

    /// Lets containers begin with the right command line from now on.
    pub fn correct_program(&mut self) {
        self.program.before.clear();
    }

    /// Changes where pods find room.
    pub fn set_room(&mut self, room: super::Room) {
        self.ways.room = room;
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        format!("{:?}", self.phases())
    }
}

/// The text at a JSON pointer; empty when there is none.
pub(super) fn text(value: &Value, pointer: &str) -> String {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

/// Whether a pod has ended.
pub(super) fn is_over(pod: &Value) -> bool {
    pod["status"]["phase"] == "Succeeded" || pod["status"]["phase"] == "Failed"
}

/// Whether an object is owned by that of `uid`.
pub(super) fn belongs_to(object: &Value, uid: &str) -> bool {
    let owners = object["metadata"]["ownerReferences"].as_array();
    owners
        .into_iter()
        .flatten()
        .any(|owner| owner["uid"] == uid)
}

/// Sets a condition of a pod's status.
pub(super) fn condition(pod: &mut Value, kind: &str, status: &str, reason: &str, message: &str) {
    let new = json!({ "type": kind, "status": status, "reason": reason, "message": message });
    let mut all: Vec<Value> = pod["status"]["conditions"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    all.retain(|condition| condition["type"] != kind);
    all.push(new);
    pod["status"]["conditions"] = json!(all);
}
