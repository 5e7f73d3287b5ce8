//! What pods of workers look like: `cluster.kubernetes`.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Workers as pods of one Job. Nothing here changes a bit of a result.
#[derive(Debug, Clone, PartialEq)]
pub struct Kubernetes {
    /// Image that holds `worker` and `engine`.
    pub image: String,
    /// Where the pods are; the coordinator's own namespace when none.
    pub namespace: Option<String>,
    /// What workers dial: the name of the coordinator's Service, or an address where names are not resolved.
    pub service: String,
    /// Account that the pods run under; the namespace's default when none.
    pub service_account: Option<String>,
    /// Devices of each pod; 0 means that it works on the CPU.
    pub gpus: u32,
    /// As the cluster calls a GPU.
    pub gpu_resource: String,
    /// Requests and limits of the worker's container, by resource.
    pub resources: BTreeMap<String, String>,
    /// Labels that a node must have.
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that pods put up with.
    pub tolerations: Vec<Toleration>,
    /// Further labels of the pods.
    pub labels: BTreeMap<String, String>,
    /// Secrets that open the image's registry.
    pub image_pull_secrets: Vec<String>,
    /// Secrets whose keys become environment variables: credentials of a bucket.
    pub env_from: Vec<String>,
    /// What is mounted: the run's folder, the teacher's.
    pub volumes: Vec<Volume>,
    /// Class that says who gives way to whom; the cluster's default when none.
    pub priority_class: Option<String>,
    /// Seconds between a request to leave and the end.
    pub grace_seconds: u32,
    /// Seconds that a pod stays bound to a node that is not ready or not reached.
    pub unreachable_seconds: u32,
}

/// A taint that is put up with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toleration {
    /// Its key; all keys when none.
    pub key: Option<String>,
    /// Its value; any when none.
    pub value: Option<String>,
    /// Its effect; all effects when none.
    pub effect: Option<String>,
}

/// A claim that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Name of the PersistentVolumeClaim.
    pub claim: String,
    /// Where, absolute.
    pub path: String,
    /// Whether nothing may be written there.
    pub read_only: bool,
}

impl Kubernetes {
    /// Pods that give `workers` workers: each has one for every device.
    pub fn pods(&self, workers: u32) -> u32 {
        workers.div_ceil(self.gpus.max(1))
    }

    /// `host:port` that workers dial when the coordinator listens on `port`.
    pub fn endpoint(&self, port: u16) -> String {
        match self.service.parse::<std::net::IpAddr>() {
            Ok(address) => std::net::SocketAddr::new(address, port).to_string(),
            Err(_) => format!("{}:{port}", self.service),
        }
    }

    /// In the shape of a recipe.
    pub(super) fn to_stored(&self) -> Value {
        let or_none = |text: &Option<String>| json!(text.as_deref().unwrap_or("none"));
        let mut stored = json!({
            "image": self.image,
            "namespace": or_none(&self.namespace),
            "service": self.service,
            "service_account": or_none(&self.service_account),
            "gpus": self.gpus,
            "gpu_resource": self.gpu_resource,
            "resources": self.resources,
            "node_selector": self.node_selector,
            "labels": self.labels,
            "priority_class": or_none(&self.priority_class),
            "grace_seconds": self.grace_seconds,
            "unreachable_seconds": self.unreachable_seconds,
        });
        // A list holds at least one value, so that an empty one is left out.
        for (key, names) in [
            ("image_pull_secrets", &self.image_pull_secrets),
            ("env_from", &self.env_from),
        ] {
            if !names.is_empty() {
                stored[key] = json!(names);
            }
        }
        if !self.tolerations.is_empty() {
            let tolerations = self.tolerations.iter().map(|toleration| {
                json!({
                    "key": or_none(&toleration.key),
                    "value": or_none(&toleration.value),
                    "effect": toleration.effect.as_deref().unwrap_or("any"),
                })
            });
            stored["tolerations"] = tolerations.collect();
        }
        if !self.volumes.is_empty() {
            let volumes = self.volumes.iter().map(|volume| {
                json!({ "claim": volume.claim, "path": volume.path, "read_only": volume.read_only })
            });
            stored["volumes"] = volumes.collect();
        }
        stored
    }
}
