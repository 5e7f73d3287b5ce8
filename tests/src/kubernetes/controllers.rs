//! The job controller, the scheduler and the node controller, as a real control plane was seen to behave.

use std::time::Duration;

use serde_json::{Value, json};

use super::Room;
use super::world::{World, belongs_to, condition, is_over, text};

/// What keeps a pod until the job controller has counted it.
const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
/// Nodes that take pods.
const NODES: usize = 4;
/// Annotation and label with a pod's index.
const INDEX: &str = "batch.kubernetes.io/job-completion-index";

/// One look of each controller.
pub(super) fn look(world: &mut World, now: Duration) {
    for name in world.jobs() {
        count(world, &name, now);
        supply(world, &name, now);
    }
    place(world);
    doom(world, now);
    sweep(world);
}

fn is_finished(job: &Value) -> bool {
    let conditions = job["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .any(|c| c["status"] == "True")
}

fn index_of(pod: &Value) -> usize {
    let index = pod["metadata"]["annotations"][INDEX].as_str();
    index
        .and_then(|index| index.parse().ok())
        .unwrap_or_default()
}

fn holds(pod: &Value) -> bool {
    let all = pod["metadata"]["finalizers"].as_array();
    all.into_iter()
        .flatten()
        .any(|finalizer| finalizer == FINALIZER)
}

/// Counts the pods that ended and lets them go.
fn count(world: &mut World, name: &str, now: Duration) {
    let job = world.jobs[name].clone();
    let uid = text(&job, "/metadata/uid");
    let ended: Vec<Value> = world
        .pods
        .values()
        .filter(|pod| belongs_to(pod, &uid) && holds(pod) && is_over(pod))
        .cloned()
        .collect();
    for pod in ended {
        let (at, pod_name) = (index_of(&pod), text(&pod, "/metadata/name"));
        let backoff = world.ways.backoff;
        let index = world.indexes.entry((uid.clone(), at)).or_default();
        if pod["status"]["phase"] == "Succeeded" {
            index.succeeded = true;
        } else {
            match verdict(&job, &pod) {
                "FailJob" => fail_job(world, name, &pod),
                "Ignore" => {}
                _ => {
                    index.not_before = now + backoff * 2_u32.pow(index.failures.min(6));
                    index.failures += 1;
                }
            }
        }
        world.change_pod(&pod_name, |pod| pod["metadata"]["finalizers"] = json!([]));
    }
    finish(world, name);
}

/// What the failure policy says of a failed pod: the first rule that fits.
fn verdict<'a>(job: &'a Value, pod: &Value) -> &'a str {
    let rules = job["spec"]["podFailurePolicy"]["rules"].as_array();
    let container = &pod["status"]["containerStatuses"][0];
    let code = container["state"]["terminated"]["exitCode"].as_i64();
    let conditions = pod["status"]["conditions"].as_array();
    for rule in rules.into_iter().flatten() {
        let values = rule["onExitCodes"]["values"].as_array();
        let by_code = code.is_some_and(|code| {
            code != 0
                && rule["onExitCodes"]["containerName"] == container["name"]
                && values.into_iter().flatten().any(|value| value == code)
        });
        let by_condition = rule["onPodConditions"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|asked| {
                conditions
                    .into_iter()
                    .flatten()
                    .any(|c| c["type"] == asked["type"] && c["status"] == asked["status"])
            });
        if by_code || by_condition {
            return rule["action"].as_str().unwrap_or("Count");
        }
    }
    "Count"
}

/// Ends a Job; its pods are asked to go.
fn fail_job(world: &mut World, name: &str, pod: &Value) {
    let message = format!(
        "Container worker for pod {}/{} failed with exit code {} matching FailJob rule at index 0",
        text(pod, "/metadata/namespace"),
        text(pod, "/metadata/name"),
        pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"],
    );
    conclude(world, name, "Failed", "PodFailurePolicy", &message);
}

fn conclude(world: &mut World, name: &str, kind: &str, reason: &str, message: &str) {
    let Some(mut job) = world.jobs.get(name).cloned() else {
        return;
    };
    job["status"]["conditions"] =
        json!([{ "type": kind, "status": "True", "reason": reason, "message": message }]);
    world.touch(&mut job);
    let uid = text(&job, "/metadata/uid");
    world.jobs.insert(name.to_owned(), job);
    let alive = world
        .pods
        .iter()
        .filter(|(_, pod)| belongs_to(pod, &uid) && !is_over(pod));
    let alive: Vec<String> = alive.map(|(name, _)| name.clone()).collect();
    for pod in alive {
        world.change_pod(&pod, |pod| pod["metadata"]["finalizers"] = json!([]));
        world.delete_pod(&pod, None);
    }
}

/// Notes that a Job is complete, or that every index that is left has failed too often.
fn finish(world: &mut World, name: &str) {
    let job = &world.jobs[name];
    if is_finished(job) {
        return;
    }
    let uid = text(job, "/metadata/uid");
    let completions = job["spec"]["completions"].as_u64().unwrap_or(1) as usize;
    let done = (0..completions)
        .filter(|at| {
            let index = world.indexes.get(&(uid.clone(), *at));
            index.is_some_and(|index| index.succeeded)
        })
        .count();
    if done == completions {
        conclude(world, name, "Complete", "CompletionsReached", "");
    }
}

/// Makes a pod for each index that has none. A pod that is only leaving still has its index.
fn supply(world: &mut World, name: &str, now: Duration) {
    let job = world.jobs[name].clone();
    if is_finished(&job) {
        return;
    }
    let uid = text(&job, "/metadata/uid");
    let completions = job["spec"]["completions"].as_u64().unwrap_or(1) as usize;
    let limit = job["spec"]["backoffLimitPerIndex"]
        .as_u64()
        .unwrap_or(u64::MAX);
    for at in 0..completions {
        let index = world.indexes.entry((uid.clone(), at)).or_default();
        if index.succeeded || now < index.not_before || u64::from(index.failures) > limit {
            continue;
        }
        let is_held = world
            .pods
            .values()
            .any(|pod| belongs_to(pod, &uid) && index_of(pod) == at && !is_over(pod));
        if !is_held {
            make(world, &job, at);
        }
    }
}

fn make(world: &mut World, job: &Value, at: usize) {
    let uid = world.uid();
    world.made += 1;
    let job_name = text(job, "/metadata/name");
    let template = &job["spec"]["template"];
    let mut labels = template["metadata"]["labels"].clone();
    labels["batch.kubernetes.io/job-name"] = json!(job_name);
    labels[INDEX] = json!(at.to_string());
    let mut spec = template["spec"].clone();
    if let Some(env) = spec["containers"][0]["env"].as_array_mut() {
        env.push(json!({ "name": "JOB_COMPLETION_INDEX", "value": at.to_string() }));
    }
    spec["hostname"] = json!(format!("{job_name}-{at}"));
    let made = world.made;
    world.put_pod(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": format!("{job_name}-{at}-{made:05}"),
            "namespace": super::NAMESPACE,
            "uid": uid,
            "labels": labels,
            "annotations": { INDEX: at.to_string() },
            "finalizers": [FINALIZER],
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "ownerReferences": [{
                "apiVersion": "batch/v1", "kind": "Job", "name": job_name,
                "uid": job["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "spec": spec,
        "status": { "phase": "Pending" },
    }));
}

/// Binds pods to nodes with power, if there is room.
fn place(world: &mut World) {
    let waiting = world
        .pods
        .iter()
        .filter(|(_, pod)| pod["spec"]["nodeName"].is_null() && !is_over(pod));
    let waiting: Vec<String> = waiting.map(|(name, _)| name.clone()).collect();
    for name in waiting {
        if world.ways.room == Room::None {
            let told = world.pods[&name]["status"]["conditions"].is_array();
            if !told {
                let why = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu.";
                world.change_pod(&name, |pod| {
                    condition(pod, "PodScheduled", "False", "Unschedulable", why);
                });
            }
            continue;
        }
        let nodes = (0..NODES).map(|at| format!("node-{at}"));
        let mut alive: Vec<String> = nodes.filter(|node| !world.dead.contains(node)).collect();
        // The emptiest first, so that one node's end is not everybody's.
        alive.sort_by_key(|node| {
            let on = |pod: &&Value| pod["spec"]["nodeName"] == node.as_str() && !is_over(pod);
            world.pods.values().filter(on).count()
        });
        if let Some(node) = alive.first() {
            world.change_pod(&name, |pod| {
                pod["spec"]["nodeName"] = json!(node);
                condition(pod, "PodScheduled", "True", "", "");
            });
        }
    }
}

/// The node controller: pods of a node without power are asked to go once their toleration has run out. Nobody there hears
/// of it, so that they stay.
fn doom(world: &mut World, now: Duration) {
    let on_dead = world.pods.iter().filter(|(_, pod)| {
        let node = text(pod, "/spec/nodeName");
        world.dead.contains(&node)
            && !is_over(pod)
            && pod["metadata"]["deletionTimestamp"].is_null()
    });
    let on_dead: Vec<(String, Value)> = on_dead.map(|(n, p)| (n.clone(), p.clone())).collect();
    for (name, pod) in on_dead {
        let tolerated = pod["spec"]["tolerations"].as_array().into_iter().flatten();
        let seconds = tolerated
            .filter(|t| t["key"] == "node.kubernetes.io/unreachable")
            .find_map(|t| t["tolerationSeconds"].as_f64())
            // What admission adds to a pod that says nothing.
            .unwrap_or(300.0);
        let haste = world.ways.haste;
        let uid = text(&pod, "/metadata/uid");
        let until = *world
            .doomed
            .entry(uid)
            .or_insert(now + Duration::from_secs_f64(seconds / haste));
        if now >= until {
            world.change_pod(&name, |pod| {
                let why = "Taint manager: deleting due to NoExecute taint";
                condition(
                    pod,
                    "DisruptionTarget",
                    "True",
                    "DeletionByTaintManager",
                    why,
                );
            });
            world.delete_pod(&name, None);
        }
    }
}

/// Pods that were asked to go, have ended and are held by nobody are gone.
fn sweep(world: &mut World) {
    let gone = world.pods.iter().filter(|(_, pod)| {
        let held = pod["metadata"]["finalizers"]
            .as_array()
            .is_some_and(|all| !all.is_empty());
        let forced = pod["metadata"]["deletionGracePeriodSeconds"] == 0;
        pod["metadata"]["deletionTimestamp"].is_string() && !held && (is_over(pod) || forced)
    });
    let gone: Vec<String> = gone.map(|(name, _)| name.clone()).collect();
    for name in gone {
        world.drop_pod(&name);
    }
}
