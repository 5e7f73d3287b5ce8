//! `cluster.kubernetes`.

use std::collections::BTreeMap;

use super::super::resolve::Checked;
use super::View;
use crate::recipe::{Kubernetes, Toleration, Volume};

impl View<'_> {
    fn map(self) -> BTreeMap<String, String> {
        match &self.0.value {
            Checked::Map(map) => map.clone(),
            _ => BTreeMap::new(),
        }
    }

    fn texts(self) -> Vec<String> {
        self.items().map(|item| item.text().to_owned()).collect()
    }

    fn maybe_owned(self) -> Option<String> {
        self.maybe_text().map(str::to_owned)
    }
}

pub(super) fn kubernetes(v: View<'_>) -> Kubernetes {
    Kubernetes {
        image: v.get("image").text().into(),
        namespace: v.get("namespace").maybe_owned(),
        service: v.get("service").text().into(),
        service_account: v.get("service_account").maybe_owned(),
        gpus: v.get("gpus").small(),
        gpu_resource: v.get("gpu_resource").text().into(),
        resources: v.get("resources").map(),
        node_selector: v.get("node_selector").map(),
        tolerations: v.get("tolerations").items().map(toleration).collect(),
        labels: v.get("labels").map(),
        image_pull_secrets: v.get("image_pull_secrets").texts(),
        env_from: v.get("env_from").texts(),
        volumes: v.get("volumes").items().map(volume).collect(),
        priority_class: v.get("priority_class").maybe_owned(),
        grace_seconds: v.get("grace_seconds").small(),
        unreachable_seconds: v.get("unreachable_seconds").small(),
    }
}

fn toleration(v: View<'_>) -> Toleration {
    Toleration {
        key: v.get("key").maybe_owned(),
        value: v.get("value").maybe_owned(),
        effect: v.get("effect").maybe_owned().filter(|word| word != "any"),
    }
}

fn volume(v: View<'_>) -> Volume {
    Volume {
        claim: v.get("claim").text().into(),
        path: v.get("path").text().into(),
        read_only: v.get("read_only").flag(),
    }
}
