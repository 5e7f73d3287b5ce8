//! The stream to the coordinator: opened, greeted, and turned into nouns. Knows no state of the agent.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use distillery_common::group::{self, GroupId, Membership};
use distillery_common::ids::{Incarnation, Term};
use distillery_common::proto::from_wire::{self, Malformed};
use distillery_common::proto::wire::coordinator_client::CoordinatorClient;
use distillery_common::proto::{MAX_MESSAGE_BYTES, PROTOCOL_VERSION, to_wire, wire};
use distillery_common::security::{Join, ShowToken};
use distillery_common::task::{self, Lease};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};

use super::outbox::Report;
use super::outside::Outside;
use crate::engine_process::Device;

/// Messages that may wait for the stream.
const QUEUE: usize = 256;
/// Time to open a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Silence after which the transport asks whether the other side lives, and how long it may think.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// How an agent introduces itself.
#[derive(Debug, Clone)]
pub(super) struct Hello {
    pub(super) name: String,
    pub(super) host: String,
    pub(super) pid: u32,
    pub(super) device: wire::Device,
    pub(super) incarnation: Option<Incarnation>,
    pub(super) leases: Vec<Lease>,
    pub(super) group: Option<GroupId>,
    pub(super) engine_starting: bool,
}

/// What the coordinator says.
#[derive(Debug, Clone)]
pub(super) enum FromCoordinator {
    Welcome(Welcome),
    BeatAck(u64),
    Grant(Lease),
    Revoke(Lease, String),
    Join(Membership),
    Peers(GroupId, Vec<String>),
    Abort(GroupId, String),
    ReportAck(u64),
    Drain {
        checkpoint: bool,
        returns: bool,
        reason: String,
    },
}

/// The answer to a hello.
#[derive(Debug, Clone)]
pub(super) struct Welcome {
    pub(super) term: Term,
    pub(super) incarnation: Incarnation,
    pub(super) run_uri: String,
    pub(super) beat: Duration,
    pub(super) lease_ttl: Duration,
}

/// What becomes of a stream.
#[derive(Debug)]
pub(super) enum Event {
    /// The stream is open and the greeting, sent at `hello_sent`, is on its way.
    Opened {
        outgoing: Outgoing,
        hello_sent: Instant,
    },
    /// The coordinator said something.
    Said(FromCoordinator),
    /// The stream is over, or never began.
    Closed(Closed),
}

/// Why a stream is over.
#[derive(Debug)]
pub struct Closed {
    /// For people.
    pub reason: String,
    /// Whether trying again is pointless.
    pub fatal: bool,
}

/// What a worker says on one stream, its greeting first.
pub type Said = ReceiverStream<wire::WorkerMessage>;
/// What the coordinator says on one stream.
pub type Heard =
    Pin<Box<dyn Stream<Item = Result<wire::CoordinatorMessage, tonic::Status>> + Send>>;

/// How a worker is, apart from its work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Condition {
    pub(super) rss_bytes: u64,
    pub(super) engine_starting: bool,
    pub(super) leaving: bool,
}

/// The sending half of a stream.
#[derive(Debug, Clone)]
pub(super) struct Outgoing(mpsc::Sender<wire::WorkerMessage>);

impl Outgoing {
    /// Says how far everything is.
    pub(super) fn beat(
        &self,
        seq: u64,
        tasks: &[task::Progress],
        group: Option<&group::Progress>,
        condition: Condition,
    ) {
        self.push(wire::worker_message::Message::Beat(wire::Beat {
            seq,
            tasks: tasks.iter().map(to_wire::task_progress).collect(),
            group: group.map(to_wire::group_progress),
            rss_bytes: condition.rss_bytes,
            engine_starting: condition.engine_starting,
            leaving: condition.leaving,
        }));
    }

    /// Reports.
    pub(super) fn report(&self, seq: u64, report: &Report) {
        self.push(wire::worker_message::Message::Report(wire::Report {
            seq,
            report: Some(report_to_wire(report)),
        }));
    }

    /// Takes leave.
    pub(super) fn goodbye(&self, reason: &str) {
        self.push(wire::worker_message::Message::Goodbye(wire::Goodbye {
            reason: reason.to_owned(),
        }));
    }

    /// A full queue means a coordinator that does not read: the keepalive will end the stream, and everything
    /// that matters is sent again on the next one.
    fn push(&self, message: wire::worker_message::Message) {
        let message = wire::WorkerMessage {
            message: Some(message),
        };
        if self.0.try_send(message).is_err() {
            tracing::debug!("the coordinator's stream takes no more");
        }
    }
}

/// Opens a stream and reads it to its end. Events carry `id`, the last one is always [`Event::Closed`].
pub(super) async fn run(
    id: u64,
    outside: Arc<dyn Outside>,
    join: Join,
    hello: Hello,
    now: fn() -> Instant,
    events: mpsc::Sender<(u64, Event)>,
) {
    let closed = match converse(id, &*outside, &join, hello, now, &events).await {
        Ok(()) => Closed {
            reason: "the coordinator closed the stream".into(),
            fatal: false,
        },
        Err(closed) => closed,
    };
    let _ = events.send((id, Event::Closed(closed))).await;
}

/// `hello_sent` is taken before the connection is made, so it is never later than the truth: the leases that a
/// welcome renews count from it.
async fn converse(
    id: u64,
    outside: &dyn Outside,
    join: &Join,
    hello: Hello,
    now: fn() -> Instant,
    events: &mpsc::Sender<(u64, Event)>,
) -> Result<(), Closed> {
    let (outgoing, queued) = mpsc::channel(QUEUE);
    let outgoing = Outgoing(outgoing);
    let hello_sent = now();
    outgoing.push(wire::worker_message::Message::Hello(hello_to_wire(hello)));
    let mut stream = outside
        .open_session(join, ReceiverStream::new(queued))
        .await?;
    let opened = Event::Opened {
        outgoing,
        hello_sent,
    };
    let _ = events.send((id, opened)).await;
    while let Some(message) = stream.next().await {
        match read(message.map_err(refused)?) {
            Ok(message) => {
                let _ = events.send((id, Event::Said(message))).await;
            }
            Err(error) => tracing::error!(%error, "the coordinator sent a malformed message"),
        }
    }
    Ok(())
}

/// Opens a stream over the network.
pub(super) async fn dial(join: &Join, said: Said) -> Result<Heard, Closed> {
    let (interval, timeout) = KEEPALIVE;
    let channel = join
        .endpoint()
        .map_err(|error| unreachable_at(join, &error))?
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(interval)
        .keep_alive_timeout(timeout)
        .keep_alive_while_idle(true)
        .connect()
        .await
        .map_err(|error| unreachable_at(join, &error))?;
    let mut client = CoordinatorClient::with_interceptor(channel, ShowToken::new(join.token()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let answer = client.session(said).await.map_err(refused)?;
    Ok(Box::pin(answer.into_inner()))
}

fn unreachable_at(join: &Join, error: &tonic::transport::Error) -> Closed {
    let mut reason = format!("{} cannot be reached", join.url());
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        reason = format!("{reason}: {error}");
        cause = error.source();
    }
    Closed {
        reason,
        fatal: false,
    }
}

/// A refusal that no repetition will change is fatal; anything else may pass.
fn refused(status: tonic::Status) -> Closed {
    let fatal = matches!(
        status.code(),
        tonic::Code::Unauthenticated
            | tonic::Code::PermissionDenied
            | tonic::Code::FailedPrecondition
            | tonic::Code::InvalidArgument
            | tonic::Code::Unimplemented
    );
    Closed {
        reason: status.message().to_owned(),
        fatal,
    }
}

fn hello_to_wire(hello: Hello) -> wire::Hello {
    wire::Hello {
        protocol_version: PROTOCOL_VERSION,
        name: hello.name,
        host: hello.host,
        pid: hello.pid,
        devices: vec![hello.device],
        incarnation: hello.incarnation.unwrap_or_default().0,
        leases: hello.leases.iter().map(to_wire::lease).collect(),
        group: hello.group.as_ref().map(to_wire::group_id),
        engine_starting: hello.engine_starting,
    }
}

fn report_to_wire(report: &Report) -> wire::report::Report {
    match report {
        Report::TaskCommitted { lease, commit, won } => {
            wire::report::Report::TaskCommitted(wire::TaskCommitted {
                lease: Some(to_wire::lease(lease)),
                commit: Some(to_wire::commit_summary(commit)),
                won: *won,
            })
        }
        Report::TaskFailed { lease, failure } => {
            wire::report::Report::TaskFailed(wire::TaskFailed {
                lease: Some(to_wire::lease(lease)),
                failure: Some(to_wire::failure(failure)),
            })
        }
        Report::GroupReady {
            group,
            rank,
            address,
        } => wire::report::Report::GroupReady(wire::GroupReady {
            group: Some(to_wire::group_id(group)),
            rank: *rank,
            address: address.clone(),
        }),
        Report::CheckpointCommitted(checkpoint) => {
            wire::report::Report::Checkpoint(to_wire::checkpoint_committed(checkpoint))
        }
        Report::GroupFailed {
            group,
            rank,
            failure,
        } => wire::report::Report::GroupFailed(wire::GroupFailed {
            group: Some(to_wire::group_id(group)),
            rank: *rank,
            failure: Some(to_wire::failure(failure)),
        }),
    }
}

fn read(message: wire::CoordinatorMessage) -> Result<FromCoordinator, Malformed> {
    use wire::coordinator_message::Message;
    Ok(
        match message.message.ok_or(Malformed::Missing("content"))? {
            Message::Welcome(welcome) => FromCoordinator::Welcome(Welcome {
                term: Term(welcome.term),
                incarnation: Incarnation(welcome.incarnation),
                run_uri: welcome.run_uri,
                beat: Duration::from_millis(welcome.beat_ms),
                lease_ttl: Duration::from_millis(welcome.lease_ttl_ms),
            }),
            Message::BeatAck(ack) => FromCoordinator::BeatAck(ack.seq),
            Message::Grant(grant) => FromCoordinator::Grant(from_wire::lease(grant.lease)?),
            Message::Revoke(revoke) => {
                FromCoordinator::Revoke(from_wire::lease(revoke.lease)?, revoke.reason)
            }
            Message::GroupJoin(join) => FromCoordinator::Join(from_wire::membership(join)?),
            Message::GroupPeers(peers) => {
                let (group, addresses) = from_wire::group_peers(peers)?;
                FromCoordinator::Peers(group, addresses)
            }
            Message::GroupAbort(abort) => {
                FromCoordinator::Abort(from_wire::group_id(abort.group)?, abort.reason)
            }
            Message::ReportAck(ack) => FromCoordinator::ReportAck(ack.seq),
            Message::Drain(drain) => FromCoordinator::Drain {
                checkpoint: drain.checkpoint,
                returns: drain.returns,
                reason: drain.reason,
            },
        },
    )
}

/// A device as the wire has it.
pub(super) fn describe(device: Device) -> wire::Device {
    let (kind, index) = match device {
        Device::Cpu => ("cpu", 0),
        Device::Cuda(ordinal) => ("cuda", ordinal),
    };
    wire::Device {
        kind: kind.into(),
        index,
        name: String::new(),
        memory_bytes: 0,
    }
}
