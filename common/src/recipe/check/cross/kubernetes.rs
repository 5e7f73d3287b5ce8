//! What `cluster.kubernetes` and the keys around it mean to each other.

use super::super::super::fault::Code;
use super::super::map;
use super::Rules;
use crate::recipe::{Cluster, Kubernetes, Launcher};

/// Labels that say whose pods they are; the launcher finds them by these.
const OWN_LABELS: [&str; 2] = ["app.kubernetes.io/", "distillery/"];

impl Rules<'_> {
    pub(super) fn kubernetes(&mut self, cluster: &Cluster) {
        let path = "cluster.kubernetes";
        match (&cluster.kubernetes, &cluster.launcher) {
            (None, Launcher::Kubernetes) => {
                let message = "cluster lacks kubernetes".to_owned();
                let label = "launcher kubernetes needs an image".to_owned();
                let help = "kubernetes: {image: REGISTRY/distillery-worker:TAG}".to_owned();
                self.refuse(
                    Code::Missing,
                    &[path, "cluster.launcher"],
                    message,
                    label,
                    help,
                );
            }
            (Some(kubernetes), Launcher::Kubernetes | Launcher::External) => {
                self.pods(kubernetes);
                self.reached(cluster, kubernetes);
            }
            (Some(_), Launcher::Local | Launcher::Slurm(_)) => {
                let message = "kubernetes means nothing when launcher is another".to_owned();
                let label = "belongs to launcher kubernetes, or external for `render`".to_owned();
                let help = "remove it, or set launcher: kubernetes in cluster".to_owned();
                self.refuse(
                    Code::NotApplicable,
                    &[path, "cluster.launcher"],
                    message,
                    label,
                    help,
                );
            }
            (None, _) => {}
        }
    }

    fn pods(&mut self, kubernetes: &Kubernetes) {
        for (i, volume) in kubernetes.volumes.iter().enumerate() {
            let path = format!("cluster.kubernetes.volumes.{i}.path");
            if !volume.path.starts_with('/') || volume.path.contains(':') {
                let message = format!("{path} {:?} cannot be mounted", volume.path);
                let label = "expected an absolute path without `:`".to_owned();
                let help = "such as /runs".to_owned();
                self.refuse(Code::Address, &[&path], message, label, help);
            }
        }
        for key in kubernetes.labels.keys() {
            if OWN_LABELS.iter().any(|own| key.starts_with(own)) {
                let path = "cluster.kubernetes.labels";
                let message = format!("the label {key} is set by the launcher");
                let label = "not to be chosen".to_owned();
                let help = "use a prefix of your own, or none".to_owned();
                self.refuse(Code::OutOfRange, &[path], message, label, help);
            }
        }
        let name = &kubernetes.gpu_resource;
        if !map::is_qualified_name(name) {
            let path = "cluster.kubernetes.gpu_resource";
            let message = format!("{path} {name:?} is no name of a resource");
            let label = "expected PREFIX/NAME".to_owned();
            self.refuse(
                Code::OutOfRange,
                &[path],
                message,
                label,
                "such as nvidia.com/gpu".to_owned(),
            );
        } else if kubernetes.gpus > 0 && kubernetes.resources.contains_key(name) {
            let paths = ["cluster.kubernetes.resources", "cluster.kubernetes.gpus"];
            let message = format!("{name} stands in resources, and gpus asks for it too");
            let label = "asked for twice".to_owned();
            self.refuse(
                Code::Duplicate,
                &paths,
                message,
                label,
                "keep gpus".to_owned(),
            );
        }
    }

    /// Pods dial a name that must lead to an address and a port known beforehand.
    fn reached(&mut self, cluster: &Cluster, kubernetes: &Kubernetes) {
        let service = &kubernetes.service;
        let host = service.parse::<std::net::IpAddr>();
        if host.is_err() && !map::is_dns_name(service) {
            let path = "cluster.kubernetes.service";
            let message = format!("{path} {service:?} cannot be dialled");
            let label = "expected the name of a Service, or an address".to_owned();
            let help = "without a port: that of cluster.listen is taken".to_owned();
            self.refuse(Code::Address, &[path], message, label, help);
            return;
        }
        // Everything on one host: a cluster for trying out, whose pods share the host's network.
        if host.is_ok_and(|address| address.is_loopback()) {
            return;
        }
        let Some((address, port)) = cluster.listen.rsplit_once(':') else {
            return;
        };
        let paths = ["cluster.listen", "cluster.launcher"];
        let help = "write 0.0.0.0:7070, the port of the coordinator's Service".to_owned();
        let only_here = address == "localhost"
            || address
                .trim_matches(['[', ']'])
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback());
        if only_here {
            let message = format!("pods cannot reach cluster.listen {}", cluster.listen);
            let label = "only this host can connect".to_owned();
            self.refuse(Code::Address, &paths, message, label, help);
        } else if port == "0" {
            let message = "pods cannot know the port of cluster.listen".to_owned();
            let label = "port 0 picks another each time".to_owned();
            self.refuse(Code::Address, &paths, message, label, help);
        }
    }
}
