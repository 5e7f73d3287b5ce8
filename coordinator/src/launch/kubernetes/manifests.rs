//! The same pods, and all that must be there around them, as manifests for `kubectl apply`.
//!
//! What every run needs is in `base`, what only a coordinator that launches its own workers needs in `launcher`, the
//! rest belongs to one recipe. No secret is in any of them: the run's token is a Secret that its owner makes.

mod coordinator;

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{
    ConfigMap, Namespace, Service, ServiceAccount, ServicePort, ServiceSpec,
};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::api::rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Serialize;
use serde_json::Value;

use distillery_common::recipe::{Kubernetes, Launcher, Recipe};

use super::find::{NEEDED, Needed};
use super::objects::{self, APP, Names};

/// Name of the coordinator's objects.
const COORDINATOR: &str = "distillery-coordinator";
/// Namespace where the recipe names none.
const NAMESPACE: &str = "distillery";
/// ConfigMap with the recipe, where it is mounted, and its key.
const RECIPE: (&str, &str, &str) = ("distillery-recipe", "/etc/distillery/recipe", "recipe.yaml");
/// Secret with the join string for workers that others start: the key is `join`.
const JOIN: &str = "distillery-join";
/// Job of workers that others start.
const WORKERS: &str = "distillery-workers";
/// Port of the page, the metrics and the probes.
const HTTP: i32 = 8080;

/// What manifests are written for.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The recipe.
    pub recipe: &'a Recipe,
    /// Its text.
    pub text: &'a str,
    /// Changes of it that the command line makes.
    pub sets: &'a [String],
    /// Image that holds the coordinator.
    pub image: &'a str,
}

/// One object.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// File that holds it, in the layout of deploy/kubernetes: `base/…` and `launcher/…` are the same for every recipe of a
    /// namespace, Service and port.
    pub file: &'static str,
    /// The object.
    pub object: Value,
}

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Pods are not described.
    #[error(
        "the recipe has no cluster.kubernetes, which says what pods look like; `cluster: {{launcher: kubernetes, kubernetes: {{image: …}}}}` is the least"
    )]
    NoPods,
    /// The token would be written down.
    #[error(
        "cluster.token would stand in a ConfigMap that many may read; leave it out of the recipe: the Secret distillery-token holds it"
    )]
    Token,
    /// A file of this host.
    #[error(
        "output {0} is a folder of the coordinator's pod that goes with it; name a bucket, or a folder on one of cluster.kubernetes.volumes"
    )]
    Output(String),
    /// Not expected: the types are Kubernetes' own.
    #[error("a manifest cannot be written")]
    Unwritable(#[from] serde_json::Error),
}

/// All manifests of a run, in the order in which they are applied.
pub fn manifests(source: Source<'_>) -> Result<Vec<Manifest>, Error> {
    let cluster = &source.recipe.cluster;
    let kubernetes = cluster.kubernetes.as_ref().ok_or(Error::NoPods)?;
    if cluster.token.is_some() {
        return Err(Error::Token);
    }
    check_output(source.recipe, kubernetes)?;
    let scope = Scope {
        source,
        kubernetes,
        namespace: kubernetes.namespace.as_deref().unwrap_or(NAMESPACE),
        port: port(&cluster.listen),
        launches: cluster.launcher == Launcher::Kubernetes,
    };
    let mut all = vec![
        manifest("base/namespace.yaml", &scope.namespace())?,
        manifest("base/service-account.yaml", &scope.account())?,
        manifest("base/service.yaml", &scope.service())?,
        manifest(
            "base/network-policy-coordinator.yaml",
            &scope.reach_coordinator(),
        )?,
        manifest("base/network-policy-worker.yaml", &scope.reach_workers())?,
    ];
    if scope.launches {
        all.push(manifest("launcher/role.yaml", &scope.role())?);
        all.push(manifest("launcher/role-binding.yaml", &scope.binding())?);
    }
    all.push(manifest("recipe.yaml", &scope.recipe())?);
    all.push(manifest("disruption-budget.yaml", &scope.budget())?);
    all.push(manifest("coordinator.yaml", &scope.coordinator())?);
    if !scope.launches {
        all.push(manifest("workers.yaml", &scope.workers())?);
    }
    Ok(all)
}

fn manifest<T: Serialize>(file: &'static str, object: &T) -> Result<Manifest, Error> {
    let object = serde_json::to_value(object)?;
    Ok(Manifest { file, object })
}

/// A pod's own disk goes with the pod, so that a run on a folder needs a volume.
fn check_output(recipe: &Recipe, kubernetes: &Kubernetes) -> Result<(), Error> {
    let Some(path) = recipe.output.strip_prefix("file://") else {
        return Ok(());
    };
    let on = |mounted: &str| {
        let rest = path.strip_prefix(mounted.trim_end_matches('/'));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let mut writable = kubernetes.volumes.iter().filter(|volume| !volume.read_only);
    if writable.any(|volume| on(&volume.path)) {
        return Ok(());
    }
    Err(Error::Output(recipe.output.clone()))
}

/// The port of a checked address.
fn port(listen: &str) -> i32 {
    let port = listen.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
    port.and_then(Result::ok).map_or(0, i32::from)
}

struct Scope<'a> {
    source: Source<'a>,
    kubernetes: &'a Kubernetes,
    namespace: &'a str,
    port: i32,
    /// Whether the coordinator starts its workers.
    launches: bool,
}

impl Scope<'_> {
    fn meta(&self, name: &str, component: &str) -> ObjectMeta {
        ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(self.namespace.to_owned()),
            labels: Some(objects::labels(component, None)),
            ..ObjectMeta::default()
        }
    }

    fn namespace(&self) -> Namespace {
        let mut labels = BTreeMap::from([(APP.0.to_owned(), APP.1.to_owned())]);
        // Pods that do not keep this standard are refused.
        for mode in ["enforce", "warn"] {
            let key = format!("pod-security.kubernetes.io/{mode}");
            labels.insert(key, "restricted".into());
        }
        Namespace {
            metadata: ObjectMeta {
                name: Some(self.namespace.to_owned()),
                labels: Some(labels),
                ..ObjectMeta::default()
            },
            ..Namespace::default()
        }
    }

    fn account(&self) -> ServiceAccount {
        ServiceAccount {
            metadata: self.meta(COORDINATOR, "coordinator"),
            // The pod that needs its token says so.
            automount_service_account_token: Some(false),
            ..ServiceAccount::default()
        }
    }

    /// Exactly the calls of `cluster`, which a test compares with what a coordinator asks for.
    fn role(&self) -> Role {
        let rule = |needed: &Needed| PolicyRule {
            api_groups: Some(vec![needed.group.into()]),
            resources: Some(vec![needed.path()]),
            verbs: needed.verbs.iter().map(|&verb| verb.to_owned()).collect(),
            ..PolicyRule::default()
        };
        Role {
            metadata: self.meta(COORDINATOR, "coordinator"),
            rules: Some(NEEDED.iter().map(rule).collect()),
        }
    }

    fn binding(&self) -> RoleBinding {
        RoleBinding {
            metadata: self.meta(COORDINATOR, "coordinator"),
            role_ref: RoleRef {
                api_group: Some("rbac.authorization.k8s.io".into()),
                kind: "Role".into(),
                name: COORDINATOR.into(),
            },
            subjects: Some(vec![Subject {
                kind: "ServiceAccount".into(),
                name: COORDINATOR.into(),
                namespace: Some(self.namespace.to_owned()),
                api_group: None,
            }]),
        }
    }

    /// The name that workers dial. What they say is not lost while the coordinator is not ready, so that they need not
    /// wait until it is.
    fn service(&self) -> Service {
        let port = |name: &str, port: i32| ServicePort {
            name: Some(name.into()),
            port,
            target_port: Some(IntOrString::String(name.into())),
            ..ServicePort::default()
        };
        let named = &self.kubernetes.service;
        let name = match named.parse::<std::net::IpAddr>() {
            Ok(_) => COORDINATOR,
            Err(_) => named.split('.').next().unwrap_or(COORDINATOR),
        };
        Service {
            metadata: self.meta(name, "coordinator"),
            spec: Some(ServiceSpec {
                selector: Some(objects::labels("coordinator", None)),
                ports: Some(vec![port("grpc", self.port), port("http", HTTP)]),
                publish_not_ready_addresses: Some(true),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        }
    }

    /// Workers may speak to the coordinator; the namespace may look at its page, which asks for the token.
    fn reach_coordinator(&self) -> NetworkPolicy {
        let grpc = (
            vec![peer(Some("worker")), peer(Some("coordinator"))],
            "grpc",
        );
        let http = (vec![peer(None)], "http");
        self.policy(
            "coordinator",
            [grpc, http].map(|(from, port)| NetworkPolicyIngressRule {
                from: Some(from),
                ports: Some(vec![NetworkPolicyPort {
                    port: Some(IntOrString::String(port.into())),
                    ..NetworkPolicyPort::default()
                }]),
            }),
        )
    }

    /// Engines of a group speak to each other, on ports that they choose; nobody else speaks to them.
    fn reach_workers(&self) -> NetworkPolicy {
        self.policy(
            "worker",
            [NetworkPolicyIngressRule {
                from: Some(vec![peer(Some("worker"))]),
                ports: None,
            }],
        )
    }

    fn policy<const N: usize>(
        &self,
        component: &str,
        ingress: [NetworkPolicyIngressRule; N],
    ) -> NetworkPolicy {
        let name = format!("distillery-{component}");
        NetworkPolicy {
            metadata: self.meta(&name, component),
            spec: Some(NetworkPolicySpec {
                pod_selector: Some(selector(component)),
                policy_types: Some(vec!["Ingress".into()]),
                ingress: Some(ingress.to_vec()),
                ..NetworkPolicySpec::default()
            }),
        }
    }

    fn recipe(&self) -> ConfigMap {
        let text = self.source.text.to_owned();
        ConfigMap {
            metadata: self.meta(RECIPE.0, "coordinator"),
            data: Some(BTreeMap::from([(RECIPE.2.to_owned(), text)])),
            ..ConfigMap::default()
        }
    }

    /// Evictions may cost one pod of the fewest that training goes on with, so that a node can always be emptied. But not all
    /// pods at once, where there are several: groups survive departures as long as somebody is left who holds their state, and
    /// the last pod waits until another is there. A run on one pod alone must not keep its node from being emptied.
    fn budget(&self) -> PodDisruptionBudget {
        let cluster = &self.source.recipe.cluster;
        let pods = |workers| i32::try_from(self.kubernetes.pods(workers)).unwrap_or(i32::MAX);
        let (fewest, most) = (pods(cluster.min_workers), pods(cluster.max_workers));
        let kept = (fewest - 1).max(1).min(most - 1).max(0);
        PodDisruptionBudget {
            metadata: self.meta("distillery-worker", "worker"),
            spec: Some(PodDisruptionBudgetSpec {
                // Pods of a Job cannot be counted by `maxUnavailable`.
                min_available: Some(IntOrString::Int(kept)),
                selector: Some(selector("worker")),
                ..PodDisruptionBudgetSpec::default()
            }),
            ..PodDisruptionBudget::default()
        }
    }

    /// Workers that wait for their Secret, and then work for whoever it names.
    fn workers(&self) -> Job {
        let names = Names {
            job: WORKERS,
            secret: JOIN,
            namespace: Some(self.namespace),
            run: None,
        };
        objects::job(
            self.kubernetes,
            self.source.recipe.cluster.max_workers,
            false,
            names,
        )
    }
}

fn selector(component: &str) -> LabelSelector {
    LabelSelector {
        match_labels: Some(objects::labels(component, None)),
        match_expressions: None,
    }
}

/// Pods of a component in this namespace, or all of its pods.
fn peer(component: Option<&str>) -> NetworkPolicyPeer {
    NetworkPolicyPeer {
        pod_selector: Some(component.map_or_else(LabelSelector::default, selector)),
        ..NetworkPolicyPeer::default()
    }
}
