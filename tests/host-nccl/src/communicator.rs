//! One rank's end of a communicator: a thread that asks the hub, one operation after the other.

use std::io;
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::hub::{REMOTE_ERROR, SUCCESS};
use crate::message::{Reply, Request};

/// `ncclInProgress`.
pub(crate) const IN_PROGRESS: i32 = 7;

/// Writes what came into the caller's memory.
pub(crate) type Deliver = Box<dyn FnOnce(&[Vec<u8>]) + Send>;

/// A communicator, from the first call on.
pub(crate) struct Communicator {
    world: u32,
    shared: Arc<Shared>,
    jobs: Option<Sender<(Request, Deliver)>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// A result of NCCL: that of the last operation, or [`IN_PROGRESS`].
    state: AtomicI32,
    ended: AtomicBool,
    /// What an abort hangs up.
    stream: Mutex<Option<UnixStream>>,
}

impl Communicator {
    /// Begins to join the hub of that name; in progress until all ranks have.
    pub(crate) fn join(hub: String, rank: u32, world: u32) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicI32::new(IN_PROGRESS),
            ended: AtomicBool::new(false),
            stream: Mutex::new(None),
        });
        let (jobs, queue) = channel();
        let of_thread = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            if of_thread.live(&hub, rank, world, &queue).is_err() {
                of_thread.state.store(REMOTE_ERROR, Ordering::SeqCst);
            }
        });
        Self {
            world,
            shared,
            jobs: Some(jobs),
            thread: Some(thread),
        }
    }

    /// Number of ranks.
    pub(crate) fn world(&self) -> usize {
        self.world as usize
    }

    /// What the last operation came to.
    pub(crate) fn state(&self) -> i32 {
        self.shared.state.load(Ordering::SeqCst)
    }

    /// Begins an operation; an earlier error stays.
    pub(crate) fn begin(&self, request: Request, deliver: Deliver) -> i32 {
        let state = &self.shared.state;
        let begun =
            state.compare_exchange(SUCCESS, IN_PROGRESS, Ordering::SeqCst, Ordering::SeqCst);
        if let Err(state) = begun
            && state != IN_PROGRESS
        {
            return state;
        }
        let jobs = self.jobs.as_ref().map(|jobs| jobs.send((request, deliver)));
        if matches!(jobs, Some(Ok(()))) {
            IN_PROGRESS
        } else {
            REMOTE_ERROR
        }
    }

    /// Ends the thread, whatever it waits for; no memory of the caller is touched afterwards.
    pub(crate) fn end(mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.jobs = None;
        let stream = self.shared.stream.lock();
        if let Some(stream) = &*stream.unwrap_or_else(PoisonError::into_inner) {
            // One that is gone already is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, the communicator is ended all the same.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn live(
        &self,
        hub: &str,
        rank: u32,
        world: u32,
        queue: &Receiver<(Request, Deliver)>,
    ) -> io::Result<()> {
        let address = SocketAddr::from_abstract_name(hub)?;
        let mut stream = UnixStream::connect_addr(&address)?;
        let copy = stream.try_clone()?;
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(copy);
        if self.ended.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.ask(
            &mut stream,
            &Request::Join { rank, world },
            Box::new(|_| ()),
        )?;
        for (request, deliver) in queue {
            self.ask(&mut stream, &request, deliver)?;
        }
        Ok(())
    }

    fn ask(&self, stream: &mut UnixStream, request: &Request, deliver: Deliver) -> io::Result<()> {
        request.write(stream)?;
        let reply = Reply::read(stream)?;
        if reply.result == SUCCESS {
            deliver(&reply.payloads);
        }
        self.state.store(reply.result, Ordering::SeqCst);
        Ok(())
    }
}
