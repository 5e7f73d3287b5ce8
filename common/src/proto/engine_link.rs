//! The engine's side of the socket to its worker.
//!
//! One IO thread with its own runtime reads commands and writes events; the thread that owns the device talks to
//! it over channels and never waits for the network. When the socket closes, the process ends at once, however
//! busy the device is: an engine without a worker must not go on. Knows no tensors, so that the stand-in of the
//! control plane's tests uses the same link.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use bytes::Bytes;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc as queue, oneshot};

use super::from_wire::{self, Malformed};
use super::{framing, to_wire, wire};
use crate::group::{CheckpointCommitted, GroupId, Membership, Progress};
use crate::ids::Incarnation;
use crate::security::GroupSecret;
use crate::storage::layout::Key;
use crate::task::{Failure, Lease};

#[cfg(test)]
mod tests;

/// Messages that may wait for the socket. Beyond half of it progress is left out; the rest is bounded by the
/// work in hand, a few messages for each task.
const QUEUE: usize = 1024;

/// What the worker tells its engine.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// First of all: where the run's objects are.
    Setup(Setup),
    /// Do this task.
    Start(Lease),
    /// Stop doing it: write nothing more, then answer with [`Event::TaskFailed`] of class `Superseded`.
    Cancel(Lease),
    /// Take part in a training group: listen, then answer with [`Event::GroupReady`].
    Join(Membership),
    /// All members of the group listen; train.
    Peers {
        /// Which formation.
        group: GroupId,
        /// Where each rank listens, in rank order.
        addresses: Vec<String>,
    },
    /// Leave the group at once, then answer with [`Event::GroupFailed`] of class `Superseded`.
    Abort {
        /// Which formation.
        group: GroupId,
        /// For people.
        reason: String,
    },
    /// Finish the task, or the current step, in hand; then end the process with exit code 0.
    Drain {
        /// A training group commits one more checkpoint first.
        checkpoint: bool,
    },
}

/// Where an engine is and for whom it works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// Where the run's objects are.
    pub run_uri: String,
    /// Its worker's name.
    pub worker: String,
    /// Its worker's registration.
    pub incarnation: Incarnation,
    /// What the engines of the run recognise each other by.
    pub group_secret: GroupSecret,
}

/// What an engine tells its worker.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The device works; the first event of all.
    Ready {
        /// `cpu`, or `cuda:` with the ordinal.
        device: String,
        /// The hardware's name.
        device_name: String,
        /// Version of the tensor library.
        libtorch_version: String,
    },
    /// How far a task is.
    Progress {
        /// Which attempt.
        lease: Lease,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
    },
    /// A task ended without a COMMIT.
    TaskFailed {
        /// Which attempt.
        lease: Lease,
        /// Why.
        failure: Failure,
    },
    /// This member listens.
    GroupReady {
        /// Which formation.
        group: GroupId,
        /// Its position.
        rank: u32,
        /// `host:port` for its peers.
        address: String,
    },
    /// How far a group is.
    GroupProgress(Progress),
    /// This member has left its group.
    GroupFailed {
        /// Which formation.
        group: GroupId,
        /// Its position.
        rank: u32,
        /// Why.
        failure: Failure,
    },
}

/// "These objects are in the store; make them count."
#[derive(Debug, Clone, PartialEq)]
pub struct CommitRequest {
    /// Where the COMMIT goes.
    pub key: Key,
    /// Its bytes.
    pub body: Bytes,
    /// What it ends.
    pub what: Committed,
    /// Rows in all files that it names.
    pub rows: u64,
    /// Bytes in all files that it names.
    pub bytes: u64,
}

/// What a COMMIT ends.
#[derive(Debug, Clone, PartialEq)]
pub enum Committed {
    /// An attempt at a task.
    Task(Lease),
    /// A checkpoint. Its digest is that of the COMMIT's bytes.
    Checkpoint(CheckpointCommitted),
}

/// What became of a [`CommitRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommitOutcome {
    /// The COMMIT holds our bytes.
    Won,
    /// Another attempt's COMMIT was there first.
    Lost,
    /// The lease or the generation had ended; nothing was put.
    Expired,
    /// The store failed.
    Failed(String),
}

/// What an engine cannot tell its worker, or the other way round.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The worker's socket cannot be opened.
    #[error("the worker's socket {path} cannot be opened")]
    Connect {
        /// Where it should be.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// The socket failed.
    #[error(transparent)]
    Framing(#[from] framing::Error),
    /// A message that no correct worker sends.
    #[error("a message of the worker is malformed")]
    Malformed(#[from] Malformed),
}

type Waiting = Arc<Mutex<BTreeMap<u64, oneshot::Sender<CommitOutcome>>>>;

/// The engine's end. Cheap to clone; every thread may hold one.
#[derive(Clone, Debug)]
pub struct Link {
    outgoing: queue::Sender<wire::FromEngine>,
    waiting: Waiting,
    next_commit: Arc<AtomicU64>,
}

impl Link {
    /// Connects to the worker that listens at `path` and starts the IO thread. Commands come out of the receiver
    /// in the order in which they were sent.
    pub fn connect(path: &Path) -> Result<(Self, mpsc::Receiver<Command>), Error> {
        Self::connect_observed(path, |_| {})
    }

    /// As [`Link::connect`]; `observe` sees each command first, on the IO thread, so that an abort can close
    /// sockets under a device thread that waits for a peer. It must not block.
    pub fn connect_observed(
        path: &Path,
        observe: impl Fn(&Command) + Send + 'static,
    ) -> Result<(Self, mpsc::Receiver<Command>), Error> {
        let failed = |source| Error::Connect {
            path: path.display().to_string(),
            source,
        };
        let socket = std::os::unix::net::UnixStream::connect(path).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(failed)?;
        let (outgoing, queued) = queue::channel(QUEUE);
        let (commands, received) = mpsc::channel();
        let waiting = Waiting::default();
        let settle = Arc::clone(&waiting);
        std::thread::Builder::new()
            .name("link".into())
            .spawn(move || {
                let exit = runtime.block_on(async {
                    let socket = UnixStream::from_std(socket).map_err(framing::Error::Io)?;
                    let (reading, writing) = socket.into_split();
                    tokio::select! {
                        ended = receive(reading, &settle, &commands, &observe) => ended,
                        ended = transmit(writing, queued) => ended,
                    }
                });
                end_process(exit)
            })
            .map_err(failed)?;
        let link = Self {
            outgoing,
            waiting,
            next_commit: Arc::new(AtomicU64::new(1)),
        };
        Ok((link, received))
    }

    /// Tells the worker. Never waits: progress is left out while the worker does not read.
    pub fn send(&self, event: Event) {
        let optional = matches!(event, Event::Progress { .. } | Event::GroupProgress(_));
        if optional && self.outgoing.capacity() < QUEUE / 2 {
            return;
        }
        self.push(event_to_wire(event));
    }

    /// Asks the worker to make `request` count, and waits for its answer.
    pub fn commit(&self, request: CommitRequest) -> CommitOutcome {
        self.start_commit(request)
            .blocking_recv()
            .unwrap_or_else(|_| gone())
    }

    /// As [`Link::commit`], for callers inside a runtime.
    pub async fn commit_async(&self, request: CommitRequest) -> CommitOutcome {
        self.start_commit(request).await.unwrap_or_else(|_| gone())
    }

    fn start_commit(&self, request: CommitRequest) -> oneshot::Receiver<CommitOutcome> {
        let id = self.next_commit.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.waiting
            .lock()
            .expect("no holder of this lock can panic")
            .insert(id, answer);
        self.push(commit_to_wire(id, request));
        answered
    }

    fn push(&self, message: wire::from_engine::Message) {
        let message = wire::FromEngine {
            message: Some(message),
        };
        match self.outgoing.try_send(message) {
            // A closed queue: the IO thread is ending the process.
            Ok(()) | Err(queue::error::TrySendError::Closed(_)) => {}
            Err(queue::error::TrySendError::Full(_)) => {
                panic!("{QUEUE} messages other than progress wait for the worker")
            }
        }
    }
}

fn gone() -> CommitOutcome {
    CommitOutcome::Failed("the worker has gone".into())
}

/// Reads commands until the worker closes the socket.
async fn receive(
    mut socket: OwnedReadHalf,
    waiting: &Waiting,
    commands: &mpsc::Sender<Command>,
    observe: &impl Fn(&Command),
) -> Result<(), Error> {
    while let Some(message) = framing::read::<_, wire::ToEngine>(&mut socket).await? {
        match read_message(message)? {
            Incoming::Command(command) => {
                observe(&command);
                // A device thread that listens no more is about to end the process.
                let _ = commands.send(command);
            }
            Incoming::Outcome(id, outcome) => {
                let mut waiting = waiting.lock().expect("no holder of this lock can panic");
                if let Some(answer) = waiting.remove(&id) {
                    let _ = answer.send(outcome);
                }
            }
        }
    }
    Ok(())
}

/// Writes queued messages; ends only with an error, since every [`Link`] holds the queue open.
async fn transmit(
    mut socket: OwnedWriteHalf,
    mut queued: queue::Receiver<wire::FromEngine>,
) -> Result<(), Error> {
    while let Some(message) = queued.recv().await {
        framing::write(&mut socket, &message).await?;
    }
    std::future::pending().await
}

/// Without its worker an engine has nothing to live for, even in the middle of a task.
fn end_process(exit: Result<(), Error>) -> ! {
    match exit {
        Ok(()) | Err(Error::Framing(framing::Error::Io(_))) => std::process::exit(0),
        Err(error) => {
            tracing::error!(%error, "the link to the worker broke");
            std::process::exit(70)
        }
    }
}

enum Incoming {
    Command(Command),
    Outcome(u64, CommitOutcome),
}

/// Whether `message` is one that an engine understands.
///
/// # Errors
/// [`Malformed`] for what no correct worker says.
pub fn understand(message: wire::ToEngine) -> Result<(), Malformed> {
    read_message(message).map(drop)
}

fn read_message(message: wire::ToEngine) -> Result<Incoming, Malformed> {
    use wire::to_engine::Message;
    let message = message.message.ok_or(Malformed::Missing("content"))?;
    Ok(Incoming::Command(match message {
        Message::Setup(setup) => Command::Setup(Setup {
            run_uri: setup.run_uri,
            worker: setup.worker,
            incarnation: Incarnation(setup.incarnation),
            group_secret: GroupSecret(
                <[u8; 32]>::try_from(setup.group_secret)
                    .map_err(|_| Malformed::Missing("group secret of 32 bytes"))?,
            ),
        }),
        Message::Start(lease) => Command::Start(from_wire::lease(Some(lease))?),
        Message::Cancel(lease) => Command::Cancel(from_wire::lease(Some(lease))?),
        Message::Join(join) => Command::Join(from_wire::membership(join)?),
        Message::Peers(peers) => {
            let (group, addresses) = from_wire::group_peers(peers)?;
            Command::Peers { group, addresses }
        }
        Message::Abort(abort) => Command::Abort {
            group: from_wire::group_id(abort.group)?,
            reason: abort.reason,
        },
        Message::Drain(drain) => Command::Drain {
            checkpoint: drain.checkpoint,
        },
        Message::CommitOutcome(outcome) => {
            return Ok(Incoming::Outcome(outcome.id, read_outcome(outcome)?));
        }
    }))
}

fn read_outcome(outcome: wire::CommitOutcome) -> Result<CommitOutcome, Malformed> {
    use wire::commit_outcome::Outcome;
    match Outcome::try_from(outcome.outcome) {
        Ok(Outcome::Won) => Ok(CommitOutcome::Won),
        Ok(Outcome::Lost) => Ok(CommitOutcome::Lost),
        Ok(Outcome::Expired) => Ok(CommitOutcome::Expired),
        Ok(Outcome::Failed) => Ok(CommitOutcome::Failed(outcome.message)),
        Ok(Outcome::Unspecified) | Err(_) => Err(Malformed::UnknownValue {
            what: "outcome of a commit",
            value: outcome.outcome.into(),
        }),
    }
}

fn event_to_wire(event: Event) -> wire::from_engine::Message {
    use wire::from_engine::Message;
    match event {
        Event::Ready {
            device,
            device_name,
            libtorch_version,
        } => Message::Ready(wire::EngineReady {
            device,
            device_name,
            libtorch_version,
        }),
        Event::Progress { lease, done, total } => Message::Progress(wire::EngineProgress {
            lease: Some(to_wire::lease(&lease)),
            done,
            total,
        }),
        Event::TaskFailed { lease, failure } => Message::TaskFailed(wire::EngineTaskFailed {
            lease: Some(to_wire::lease(&lease)),
            failure: Some(to_wire::failure(&failure)),
        }),
        Event::GroupReady {
            group,
            rank,
            address,
        } => Message::GroupReady(wire::EngineGroupReady {
            group: Some(to_wire::group_id(&group)),
            rank,
            address,
        }),
        Event::GroupProgress(progress) => {
            Message::GroupProgress(to_wire::group_progress(&progress))
        }
        Event::GroupFailed {
            group,
            rank,
            failure,
        } => Message::GroupFailed(wire::EngineGroupFailed {
            group: Some(to_wire::group_id(&group)),
            rank,
            failure: Some(to_wire::failure(&failure)),
        }),
    }
}

fn commit_to_wire(id: u64, request: CommitRequest) -> wire::from_engine::Message {
    use wire::commit_request::What;
    wire::from_engine::Message::Commit(wire::CommitRequest {
        id,
        key: request.key.as_str().to_owned(),
        body: request.body.to_vec(),
        rows: request.rows,
        bytes: request.bytes,
        what: Some(match request.what {
            Committed::Task(lease) => What::Task(to_wire::lease(&lease)),
            Committed::Checkpoint(checkpoint) => {
                What::Checkpoint(to_wire::checkpoint_committed(&checkpoint))
            }
        }),
    })
}
