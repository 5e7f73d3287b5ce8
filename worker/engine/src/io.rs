//! The IO threads: what waits for a store happens on a runtime of its own, and the device thread asks it.

use std::future::Future;
use std::io;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;

/// Threads that wait for the store. Reads and uploads are asynchronous; digests take real time, so that one
/// thread can hash while another waits.
const THREADS: usize = 2;

/// A handle on the IO threads, for the device thread.
#[derive(Debug)]
pub struct Io {
    runtime: Runtime,
}

impl Io {
    /// Starts the threads.
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("io")
            .enable_all()
            .build()?;
        Ok(Self { runtime })
    }

    /// Waits for `work` on the calling thread.
    pub fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// For parts that start their own work there.
    pub fn handle(&self) -> Handle {
        self.runtime.handle().clone()
    }

    /// Starts `work` in the background.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.runtime.spawn(work)
    }
}
