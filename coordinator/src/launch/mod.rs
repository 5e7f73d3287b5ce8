//! Who starts workers: this coordinator on its own host, a cluster's scheduler, or somebody else.
//!
//! Must never know what workers do.

mod environment;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod local;
pub mod slurm;

use std::path::Path;

/// Bytes of a worker's log that a failure shows.
const TAIL: usize = 2000;

/// Workers that were started, by whichever means.
#[derive(Debug)]
pub enum Launched {
    /// On this host.
    Local(local::Launched),
    /// As pods of a Kubernetes cluster.
    #[cfg(feature = "kubernetes")]
    Kubernetes(kubernetes::Launched),
    /// By Slurm.
    Slurm(slurm::Launched),
}

impl Launched {
    /// Ends all of them, and waits until they have.
    pub async fn finish(self) {
        match self {
            Self::Local(workers) => workers.finish().await,
            #[cfg(feature = "kubernetes")]
            Self::Kubernetes(workers) => workers.finish().await,
            Self::Slurm(workers) => workers.finish().await,
        }
    }

    /// This process no longer has the run, which has not ended: workers that can live without it are left to its
    /// successor.
    pub async fn leave(self) {
        match self {
            Self::Local(workers) => workers.finish().await,
            #[cfg(feature = "kubernetes")]
            Self::Kubernetes(workers) => workers.leave().await,
            Self::Slurm(workers) => workers.leave().await,
        }
    }
}

/// The end of a worker's log.
fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let from = text.len().saturating_sub(TAIL);
    String::from_utf8_lossy(&text[from..]).into_owned()
}
