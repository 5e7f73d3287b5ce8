//! What the doctor asks: whether there is a cluster, whether it answers, and whether it allows what the launcher does.
//!
//! The cluster is found as the launcher finds it, so that both speak of the same one. Nothing is changed in it.

use futures::future::try_join_all;
use k8s_openapi::api::authorization::v1::SelfSubjectAccessReview;
use kube::api::{Api, ApiResource, DynamicObject, PostParams};
use kube::config::{InClusterError, KubeConfigOptions, KubeconfigError};
use serde_json::json;

use distillery_common::storage::chain;

use super::cluster::of_kube;

/// A kind of object, and what the launcher does with it.
#[derive(Debug)]
pub(super) struct Needed {
    pub(super) group: &'static str,
    resource: &'static str,
    /// The part of the object that is meant; the whole when empty.
    part: &'static str,
    pub(super) verbs: &'static [&'static str],
}

/// All that the launcher does in its namespace: its Role allows this and no more.
pub(super) const NEEDED: [Needed; 4] = [
    needed("batch", "jobs", "", &["create", "delete", "get"]),
    needed("", "pods", "", &["delete", "list", "watch"]),
    needed("", "pods", "status", &["patch"]),
    needed("", "secrets", "", &["create", "patch"]),
];

const fn needed(
    group: &'static str,
    resource: &'static str,
    part: &'static str,
    verbs: &'static [&'static str],
) -> Needed {
    Needed {
        group,
        resource,
        part,
        verbs,
    }
}

impl Needed {
    /// As a Role names it: `pods/status`.
    pub(super) fn path(&self) -> String {
        match self.part {
            "" => self.resource.to_owned(),
            part => format!("{}/{part}", self.resource),
        }
    }

    /// As people name it: `jobs.batch`.
    fn name(&self) -> String {
        match self.group {
            "" => self.path(),
            group => format!("{}.{group}", self.path()),
        }
    }
}

/// What there is.
#[derive(Debug)]
pub enum Found {
    /// Neither a pod's account nor a file tells of a cluster.
    Nothing,
    /// Something tells of one, and cannot be used.
    Unusable(String),
    /// A cluster that did not answer, or not as one that lets us in.
    Unreached {
        /// Its address.
        server: String,
        /// What happened.
        why: String,
    },
    /// A cluster that answers.
    Reached(Reached),
}

/// A cluster that answers.
#[derive(Debug)]
pub struct Reached {
    /// Its address.
    pub server: String,
    /// What it says it is.
    pub version: String,
    /// Where workers would be, unless the recipe says otherwise.
    pub namespace: String,
    /// What the launcher needs and may not do, such as `create jobs.batch`.
    pub denied: Vec<String>,
}

/// Looks for the cluster that the launcher would ask, and asks it. Takes as long as the cluster does.
pub async fn find() -> Found {
    let Ok(config) = kube::Config::infer().await else {
        return nothing_usable().await;
    };
    let server = config.cluster_url.to_string();
    let namespace = config.default_namespace.clone();
    let client = match kube::Client::try_from(config) {
        Ok(client) => client,
        Err(error) => return Found::Unusable(of_kube(&error)),
    };
    let asked = async {
        let version = client.apiserver_version().await?.git_version;
        kube::Result::Ok((version, denied(&client, &namespace).await?))
    };
    match asked.await {
        Ok((version, denied)) => Found::Reached(Reached {
            server,
            version,
            namespace,
            denied,
        }),
        Err(error) => Found::Unreached {
            server,
            why: of_kube(&error),
        },
    }
}

/// Whether anything tells of a cluster, and what is wrong with it then. `infer` tries the file first and the pod's account next,
/// and keeps to itself how each failed.
async fn nothing_usable() -> Found {
    let file = kube::Config::from_kubeconfig(&KubeConfigOptions::default()).await;
    let is_named = std::env::var_os("KUBECONFIG").is_some_and(|paths| !paths.is_empty());
    let no_file = |error: &KubeconfigError| match error {
        KubeconfigError::FindPath => !is_named,
        KubeconfigError::ReadConfig(why, _) => {
            !is_named && why.kind() == std::io::ErrorKind::NotFound
        }
        _ => false,
    };
    match (file, kube::Config::incluster()) {
        (Err(file), Err(InClusterError::ReadEnvironmentVariable(_))) if no_file(&file) => {
            Found::Nothing
        }
        (Err(file), Err(pod)) if no_file(&file) => Found::Unusable(chain(&pod)),
        (Err(file), _) => Found::Unusable(chain(&file)),
        // Somebody wrote it just now.
        (Ok(_), _) => Found::Unusable("it changed while it was read".into()),
    }
}

/// What of [`NEEDED`] the cluster does not allow in `namespace`.
async fn denied(client: &kube::Client, namespace: &str) -> kube::Result<Vec<String>> {
    let reviews: Api<DynamicObject> = Api::all_with(
        client.clone(),
        &ApiResource::erase::<SelfSubjectAccessReview>(&()),
    );
    let reviews = &reviews;
    let asked = NEEDED.iter().flat_map(|needed| {
        let verbs = needed.verbs.iter();
        verbs.map(move |verb| ask(reviews, namespace, needed, verb))
    });
    let answers = try_join_all(asked).await?;
    Ok(answers.into_iter().flatten().collect())
}

/// What may not be done, if it may not.
async fn ask(
    reviews: &Api<DynamicObject>,
    namespace: &str,
    needed: &Needed,
    verb: &str,
) -> kube::Result<Option<String>> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "metadata": {},
        "spec": { "resourceAttributes": {
            "namespace": namespace, "group": needed.group, "resource": needed.resource,
            "subresource": needed.part, "verb": verb,
        } },
    });
    let review = serde_json::from_value(review).map_err(kube::Error::SerdeError)?;
    let answer = reviews.create(&PostParams::default(), &review).await?;
    let allowed = answer.data["status"]["allowed"] == true;
    Ok((!allowed).then(|| format!("{verb} {}", needed.name())))
}
