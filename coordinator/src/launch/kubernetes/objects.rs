//! What is asked of the cluster: one Indexed Job whose pods are workers, and the Secret that admits them.
//!
//! Pods follow the strictest of the standards for them (`restricted`): no root, no capability, a root file system that
//! is only read. `manifests` writes the same pods for clusters where somebody else starts them.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, EmptyDirVolumeSource, EnvFromSource, EnvVar, EnvVarSource, ExecAction,
    LocalObjectReference, ObjectFieldSelector, PersistentVolumeClaimVolumeSource,
    PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile,
    Secret, SecretEnvSource, SecretVolumeSource, SecurityContext, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use distillery_common::ids::Digest;
use distillery_common::recipe::{self, Kubernetes};

/// The container that is a worker.
pub(super) const CONTAINER: &str = "worker";
/// Annotation of the Job: from which settings it was made.
pub(super) const SETTINGS: &str = "distillery/settings";
/// Label of pods and Job: of which run they are.
pub(super) const RUN: &str = "distillery/run";
/// Label of every object that belongs to this program, and what stands there.
pub(super) const APP: (&str, &str) = ("app.kubernetes.io/name", "distillery");
/// Label that says which part an object is.
pub(super) const COMPONENT: &str = "app.kubernetes.io/component";
/// Where the join string is mounted, and the key that holds it.
const JOIN: (&str, &str) = ("/etc/distillery/join", "join");
/// User and group of our images.
pub(super) const USER: i64 = 65_532;
/// Pods that may fail for one index. Workers come and go for weeks; `decide` says when it is hopeless.
const FAILURES_PER_INDEX: i32 = 1000;
/// Exit code of a worker that was started wrongly; another start would not help.
pub(super) const USAGE: i32 = 64;
/// Exit code of a worker that wants to be started again.
pub(super) const TRY_AGAIN: i32 = 75;
/// Where a worker shows that it turns: on the pod's own scratch volume, since all else is only read.
const ALIVE: &str = "/tmp/alive";
/// Seconds that its loop may stand: a host that swaps or was paused comes back within that.
const STILL: u32 = 120;
/// Seconds that a worker which hangs gets to end: it gives nothing back.
const HUNG_GRACE: i64 = 10;
/// Seconds of a pod's grace that the worker leaves to the container's end.
const MARGIN: u32 = 5;

/// What is started.
#[derive(Debug, Clone)]
pub struct Workers {
    /// What pods look like.
    pub kubernetes: Kubernetes,
    /// The run, which names the Job.
    pub run_id: String,
    /// How many workers.
    pub count: u32,
    /// What admits them, with the token: for the Secret only.
    pub join: recipe::Secret,
    /// Whether the join string does without TLS for another host.
    pub insecure: bool,
}

/// Names that differ between a launched Job and a written one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names<'a> {
    pub(super) job: &'a str,
    pub(super) secret: &'a str,
    pub(super) namespace: Option<&'a str>,
    /// None where it is not known yet.
    pub(super) run: Option<&'a str>,
}

/// The name of the Job of a run.
pub fn job_name(run_id: &str) -> String {
    format!("distillery-{run_id}")
}

impl Workers {
    /// The name of the Job, and of its Secret.
    pub fn name(&self) -> String {
        job_name(&self.run_id)
    }

    fn job(&self, namespace: &str) -> Job {
        let name = self.name();
        let names = Names {
            job: &name,
            secret: &name,
            namespace: Some(namespace),
            run: Some(&self.run_id),
        };
        job(&self.kubernetes, self.count, self.insecure, names)
    }

    /// The Job in `namespace` as it is sent, and what names its settings: a digest of what the pods are told, in the form in
    /// which it is sent, so that it stays the same for as long as the same is asked for.
    ///
    /// # Errors
    /// Not expected: the types are Kubernetes' own.
    pub(super) fn marked_job(&self, namespace: &str) -> serde_json::Result<(Job, String)> {
        let mut job = self.job(namespace);
        // The Service is what the pods dial.
        let text = serde_json::to_string(&(&job, &self.kubernetes.service))?;
        // 128 bits are enough to tell settings apart, and readable.
        let settings = Digest::of(text.as_bytes()).to_string()[..32].to_owned();
        let mark = BTreeMap::from([(SETTINGS.to_owned(), settings.clone())]);
        job.metadata.annotations = Some(mark);
        Ok((job, settings))
    }

    /// The Secret with the join string; goes with the Job of uid `owner` once that is known.
    pub(super) fn secret(&self, owner: Option<&str>) -> Secret {
        let name = self.name();
        let owners = owner.map(|uid| {
            vec![OwnerReference {
                api_version: "batch/v1".into(),
                kind: "Job".into(),
                name: name.clone(),
                uid: uid.to_owned(),
                block_owner_deletion: None,
                controller: None,
            }]
        });
        Secret {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(labels("worker", Some(&self.run_id))),
                owner_references: owners,
                ..ObjectMeta::default()
            },
            type_: Some("Opaque".into()),
            string_data: Some(BTreeMap::from([(
                JOIN.1.to_owned(),
                self.join.reveal().to_owned(),
            )])),
            ..Secret::default()
        }
    }
}

/// The labels of a part.
pub(super) fn labels(component: &str, run: Option<&str>) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([
        (APP.0.to_owned(), APP.1.to_owned()),
        (COMPONENT.to_owned(), component.to_owned()),
    ]);
    if let Some(run) = run {
        labels.insert(RUN.to_owned(), run.to_owned());
    }
    labels
}

/// A Job whose pods give `workers` workers.
pub(super) fn job(kubernetes: &Kubernetes, workers: u32, insecure: bool, names: Names<'_>) -> Job {
    let pods = i32::try_from(kubernetes.pods(workers)).unwrap_or(i32::MAX);
    let labels = labels("worker", names.run);
    let mut pod_labels = kubernetes.labels.clone();
    pod_labels.extend(labels.clone());
    Job {
        metadata: ObjectMeta {
            name: Some(names.job.to_owned()),
            namespace: names.namespace.map(str::to_owned),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        spec: Some(JobSpec {
            completion_mode: Some("Indexed".into()),
            completions: Some(pods),
            parallelism: Some(pods),
            backoff_limit_per_index: Some(FAILURES_PER_INDEX),
            // A failure policy asks for it: a pod is replaced when it has ended, not when it is told to.
            pod_replacement_policy: Some("Failed".into()),
            pod_failure_policy: Some(failure_policy()),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(pod_labels),
                    ..ObjectMeta::default()
                }),
                spec: Some(pod(kubernetes, insecure, names.secret)),
            },
            ..JobSpec::default()
        }),
        ..Job::default()
    }
}

/// A wrong start ends the Job; a pod that others made leave, or that wants to be started again, is no failure.
fn failure_policy() -> PodFailurePolicy {
    let on_exit = |action: &str, code: i32| PodFailurePolicyRule {
        action: action.into(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            container_name: Some(CONTAINER.into()),
            operator: "In".into(),
            values: vec![code],
        }),
        ..PodFailurePolicyRule::default()
    };
    PodFailurePolicy {
        rules: vec![
            on_exit("FailJob", USAGE),
            PodFailurePolicyRule {
                action: "Ignore".into(),
                on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
                    type_: "DisruptionTarget".into(),
                    status: Some("True".into()),
                }]),
                ..PodFailurePolicyRule::default()
            },
            on_exit("Ignore", TRY_AGAIN),
        ],
    }
}

fn pod(kubernetes: &Kubernetes, insecure: bool, secret: &str) -> PodSpec {
    let named = |name: &String| LocalObjectReference { name: name.clone() };
    let pull: Vec<_> = kubernetes.image_pull_secrets.iter().map(named).collect();
    let node_selector = kubernetes.node_selector.clone();
    PodSpec {
        restart_policy: Some("Never".into()),
        termination_grace_period_seconds: Some(i64::from(kubernetes.grace_seconds)),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        service_account_name: kubernetes.service_account.clone(),
        priority_class_name: kubernetes.priority_class.clone(),
        node_selector: (!node_selector.is_empty()).then_some(node_selector),
        tolerations: Some(tolerations(kubernetes)),
        image_pull_secrets: (!pull.is_empty()).then_some(pull),
        security_context: Some(pod_security()),
        containers: vec![worker(kubernetes, insecure)],
        volumes: Some(volumes(kubernetes, secret)),
        ..PodSpec::default()
    }
}

fn worker(kubernetes: &Kubernetes, insecure: bool) -> Container {
    let devices = match kubernetes.gpus {
        0 => "cpu".to_owned(),
        gpus => (0..gpus)
            .map(|at| at.to_string())
            .collect::<Vec<_>>()
            .join(","),
    };
    let grace = kubernetes.grace_seconds.saturating_sub(MARGIN);
    let mut args = vec![
        "join".into(),
        "--coordinator".into(),
        format!("@{}/{}", JOIN.0, JOIN.1),
        "--devices".into(),
        devices,
        "--name".into(),
        "$(POD_NAME)".into(),
        "--drain-grace".into(),
        grace.to_string(),
        // Or a pod that was made to leave would count as one that has done its work, and not be replaced.
        "--signal-exit-code".into(),
        TRY_AGAIN.to_string(),
        "--alive".into(),
        ALIVE.into(),
    ];
    if insecure {
        args.push("--insecure".into());
    }
    Container {
        name: CONTAINER.into(),
        image: Some(kubernetes.image.clone()),
        args: Some(args),
        env: Some(vec![
            from_field("POD_NAME", "metadata.name"),
            // Libraries that keep caches find a place for them.
            literal("HOME", "/tmp"),
        ]),
        env_from: env_from(kubernetes),
        liveness_probe: Some(turns()),
        resources: Some(resources(kubernetes)),
        security_context: Some(container_security()),
        // The end of the log is what a failure shows.
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(mounts(kubernetes)),
        ..Container::default()
    }
}

/// Whether the worker's own loop turns. Neither a coordinator that is away nor an engine that computes for long stops it, and
/// a worker that hangs is ended, so that the Job makes another. The file is there from the worker's start on.
fn turns() -> Probe {
    Probe {
        exec: Some(ExecAction {
            command: Some(
                ["worker", "alive", ALIVE, "--within", &STILL.to_string()]
                    .map(str::to_owned)
                    .to_vec(),
            ),
        }),
        period_seconds: Some(30),
        failure_threshold: Some(4),
        timeout_seconds: Some(10),
        termination_grace_period_seconds: Some(HUNG_GRACE),
        ..Probe::default()
    }
}

pub(super) fn literal(name: &str, value: &str) -> EnvVar {
    EnvVar {
        name: name.into(),
        value: Some(value.into()),
        ..EnvVar::default()
    }
}

fn from_field(name: &str, field: &str) -> EnvVar {
    EnvVar {
        name: name.into(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                field_path: field.into(),
                api_version: None,
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }
}

pub(super) fn env_from(kubernetes: &Kubernetes) -> Option<Vec<EnvFromSource>> {
    let source = |name: &String| EnvFromSource {
        secret_ref: Some(SecretEnvSource {
            name: name.clone(),
            optional: None,
        }),
        ..EnvFromSource::default()
    };
    let sources: Vec<_> = kubernetes.env_from.iter().map(source).collect();
    (!sources.is_empty()).then_some(sources)
}

fn resources(kubernetes: &Kubernetes) -> ResourceRequirements {
    let mut amounts: BTreeMap<String, Quantity> = kubernetes
        .resources
        .iter()
        .map(|(name, amount)| (name.clone(), Quantity(amount.clone())))
        .collect();
    if kubernetes.gpus > 0 {
        let gpus = Quantity(kubernetes.gpus.to_string());
        amounts.insert(kubernetes.gpu_resource.clone(), gpus);
    }
    let amounts = (!amounts.is_empty()).then_some(amounts);
    ResourceRequirements {
        requests: amounts.clone(),
        limits: amounts,
        ..ResourceRequirements::default()
    }
}

/// What the user says, and how long a pod stays bound to a node that is gone: by default that would be five minutes.
fn tolerations(kubernetes: &Kubernetes) -> Vec<Toleration> {
    let gone = |condition: &str| Toleration {
        key: Some(format!("node.kubernetes.io/{condition}")),
        operator: Some("Exists".into()),
        effect: Some("NoExecute".into()),
        toleration_seconds: Some(i64::from(kubernetes.unreachable_seconds)),
        value: None,
    };
    let own = kubernetes.tolerations.iter().map(|said| Toleration {
        key: said.key.clone(),
        operator: Some(
            if said.value.is_some() {
                "Equal"
            } else {
                "Exists"
            }
            .into(),
        ),
        value: said.value.clone(),
        effect: said.effect.clone(),
        toleration_seconds: None,
    });
    own.chain(["not-ready", "unreachable"].map(gone)).collect()
}

/// A volume and where it is mounted.
fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

/// The names of the recipe's own volumes, with where and how each is mounted.
fn claims(kubernetes: &Kubernetes) -> impl Iterator<Item = (String, &recipe::Volume)> {
    let numbered = kubernetes.volumes.iter().enumerate();
    numbered.map(|(at, volume)| (format!("claim-{at}"), volume))
}

pub(super) fn claim_mounts(kubernetes: &Kubernetes) -> Vec<VolumeMount> {
    claims(kubernetes)
        .map(|(name, volume)| mount(&name, &volume.path, volume.read_only))
        .collect()
}

pub(super) fn claim_volumes(kubernetes: &Kubernetes) -> Vec<Volume> {
    claims(kubernetes)
        .map(|(name, volume)| Volume {
            name,
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: volume.claim.clone(),
                read_only: None,
            }),
            ..Volume::default()
        })
        .collect()
}

fn mounts(kubernetes: &Kubernetes) -> Vec<VolumeMount> {
    let mut mounts = vec![mount("join", JOIN.0, true), mount("scratch", "/tmp", false)];
    if kubernetes.gpus > 0 {
        mounts.push(mount("shared-memory", "/dev/shm", false));
    }
    mounts.extend(claim_mounts(kubernetes));
    mounts
}

fn volumes(kubernetes: &Kubernetes, secret: &str) -> Vec<Volume> {
    let mut volumes = vec![
        Volume {
            name: "join".into(),
            secret: Some(SecretVolumeSource {
                secret_name: Some(secret.to_owned()),
                // Owned by root; the kubelet lets the pod's group read it, and nobody else.
                default_mode: Some(0o400),
                ..SecretVolumeSource::default()
            }),
            ..Volume::default()
        },
        scratch("scratch", None),
    ];
    if kubernetes.gpus > 0 {
        // NCCL passes data between engines of one pod through it; the default of 64 MiB is too small.
        volumes.push(scratch("shared-memory", Some("Memory")));
    }
    volumes.extend(claim_volumes(kubernetes));
    volumes
}

pub(super) fn scratch(name: &str, medium: Option<&str>) -> Volume {
    Volume {
        name: name.into(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: medium.map(str::to_owned),
            ..EmptyDirVolumeSource::default()
        }),
        ..Volume::default()
    }
}

pub(super) fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        fs_group: Some(USER),
        // Or every start would walk through all that a claim holds.
        fs_group_change_policy: Some("OnRootMismatch".into()),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".into(),
            localhost_profile: None,
        }),
        ..PodSecurityContext::default()
    }
}

pub(super) fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities {
            add: None,
            drop: Some(vec!["ALL".into()]),
        }),
        ..SecurityContext::default()
    }
}

#[cfg(test)]
mod tests;
