//! The API server: every call that the launcher makes. `deploy/kubernetes` allows these and no more.

use std::fmt::Debug;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams,
    Preconditions, WatchEvent, WatchParams,
};
use serde_json::json;

use distillery_common::storage::chain;

use super::objects::{RUN, Workers};
use super::seen::{self, Seen};

/// Who writes, for the API server's records of fields.
const MANAGER: &str = "distillery-coordinator";
/// How long one call may take, with what the client waits by itself when told to come back later.
const CALL: Duration = Duration::from_secs(60);
/// Pods in one page of a list.
const PAGE: u32 = 500;
/// Longest wait for a change of a pod; the Job itself is not watched.
const LOOK: Duration = Duration::from_secs(5);
/// Wait after a watch that was refused: the look that follows tells why, or works without.
const AGAIN: Duration = Duration::from_secs(1);
/// Changes come in flocks.
const FLOCK: Duration = Duration::from_millis(200);

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// It was answered with a refusal, or not answered.
    #[error("{what}: {}", of_kube(source))]
    Call {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// The Job is not what the API server takes for one.
    #[error("{0}")]
    Unacceptable(Box<Error>),
    /// No answer.
    #[error("{what}: no answer for {} s", CALL.as_secs())]
    Silence {
        /// What was tried.
        what: &'static str,
    },
}

/// A refusal in the API server's own words, or the cause of a failed connection.
pub(super) fn of_kube(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} ({})", status.message, status.code),
        other => {
            let mut cause: &dyn std::error::Error = other;
            while let Some(deeper) = cause.source() {
                cause = deeper;
            }
            cause.to_string()
        }
    }
}

impl Error {
    fn code(&self) -> Option<u16> {
        match self {
            Self::Call { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            Self::Silence { .. } | Self::Unacceptable(_) => None,
        }
    }

    /// Whether asking again would help no more. Of no other call than that which makes the Job: what else is refused, a
    /// webhook or a proxy may refuse today and not tomorrow, and pods that run go on meanwhile.
    pub(super) fn is_hopeless(&self) -> bool {
        matches!(self, Self::Unacceptable(_))
    }
}

/// The part of a cluster that belongs to one run.
pub(super) struct Cluster {
    workers: Workers,
    job: Job,
    settings: String,
    namespace: String,
    // Untyped: the whole types of what is read would make this program half as large again.
    jobs: Api<DynamicObject>,
    pods: Api<DynamicObject>,
    secrets: Api<DynamicObject>,
}

impl Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("job", &self.job())
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// The cluster of this pod, or of KUBECONFIG. Nothing is asked of it yet.
    pub(super) async fn connect(workers: Workers) -> Result<Self, super::Error> {
        let config = kube::Config::infer()
            .await
            .map_err(super::Error::NoCluster)?;
        let namespace = workers.kubernetes.namespace.clone();
        let namespace = namespace.unwrap_or_else(|| config.default_namespace.clone());
        let client = kube::Client::try_from(config).map_err(super::Error::Client)?;
        let (job, settings) = workers.marked_job(&namespace)?;
        Ok(Self {
            job,
            settings,
            jobs: untyped::<Job>(&client, &namespace),
            pods: untyped::<Pod>(&client, &namespace),
            secrets: untyped::<Secret>(&client, &namespace),
            workers,
            namespace,
        })
    }

    pub(super) fn job(&self) -> String {
        self.workers.name()
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The Job and its pods, and the version from which changes of pods can be watched.
    pub(super) async fn look(&self) -> Result<(Seen, Option<String>), Error> {
        let name = self.job();
        let found = call("looking for the Job", self.jobs.get_opt(&name)).await?;
        let Some(job) = found else {
            return Ok((Seen::default(), None));
        };
        let job = seen::job(&job, &self.settings);
        let mut params = ListParams::default().labels(&self.selector()).limit(PAGE);
        let mut pods = Vec::new();
        let version = loop {
            let page = call("listing pods", self.pods.list(&params)).await?;
            pods.extend(
                page.items
                    .iter()
                    .filter(|pod| seen::is_of(pod, &job.uid))
                    .map(seen::pod),
            );
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => break page.metadata.resource_version,
            }
        };
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        let job = Some(job);
        Ok((Seen { job, pods }, version))
    }

    /// Waits until a pod changes, or for [`LOOK`]. However a watch ends, another look tells what is so now.
    pub(super) async fn changed(&self, version: Option<&str>) {
        let Some(version) = version else {
            tokio::time::sleep(FLOCK).await;
            return;
        };
        let params = WatchParams::default()
            .labels(&self.selector())
            .timeout(LOOK.as_secs() as u32);
        let watch = async {
            let Ok(events) = self.pods.watch(&params, version).await else {
                return tokio::time::sleep(AGAIN).await;
            };
            let mut events = pin!(events);
            loop {
                match events.next().await {
                    Some(Ok(WatchEvent::Bookmark(_))) => {}
                    Some(Ok(
                        WatchEvent::Added(_) | WatchEvent::Modified(_) | WatchEvent::Deleted(_),
                    )) => return tokio::time::sleep(FLOCK).await,
                    // The version is too old, or the connection broke: what changed meanwhile is not known.
                    Some(Ok(WatchEvent::Error(_)) | Err(_)) => {
                        return tokio::time::sleep(FLOCK).await;
                    }
                    // The API server ends every watch after a while.
                    None => return,
                }
            }
        };
        let _ = tokio::time::timeout(LOOK, watch).await;
    }

    /// Makes Secret and Job; a Job that somebody else made meanwhile is left as it is.
    pub(super) async fn create(&self) -> Result<(), Error> {
        self.apply_secret(None).await?;
        let job = object("making the Job", &self.job)?;
        let made = call(
            "making the Job",
            self.jobs.create(&PostParams::default(), &job),
        )
        .await;
        match made {
            Ok(made) => self.apply_secret(made.metadata.uid.as_deref()).await,
            Err(error) if error.code() == Some(409) => {
                tracing::info!(%error, "the Job is there already");
                Ok(())
            }
            // The API server read it and found it wrong: it would say so again.
            Err(error) if matches!(error.code(), Some(400 | 422)) => {
                Err(Error::Unacceptable(Box::new(error)))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the Secret, or makes it right. With the Job's uid it goes when the Job goes.
    pub(super) async fn apply_secret(&self, owner: Option<&str>) -> Result<(), Error> {
        let secret = self.workers.secret(owner);
        let params = PatchParams::apply(MANAGER).force();
        let name = self.job();
        let patch = Patch::Apply(&secret);
        let applied = self.secrets.patch(&name, &params, &patch);
        call("writing the Secret", applied).await.map(drop)
    }

    /// Deletes the Job and, in the background, its pods and its Secret. One that is not there is no error, nor is
    /// another one than that of `uid`.
    pub(super) async fn delete(&self, uid: Option<&str>) -> Result<(), Error> {
        let mut params = DeleteParams::background();
        if let Some(uid) = uid {
            params = params.preconditions(only(uid));
        }
        let name = self.job();
        forgive(call("deleting the Job", self.jobs.delete(&name, &params)).await)
    }

    /// Says for a node that cannot any more that a pod has failed, and takes the pod away at once.
    ///
    /// The Job's controller waits for a pod to *end* before it replaces it, and a pod that is only deleted has not ended.
    pub(super) async fn release(&self, pod: &str, uid: &str) -> Result<(), Error> {
        let status = json!({
            "metadata": { "uid": uid },
            "status": {
                "phase": "Failed",
                "reason": "NodeLost",
                "message": "the node does not answer and the coordinator does not hear the worker",
                "conditions": [{
                    "type": "DisruptionTarget",
                    "status": "True",
                    "reason": "DeletionByCoordinator",
                    "message": "the node does not answer and the coordinator does not hear the worker",
                }],
            },
        });
        let params = PatchParams::default();
        let patch = Patch::Strategic(&status);
        let patched = self.pods.patch_status(pod, &params, &patch);
        forgive(call("giving up a pod", patched).await)?;
        let params = DeleteParams::default()
            .grace_period(0)
            .preconditions(only(uid));
        forgive(call("deleting a pod", self.pods.delete(pod, &params)).await)
    }

    fn selector(&self) -> String {
        format!("{RUN}={}", self.workers.run_id)
    }
}

/// Deletes the Job of this name, without anything else of a run being known; gives back the namespace where there was
/// none, or why it could not be deleted.
pub(super) async fn delete_job(
    name: &str,
    namespace: Option<&str>,
) -> Result<Option<String>, String> {
    let unknown = |error| format!("no cluster is known here: {}", chain(&error));
    let config = kube::Config::infer().await.map_err(unknown)?;
    let namespace = namespace.unwrap_or(&config.default_namespace).to_owned();
    let client = kube::Client::try_from(config).map_err(|error| of_kube(&error))?;
    let jobs = untyped::<Job>(&client, &namespace);
    let params = DeleteParams::background();
    match call("deleting the Job", jobs.delete(name, &params)).await {
        Ok(_) => Ok(None),
        Err(error) if error.code() == Some(404) => Ok(Some(namespace)),
        Err(error) => Err(error.to_string()),
    }
}

fn untyped<K>(client: &kube::Client, namespace: &str) -> Api<DynamicObject>
where
    K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
{
    Api::namespaced_with(client.clone(), namespace, &ApiResource::erase::<K>(&()))
}

/// A typed object as it is sent.
fn object<K: serde::Serialize>(what: &'static str, typed: &K) -> Result<DynamicObject, Error> {
    let value = serde_json::to_value(typed).and_then(serde_json::from_value);
    value.map_err(|error| Error::Call {
        what,
        source: Box::new(kube::Error::SerdeError(error)),
    })
}

fn only(uid: &str) -> Preconditions {
    Preconditions {
        uid: Some(uid.to_owned()),
        resource_version: None,
    }
}

async fn call<T>(
    what: &'static str,
    answer: impl Future<Output = kube::Result<T>>,
) -> Result<T, Error> {
    match tokio::time::timeout(CALL, answer).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(Error::Call {
            what,
            source: Box::new(source),
        }),
        Err(_) => Err(Error::Silence { what }),
    }
}

/// What was to be deleted or changed is gone, or is another one by now: nothing is left to do.
fn forgive<T>(answer: Result<T, Error>) -> Result<(), Error> {
    match answer {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(()),
        Err(error) => Err(error),
    }
}
