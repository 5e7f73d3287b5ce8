//! Workers as pods of one Job, which Kubernetes places, starts and replaces.
//!
//! The Job is found again by its name, which follows from the run's id, so that a coordinator that starts again adopts
//! it. `objects` says what is asked for, `seen` what was found, `decide` what follows from it, `cluster` speaks to the
//! API server. What is decided depends on a look at the whole state, never on single events: a watch only says when
//! to look again, and whatever breaks it costs no more than a look.

mod cluster;
mod decide;
mod find;
pub mod manifests;
mod objects;
mod seen;

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use distillery_common::backoff::Backoff;

use crate::driver::{Clock, Handle};
use crate::scheduler::Event;

use cluster::Cluster;
use decide::{Act, Memory};

pub use find::{Found, Reached, find};
pub use objects::{Workers, job_name};

/// Wait after a failed call; doubles.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Longest wait after failed calls.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// How long the cluster is asked to delete the Job at the end.
const FAREWELL: Duration = Duration::from_secs(30);

/// Why nothing could be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No cluster is known.
    #[error(
        "cluster.launcher is kubernetes, but there is no cluster: this process is in no pod with a service account, and KUBECONFIG names no usable file"
    )]
    NoCluster(#[source] kube::config::InferConfigError),
    /// The configuration cannot be used.
    #[error("the configuration of the Kubernetes cluster cannot be used")]
    Client(#[source] kube::Error),
    /// Not expected: the types are Kubernetes' own.
    #[error("the Job of workers cannot be written down")]
    Unwritable(#[from] serde_json::Error),
    /// The Job that is of no use any more is still there.
    #[error(
        "its workers may go on: {why}; `kubectl delete job {job}{in_namespace}` ends them, and its Secret goes with it"
    )]
    Left {
        /// Name of the Job.
        job: String,
        /// What names the namespace on the command line.
        in_namespace: String,
        /// Why it is there.
        why: String,
    },
}

/// Deletes the Job of a run that nobody has, and with it pods and Secret. One that is not there is no error: then there is
/// something to tell, since it may be in another namespace than that of this host's KUBECONFIG.
///
/// # Errors
/// [`Error::Left`] when the cluster cannot be asked from here, with what to do.
pub async fn end_job(run_id: &str, namespace: Option<&str>) -> Result<Option<String>, Error> {
    let job = job_name(run_id);
    match cluster::delete_job(&job, namespace).await {
        Ok(missing) => Ok(missing.map(|missing| {
            format!(
                "there is no Job {job} in namespace {missing}; should its workers be in another one, `kubectl delete job {job} --namespace NAMESPACE` ends them"
            )
        })),
        Err(why) => Err(Error::Left {
            job,
            in_namespace: namespace.map_or_else(String::new, |name| format!(" --namespace {name}")),
            why,
        }),
    }
}

/// The Job of a run. Dropping it leaves the Job to the cluster.
#[derive(Debug)]
pub struct Launched {
    task: JoinHandle<Keeper>,
    stop: watch::Sender<bool>,
}

/// Starts to ask for `workers`, and keeps asking until told to finish.
pub async fn start(workers: Workers, handle: Handle, clock: Clock) -> Result<Launched, Error> {
    let cluster = Cluster::connect(workers).await?;
    let keeper = Keeper {
        cluster,
        handle,
        clock,
        memory: Memory::default(),
        told: None,
        backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
    };
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(keeper.keep(stopped));
    Ok(Launched { task, stop })
}

impl Launched {
    /// Deletes the Job, and with it the pods.
    pub async fn finish(self) {
        self.stop.send_replace(true);
        match self.task.await {
            Ok(keeper) => keeper.end().await,
            Err(error) => tracing::error!(%error, "the launcher ended by itself"),
        }
    }

    /// Leaves the Job as it is, to the coordinator that goes on with the run.
    pub async fn leave(self) {
        self.stop.send_replace(true);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the launcher ended by itself");
        }
    }
}

/// What holds the Job as the run needs it.
#[derive(Debug)]
struct Keeper {
    cluster: Cluster,
    handle: Handle,
    clock: Clock,
    memory: Memory,
    backoff: Backoff,
    /// The Job whose Secret holds this life's join string.
    told: Option<String>,
}

impl Keeper {
    async fn keep(mut self, mut stopped: watch::Receiver<bool>) -> Self {
        while !*stopped.borrow() {
            tokio::select! {
                biased;
                _ = stopped.changed() => {}
                () = self.round() => {}
            }
        }
        self
    }

    /// One look, what follows from it, and the wait for a reason to look again.
    async fn round(&mut self) {
        match self.look_and_act().await {
            Ok(version) => {
                if self.memory.reached() {
                    tracing::warn!("the Kubernetes API answers again");
                }
                self.backoff.reset();
                self.cluster.changed(version.as_deref()).await;
            }
            Err(error) => {
                if let Some(message) = self.memory.failed(&error) {
                    tracing::warn!("{message}");
                }
                if error.is_hopeless() {
                    self.give_up(format!(
                        "the Kubernetes API refuses the Job of workers: {error}"
                    ))
                    .await;
                }
                tokio::time::sleep(self.backoff.next_delay(0.0)).await;
            }
        }
    }

    async fn look_and_act(&mut self) -> Result<Option<String>, cluster::Error> {
        let (seen, version) = self.cluster.look().await?;
        let alive = self.alive().await;
        // A Job that is adopted may hold an earlier address or token, and a Secret that was written just before its maker
        // was killed belongs to no Job yet.
        let job = seen.job.as_ref().filter(|job| !job.leaving);
        if let Some(uid) = job
            .map(|job| &job.uid)
            .filter(|uid| self.told.as_ref() != Some(*uid))
        {
            self.cluster.apply_secret(Some(uid)).await?;
            self.told = Some(uid.clone());
        }
        for act in decide::decide(self.clock.now(), &seen, &alive, &mut self.memory) {
            tracing::debug!(?act, "decided");
            match act {
                Act::Create => self.cluster.create().await?,
                Act::Replace { uid } => self.cluster.delete(Some(&uid)).await?,
                Act::Release { pod, uid } => self.cluster.release(&pod, &uid).await?,
                Act::Tell(message) => tracing::warn!("{message}"),
                Act::GiveUp(message) => self.give_up(message).await,
            }
        }
        Ok(version)
    }

    /// Names of the workers that are heard, without what tells the devices of one host apart.
    async fn alive(&self) -> BTreeSet<String> {
        // A driver that has ended hears nobody, and nothing is decided for it any more.
        let Ok(snapshot) = self.handle.snapshot().await else {
            return BTreeSet::new();
        };
        let heard = snapshot
            .view
            .workers
            .into_iter()
            .filter(|worker| worker.state != "disconnected" && worker.state != "suspect");
        heard
            .map(|worker| match worker.name.split_once('.') {
                Some((pod, _)) => pod.to_owned(),
                None => worker.name,
            })
            .collect()
    }

    /// Tells the run that no worker will come. It ends by that, and this launcher with it.
    async fn give_up(&mut self, message: String) {
        // The driver may have ended meanwhile; then nobody needs to know.
        let _ = self.handle.event(Event::LauncherFailed { message }).await;
    }

    /// Deletes the Job, and with it pods and Secret.
    async fn end(mut self) {
        let delete = async {
            while let Err(error) = self.cluster.delete(None).await {
                tracing::warn!(%error, "the Job cannot be deleted yet");
                tokio::time::sleep(self.backoff.next_delay(0.0)).await;
            }
        };
        if tokio::time::timeout(FAREWELL, delete).await.is_err() {
            tracing::error!(
                "the Job of workers is left behind; delete it with `kubectl delete job {} --namespace {}`",
                self.cluster.job(),
                self.cluster.namespace()
            );
        }
    }
}
