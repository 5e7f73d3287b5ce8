//! What holds manifests to their types, to their recipes and to the schemas of Kubernetes.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{
    ConfigMap, Namespace, PersistentVolumeClaim, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::harness::repository;

/// Recipes whose manifests are in the repository, by their overlays.
pub const OVERLAYS: [&str; 3] = ["cpu", "gpu", "external"];

/// One document, and where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// File, relative to deploy/kubernetes.
    pub file: String,
    /// Its text.
    pub text: String,
}

/// deploy/kubernetes.
pub fn folder() -> PathBuf {
    repository().join("deploy/kubernetes")
}

/// What `coordinator render kubernetes` prints for the recipe of an overlay: file by file.
pub fn rendered(coordinator: &Path, overlay: &str) -> anyhow::Result<Vec<Document>> {
    let recipe = folder().join("recipes").join(format!("{overlay}.yaml"));
    let output = Command::new(coordinator)
        .args(["render", "kubernetes"])
        .arg(&recipe)
        .output()?;
    anyhow::ensure!(
        output.status.success(),
        "render {}: {}",
        recipe.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout)?;
    let documents = text.split("\n---\n").map(|part| {
        let (head, body) = part.split_once('\n').context("a document has lines")?;
        let file = head
            .strip_prefix("# ")
            .context("a document begins with its file")?;
        let shared = file.contains('/');
        let file = if shared {
            file.to_owned()
        } else {
            format!("overlays/{overlay}/{file}")
        };
        let text = format!("{}\n", body.trim_end());
        Ok(Document { file, text })
    });
    documents.collect()
}

/// Every manifest in deploy/kubernetes: all YAML but recipes and kustomizations.
pub fn stored() -> anyhow::Result<Vec<Document>> {
    let mut found = Vec::new();
    let mut folders = vec![folder()];
    while let Some(inside) = folders.pop() {
        for entry in std::fs::read_dir(&inside)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if path.is_dir() && name != "recipes" {
                folders.push(path);
            } else if name.ends_with(".yaml") && name != "kustomization.yaml" && !path.is_dir() {
                let file = path.strip_prefix(folder())?.display().to_string();
                let text = std::fs::read_to_string(&path)?;
                found.push(Document { file, text });
            }
        }
    }
    found.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(found)
}

/// A document as a value.
pub fn read(document: &Document) -> anyhow::Result<Value> {
    serde_saphyr::from_str(&document.text).with_context(|| format!("{} is no YAML", document.file))
}

/// Keys of an object that its type does not know. A typed read says nothing of them, so the typed value is written
/// again and compared.
pub fn unknown_keys(object: &Value) -> anyhow::Result<Vec<String>> {
    let kind = object["kind"].as_str().unwrap_or_default();
    let again = match kind {
        "ConfigMap" => typed::<ConfigMap>(object),
        "Job" => typed::<Job>(object),
        "Namespace" => typed::<Namespace>(object),
        "NetworkPolicy" => typed::<NetworkPolicy>(object),
        "PersistentVolumeClaim" => typed::<PersistentVolumeClaim>(object),
        "PodDisruptionBudget" => typed::<PodDisruptionBudget>(object),
        "Role" => typed::<Role>(object),
        "RoleBinding" => typed::<RoleBinding>(object),
        "Secret" => typed::<Secret>(object),
        "Service" => typed::<Service>(object),
        "ServiceAccount" => typed::<ServiceAccount>(object),
        _ => anyhow::bail!("the kind {kind:?} is not known to this check"),
    };
    let again = again.with_context(|| format!("a {kind}"))?;
    let mut lost = Vec::new();
    compare(object, &again, String::new(), &mut lost);
    Ok(lost)
}

fn typed<T: DeserializeOwned + Serialize>(object: &Value) -> serde_json::Result<Value> {
    let typed: T = serde_json::from_value(object.clone())?;
    serde_json::to_value(typed)
}

fn compare(object: &Value, again: &Value, path: String, lost: &mut Vec<String>) {
    match (object, again) {
        (Value::Object(fields), Value::Object(kept)) => {
            for (key, value) in fields {
                let path = format!("{path}.{key}");
                match kept.get(key) {
                    Some(kept) => compare(value, kept, path, lost),
                    None => lost.push(path),
                }
            }
        }
        (Value::Array(items), Value::Array(kept)) if items.len() == kept.len() => {
            for (at, (item, kept)) in items.iter().zip(kept).enumerate() {
                compare(item, kept, format!("{path}.{at}"), lost);
            }
        }
        // An empty map that means "all" must not become nothing.
        (before, after) if before != after => lost.push(path),
        _ => {}
    }
}
