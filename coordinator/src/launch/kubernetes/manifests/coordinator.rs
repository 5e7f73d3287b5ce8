//! The coordinator's own Job.

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{
    ConfigMapVolumeSource, Container, ContainerPort, EnvVar, EnvVarSource, HTTPGetAction, PodSpec,
    PodTemplateSpec, Probe, ResourceRequirements, SecretKeySelector, TCPSocketAction, Volume,
    VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::super::objects::{
    self, claim_mounts, claim_volumes, container_security, env_from, literal, pod_security, scratch,
};
use super::{COORDINATOR, HTTP, RECIPE, Scope};

/// Secret with the run's token, and its key.
const TOKEN: (&str, &str) = ("distillery-token", "token");
/// Folder for the coordinator's own state, where the run is in a bucket.
const STATE: &str = "/var/lib/distillery";
/// Seconds that the coordinator may take to stop after a checkpoint.
const GRACE: i64 = 300;
/// Coordinators that may fail in a row before the Job is given up; evictions and wishes to be started again do not count.
const FAILURES: i32 = 20;

impl Scope<'_> {
    /// A Job, since a run ends. One pod at a time; where two live all the same, the journal lets only one write.
    pub(super) fn coordinator(&self) -> Job {
        let on_exit = |action: &str, values: Vec<i32>| PodFailurePolicyRule {
            action: action.into(),
            on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
                container_name: Some("coordinator".into()),
                operator: "In".into(),
                values,
            }),
            ..PodFailurePolicyRule::default()
        };
        let rules = vec![
            // A failed run, faults in the recipe, a wrong command line: the same would come of it again.
            on_exit("FailJob", vec![1, 2, 64]),
            PodFailurePolicyRule {
                action: "Ignore".into(),
                on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
                    type_: "DisruptionTarget".into(),
                    status: Some("True".into()),
                }]),
                ..PodFailurePolicyRule::default()
            },
            on_exit("Ignore", vec![75]),
        ];
        Job {
            metadata: self.meta(COORDINATOR, "coordinator"),
            spec: Some(JobSpec {
                backoff_limit: Some(FAILURES),
                pod_replacement_policy: Some("Failed".into()),
                pod_failure_policy: Some(PodFailurePolicy { rules }),
                template: PodTemplateSpec {
                    metadata: Some(ObjectMeta {
                        labels: Some(objects::labels("coordinator", None)),
                        ..ObjectMeta::default()
                    }),
                    spec: Some(self.coordinator_pod()),
                },
                ..JobSpec::default()
            }),
            ..Job::default()
        }
    }

    fn coordinator_pod(&self) -> PodSpec {
        let mut volumes = vec![
            Volume {
                name: "recipe".into(),
                config_map: Some(ConfigMapVolumeSource {
                    name: RECIPE.0.into(),
                    ..ConfigMapVolumeSource::default()
                }),
                ..Volume::default()
            },
            scratch("scratch", None),
            scratch("state", None),
        ];
        volumes.extend(claim_volumes(self.kubernetes));
        PodSpec {
            restart_policy: Some("Never".into()),
            termination_grace_period_seconds: Some(GRACE),
            service_account_name: Some(COORDINATOR.into()),
            automount_service_account_token: Some(self.launches),
            enable_service_links: Some(false),
            security_context: Some(pod_security()),
            containers: vec![self.coordinator_container()],
            volumes: Some(volumes),
            ..PodSpec::default()
        }
    }

    fn coordinator_container(&self) -> Container {
        let mut args = vec!["run".to_owned(), format!("{}/{}", RECIPE.1, RECIPE.2)];
        let http = format!("cluster.http=0.0.0.0:{HTTP}");
        for set in self.source.sets.iter().chain([&http]) {
            args.extend(["--set".to_owned(), set.clone()]);
        }
        let port = |name: &str, port: i32| ContainerPort {
            name: Some(name.into()),
            container_port: port,
            ..ContainerPort::default()
        };
        let token = EnvVar {
            name: "DISTILLERY_TOKEN".into(),
            value_from: Some(EnvVarSource {
                secret_key_ref: Some(SecretKeySelector {
                    name: TOKEN.0.into(),
                    key: TOKEN.1.into(),
                    optional: None,
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        };
        let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
            name: name.into(),
            mount_path: path.into(),
            read_only: read_only.then_some(true),
            ..VolumeMount::default()
        };
        let mut mounts = vec![
            mount("recipe", RECIPE.1, true),
            mount("scratch", "/tmp", false),
            mount("state", STATE, false),
        ];
        mounts.extend(claim_mounts(self.kubernetes));
        Container {
            name: "coordinator".into(),
            image: Some(self.source.image.to_owned()),
            args: Some(args),
            env: Some(vec![
                token,
                literal("HOME", "/tmp"),
                literal("XDG_STATE_HOME", STATE),
            ]),
            env_from: env_from(self.kubernetes),
            ports: Some(vec![port("grpc", self.port), port("http", HTTP)]),
            // Reading a large teacher for the first time may take minutes.
            startup_probe: Some(listens(5, 120)),
            liveness_probe: Some(listens(10, 6)),
            readiness_probe: Some(readiness()),
            resources: Some(coordinator_resources()),
            security_context: Some(container_security()),
            termination_message_policy: Some("FallbackToLogsOnError".into()),
            volume_mounts: Some(mounts),
            ..Container::default()
        }
    }
}

fn coordinator_resources() -> ResourceRequirements {
    let amounts = |all: &[(&str, &str)]| {
        let amounts = all.iter();
        let amounts =
            amounts.map(|(name, amount)| ((*name).to_owned(), Quantity((*amount).into())));
        Some(amounts.collect())
    };
    ResourceRequirements {
        requests: amounts(&[("cpu", "250m"), ("memory", "256Mi")]),
        limits: amounts(&[("memory", "2Gi")]),
        ..ResourceRequirements::default()
    }
}

/// Whether the port of the workers is there. Not the page: its places are few, strangers may take them all, and a
/// coordinator must not be killed for that.
fn listens(period_seconds: i32, failures: i32) -> Probe {
    Probe {
        tcp_socket: Some(TCPSocketAction {
            port: IntOrString::String("grpc".into()),
            host: None,
        }),
        period_seconds: Some(period_seconds),
        failure_threshold: Some(failures),
        timeout_seconds: Some(3),
        ..Probe::default()
    }
}

/// Whether the driver answers; shown by `kubectl get`, and nothing follows from it. Kubelets accept the run's own
/// certificate.
fn readiness() -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some("/readyz".into()),
            port: IntOrString::String("http".into()),
            scheme: Some("HTTPS".into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(5),
        failure_threshold: Some(2),
        timeout_seconds: Some(3),
        ..Probe::default()
    }
}
