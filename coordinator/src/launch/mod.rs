//! Who starts workers: this coordinator on its own host, a cluster that it asks, or somebody else.
//!
//! Must never know what workers do.

#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod local;

/// Workers that were started, by whichever means.
#[derive(Debug)]
pub enum Launched {
    /// On this host.
    Local(local::Launched),
    /// As pods of a Kubernetes cluster.
    #[cfg(feature = "kubernetes")]
    Kubernetes(kubernetes::Launched),
}

impl Launched {
    /// Ends all of them, and waits until they have.
    pub async fn finish(self) {
        match self {
            Self::Local(workers) => workers.finish().await,
            #[cfg(feature = "kubernetes")]
            Self::Kubernetes(workers) => workers.finish().await,
        }
    }

    /// This process no longer has the run, which has not ended: workers that can live without it are left to its
    /// successor.
    pub async fn leave(self) {
        match self {
            Self::Local(workers) => workers.finish().await,
            #[cfg(feature = "kubernetes")]
            Self::Kubernetes(workers) => workers.leave().await,
        }
    }
}
