//! What follows from a look at the cluster: a function of what is seen, who is heard, and what was seen before.
//!
//! Kubernetes replaces pods that ended. Two things are left to us. A pod on a dead node stays `Terminating` for ever, and
//! nothing takes its place: it is released here, once its worker is not heard either. And a wait that will not end by
//! itself must be told: an image that cannot be pulled, a pod that fits nowhere, a worker that dies again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::cluster;
use super::objects::{TRY_AGAIN, USAGE};
use super::seen::{Finished, Seen, SeenJob, SeenPod};

/// Beyond its grace, so long a pod may take to go before it is released.
const OVERDUE: Duration = Duration::from_secs(15);
/// So long a pod may take whose node is the reason: nobody on that node hears of the pod's grace.
const LOST_NODE: Duration = Duration::from_secs(10);
/// So long a Job of which all workers have left may be the sign of a run that is about to end.
const ABOUT_TO_END: Duration = Duration::from_secs(30);
/// Times that one pod of the Job may fail, with no worker heard in between, before no more are waited for.
const FAILURES: usize = 5;
/// Why the node controller made a pod leave: its node is not ready or cannot be reached.
const BY_NODE: &str = "DeletionByTaintManager";
/// Why a container that never ran does not.
const NO_IMAGE: [&str; 3] = ["ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull"];
/// Why a container never will.
const NEVER: &str = "InvalidImageName";
/// Why a container cannot be made of what the pod says.
const NO_CONTAINER: [&str; 3] = [
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
];

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    /// Make the Job.
    Create,
    /// Delete the Job of this uid, for another one to be made.
    Replace { uid: String },
    /// Say that a pod has failed whose node will not, so that another one takes its place.
    Release { pod: String, uid: String },
    /// Tell people.
    Tell(String),
    /// End the run: no worker will come.
    GiveUp(String),
}

/// What earlier looks leave behind.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Whether the Job that an earlier coordinator may have left has been judged.
    settled: bool,
    given_up: bool,
    complete_since: Option<Duration>,
    /// Since when pods are leaving, by uid.
    leaving: BTreeMap<String, Duration>,
    /// Pods whose end is known, by uid.
    ended: BTreeSet<String>,
    /// How often each pod of the Job failed while no worker was heard, by its name without the part that changes.
    failures: BTreeMap<String, usize>,
    /// What was told of waits that still last.
    told: BTreeSet<String>,
    /// The last trouble with the API server, while it lasts.
    trouble: Option<String>,
}

impl Memory {
    /// The API server answered; gives back whether it had not.
    pub(super) fn reached(&mut self) -> bool {
        self.trouble.take().is_some()
    }

    /// A call failed; gives back what to tell, if that is new.
    pub(super) fn failed(&mut self, error: &cluster::Error) -> Option<String> {
        let message = error.to_string();
        if self.trouble.as_ref() == Some(&message) {
            return None;
        }
        self.trouble = Some(message.clone());
        Some(format!("the Kubernetes API: {message}; trying again"))
    }
}

/// Decides at `now` from what is `seen` and the names of the workers that are heard.
pub(super) fn decide(
    now: Duration,
    seen: &Seen,
    alive: &BTreeSet<String>,
    memory: &mut Memory,
) -> Vec<Act> {
    if memory.given_up {
        return Vec::new();
    }
    let mut acts = match &seen.job {
        None => {
            memory.settled = true;
            vec![Act::Create]
        }
        Some(job) if job.leaving => Vec::new(),
        Some(job) => of_job(now, job, &seen.pods, memory),
    };
    if acts.is_empty() {
        acts.extend(of_ends(&seen.pods, alive, memory));
        acts.extend(of_leaving(now, &seen.pods, alive, memory));
        acts.extend(of_waits(&seen.pods, memory));
    }
    memory.given_up = acts.iter().any(|act| matches!(act, Act::GiveUp(_)));
    acts
}

fn of_job(now: Duration, job: &SeenJob, pods: &[SeenPod], memory: &mut Memory) -> Vec<Act> {
    let replace = |why: &str| {
        let uid = job.uid.clone();
        vec![Act::Tell(why.to_owned()), Act::Replace { uid }]
    };
    // The Job of an earlier coordinator is adopted if it is what would be asked for now and still of use.
    if !memory.settled {
        memory.settled = true;
        if !job.current {
            return replace("the Job of workers was made from other settings; it is replaced");
        }
        if job.finished.is_some() {
            return replace("the Job of workers has ended before; it is replaced");
        }
    }
    match &job.finished {
        None => memory.complete_since = None,
        Some(Finished::Complete) => {
            let since = *memory.complete_since.get_or_insert(now);
            if now >= since + ABOUT_TO_END {
                memory.complete_since = None;
                return replace("all workers have left, and the run goes on; others are asked for");
            }
        }
        Some(Finished::Failed { reason, message }) => {
            let evidence = evidence(pods);
            return vec![Act::GiveUp(format!(
                "Kubernetes starts no more workers: {reason}: {message}{evidence}"
            ))];
        }
    }
    Vec::new()
}

/// Workers that ended: told once each, and counted while none is heard.
fn of_ends(pods: &[SeenPod], alive: &BTreeSet<String>, memory: &mut Memory) -> Vec<Act> {
    if !alive.is_empty() {
        memory.failures.clear();
    }
    let mut acts = Vec::new();
    for pod in pods.iter().filter(|pod| pod.phase == "Failed") {
        if !memory.ended.insert(pod.uid.clone()) {
            continue;
        }
        let words = match (&pod.disrupted, &pod.ended) {
            (Some(reason), _) => format!("pod {} had to leave ({reason})", pod.name),
            (None, Some((Some(TRY_AGAIN), _))) => continue,
            (None, Some((code, words))) => {
                if alive.is_empty() {
                    // NAME-INDEX-RANDOM: the index stays when a pod is made again.
                    let index = pod.name.rsplit_once('-').map_or("", |(index, _)| index);
                    *memory.failures.entry(index.to_owned()).or_default() += 1;
                }
                format!("the worker of pod {} {}: {words}", pod.name, how(*code))
            }
            (None, None) => format!("pod {} failed", pod.name),
        };
        acts.push(Act::Tell(words));
    }
    let present: BTreeSet<&String> = pods.iter().map(|pod| &pod.uid).collect();
    memory.ended.retain(|uid| present.contains(uid));
    // Of one pod, not of all together: whatever ends all of them at once is no sign that the next ones fare alike.
    let hopeless = memory
        .failures
        .iter()
        .find(|(_, count)| **count >= FAILURES);
    if let Some((index, count)) = hopeless {
        acts.push(Act::GiveUp(format!(
            "pod {index} failed {count} times in a row, and no worker reached the coordinator in between{}",
            evidence(pods)
        )));
    }
    acts
}

/// Pods that do not go although their time is up, and whose worker is not heard.
fn of_leaving(
    now: Duration,
    pods: &[SeenPod],
    alive: &BTreeSet<String>,
    memory: &mut Memory,
) -> Vec<Act> {
    let mut leaving = BTreeMap::new();
    let mut acts = Vec::new();
    for pod in pods.iter().filter(|pod| !pod.is_over()) {
        let Some(grace) = pod.leaving else { continue };
        let since = memory.leaving.get(&pod.uid).copied().unwrap_or(now);
        leaving.insert(pod.uid.clone(), since);
        let patience = if pod.disrupted.as_deref() == Some(BY_NODE) {
            LOST_NODE
        } else {
            grace + OVERDUE
        };
        // A worker that is still heard is on a node that only the API server does not reach.
        if now >= since + patience && !alive.contains(&pod.name) {
            acts.push(Act::Tell(format!(
                "pod {} does not go and its worker is not heard: its node is given up, another pod takes its place",
                pod.name
            )));
            acts.push(Act::Release {
                pod: pod.name.clone(),
                uid: pod.uid.clone(),
            });
        }
    }
    memory.leaving = leaving;
    acts
}

/// Waits that people should know of: each once while it lasts. Queue time is none of them a failure.
fn of_waits(pods: &[SeenPod], memory: &mut Memory) -> Vec<Act> {
    let mut waits: BTreeMap<String, (usize, &SeenPod, String)> = BTreeMap::new();
    for pod in pods
        .iter()
        .filter(|pod| pod.phase == "Pending" && pod.leaving.is_none())
    {
        let what = match (&pod.waiting, &pod.unplaced) {
            (Some((reason, message)), _) if reason == NEVER => {
                let message = format!("cluster.kubernetes.image is no name of an image: {message}");
                return vec![Act::GiveUp(message)];
            }
            (Some((reason, message)), _) if NO_IMAGE.contains(&reason.as_str()) => {
                ("the image cannot be pulled", message.clone())
            }
            (Some((reason, message)), _) if NO_CONTAINER.contains(&reason.as_str()) => {
                ("the container cannot be made", message.clone())
            }
            (_, Some(message)) => ("no node has room", message.clone()),
            _ => continue,
        };
        // The texts of one wait change from look to look; its kind does not.
        let (kind, message) = what;
        waits.entry(kind.to_owned()).or_insert((0, pod, message)).0 += 1;
    }
    let mut acts = Vec::new();
    for (kind, (count, pod, message)) in &waits {
        if memory.told.insert(kind.clone()) {
            acts.push(Act::Tell(format!(
                "{count} of {} pods wait, {} among them: {kind}: {message}",
                pods.iter().filter(|pod| !pod.is_over()).count(),
                pod.name
            )));
        }
    }
    memory.told.retain(|kind| waits.contains_key(kind));
    acts
}

/// How a container ended, for people. A node that was lost may leave no exit code behind.
fn how(code: Option<i32>) -> String {
    code.map_or_else(
        || "ended, and its exit code is not known".to_owned(),
        |code| format!("ended with exit code {code}"),
    )
}

/// The last words of failed workers, those that were started wrongly first.
fn evidence(pods: &[SeenPod]) -> String {
    let failed = |wrongly: bool| {
        pods.iter().rev().find_map(move |pod| {
            let (code, words) = pod.ended.as_ref()?;
            let fits = *code != Some(0) && (*code == Some(USAGE)) == wrongly;
            fits.then(|| format!("\npod {} {}:\n{words}", pod.name, how(*code)))
        })
    };
    failed(true).or_else(|| failed(false)).unwrap_or_default()
}

#[cfg(test)]
mod tests;
