//! A Kubernetes API server in this process, with the controllers, nodes and kubelets behind it.
//!
//! It answers as a real control plane (1.36) was seen to answer, as far as workers of a run need it: Indexed Jobs with
//! failure policies, pods that are bound, started, evicted and counted, nodes that die and leave their pods `Terminating` for
//! ever, watches that expire, conflicts and refusals. Pods are real processes on this host. It refuses what the rules of a
//! Role do not allow, and keeps what was asked of it.

mod controllers;
mod kubelet;
mod review;
mod server;
mod world;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::telemetry::Stopwatch;
use serde_json::{Value, json};

pub use world::{Refusal, Rule, World};

/// The namespace that exists.
pub const NAMESPACE: &str = "distillery";
/// What clients must show.
const TOKEN: &str = "fake-token";
/// How often controllers and kubelets look.
const TICK: Duration = Duration::from_millis(20);

/// How things go in this cluster.
#[derive(Debug, Clone)]
pub struct Ways {
    /// What the account may do; everything when none.
    pub role: Option<Vec<Rule>>,
    /// Wait before a pod of a failed index is made anew; doubles.
    pub backoff: Duration,
    /// So many seconds of a toleration or of a probe are one second here.
    pub haste: f64,
    /// Where pods find room.
    pub room: Room,
}

impl Default for Ways {
    fn default() -> Self {
        Self {
            role: None,
            backoff: Duration::from_millis(300),
            haste: 100.0,
            room: Room::Free,
        }
    }
}

/// Whether pods get to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// They do.
    Free,
    /// No node has room.
    None,
    /// Their image cannot be pulled.
    NoImage,
}

/// What a pod's container runs in place of its image.
#[derive(Debug, Clone)]
pub struct Program {
    path: OsString,
    environment: Vec<(OsString, OsString)>,
    /// Put before the arguments of the container; makes a wrong command line, for example.
    pub before: Vec<String>,
}

impl Program {
    /// The program and environment of `command`.
    pub fn of(command: &Command) -> Self {
        let environment = command.get_envs();
        let set = environment.filter_map(|(name, value)| Some((name.into(), value?.into())));
        Self {
            path: command.get_program().into(),
            environment: set.collect(),
            before: Vec::new(),
        }
    }
}

/// What clients and controllers share.
#[derive(Debug)]
struct Shared {
    world: Mutex<World>,
    changed: tokio::sync::watch::Sender<u64>,
    /// The server does not answer.
    away: tokio::sync::watch::Sender<bool>,
}

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        // A panic of another test thread has been told already.
        self.world
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Wakes watches if anything is newer.
    fn announce(&self) {
        let version = self.world().version();
        self.changed
            .send_if_modified(|seen| std::mem::replace(seen, version) != version);
    }
}

/// The cluster. Dropping it kills its pods.
#[derive(Debug)]
pub struct Fake {
    shared: Arc<Shared>,
    address: SocketAddr,
    folder: PathBuf,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Fake {
    /// Starts one that keeps what it needs in `folder` and runs `program` in pods.
    pub fn start(folder: &Path, program: Program, ways: Ways) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let shared = Arc::new(Shared {
            world: Mutex::new(World::new(ways, program, folder)),
            changed: tokio::sync::watch::Sender::new(0),
            away: tokio::sync::watch::Sender::new(false),
        });
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        runtime.spawn(server::serve(listener, Arc::clone(&shared)));
        let controlled = Arc::clone(&shared);
        runtime.spawn(async move {
            let watch = Stopwatch::start();
            loop {
                tokio::time::sleep(TICK).await;
                let now = watch.elapsed();
                controllers::look(&mut controlled.world(), now);
                kubelet::look(&mut controlled.world(), now);
                controlled.announce();
            }
        });
        let fake = Self {
            shared,
            address,
            folder: folder.to_owned(),
            runtime: Some(runtime),
        };
        fake.write_kubeconfig()?;
        Ok(fake)
    }

    fn write_kubeconfig(&self) -> anyhow::Result<()> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "fake", "cluster": { "server": format!("http://{}", self.address) } }],
            "users": [{ "name": "fake", "user": { "token": TOKEN } }],
            "contexts": [{ "name": "fake", "context": { "cluster": "fake", "user": "fake", "namespace": NAMESPACE } }],
            "current-context": "fake",
        });
        std::fs::write(self.kubeconfig(), config.to_string())?;
        Ok(())
    }

    /// The file that tells clients of it.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    /// Looks at it, or changes it.
    pub fn world<T>(&self, act: impl FnOnce(&mut World) -> T) -> T {
        let done = act(&mut self.shared.world());
        self.shared.announce();
        done
    }

    /// Lets the server break every connection and answer nobody, or answer again.
    pub fn away(&self, away: bool) {
        self.shared.away.send_replace(away);
    }

    /// Ends all watches with an error, and makes every version of before too old.
    pub fn compact(&self) {
        self.world(World::compact);
    }

    /// Where what a pod has on its volume called `volume` lies on this host.
    pub fn on_volume(&self, pod: &str, volume: &str) -> PathBuf {
        self.folder.join(pod).join(volume)
    }

    /// Waits until `look` finds something in the world.
    pub fn until<T>(
        &self,
        what: &str,
        patience: Duration,
        look: impl Fn(&World) -> Option<T>,
    ) -> anyhow::Result<T> {
        let watch = Stopwatch::start();
        loop {
            if let Some(found) = self.world(|world| look(world)) {
                return Ok(found);
            }
            anyhow::ensure!(
                watch.elapsed() < patience,
                "no {what} after {patience:?}; pods: {}",
                self.world(|world| world.summary())
            );
            std::thread::sleep(TICK);
        }
    }

    /// Kinds of requests that were made and allowed: verb, group and resource.
    pub fn asked(&self) -> BTreeSet<Rule> {
        self.world(|world| world.asked.clone())
    }

    /// The pods that run now, by name.
    pub fn running(&self) -> Vec<String> {
        self.world(|world| world.running())
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.world(kubelet::kill_all);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The rules of a Role in a manifest, one for each verb and resource.
pub fn rules(manifest: &Path) -> anyhow::Result<Vec<Rule>> {
    let text = std::fs::read_to_string(manifest)
        .with_context(|| format!("{} cannot be read", manifest.display()))?;
    let role: Value = serde_saphyr::from_str(&text)?;
    let texts = |value: &Value| -> Vec<String> {
        let items = value.as_array().into_iter().flatten();
        items.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let mut rules = Vec::new();
    for rule in role["rules"].as_array().context("a Role has rules")? {
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    rules.push(Rule {
                        verb,
                        group: group.clone(),
                        resource: resource.clone(),
                    });
                }
            }
        }
    }
    Ok(rules)
}
