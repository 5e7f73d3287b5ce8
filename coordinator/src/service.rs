//! The gRPC service: one bidirectional stream per worker, and two calls for people.
//!
//! Turns wire types into the scheduler's words and back. Everything it hears goes to the driver; it must never
//! decide anything, and never see storage or the journal.

pub mod client;
pub mod gate;
mod status;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};

use distillery_common::ids::Incarnation;
use distillery_common::proto::from_wire::{self, Malformed};
use distillery_common::proto::wire::coordinator_server::{Coordinator, CoordinatorServer};
use distillery_common::proto::{MAX_MESSAGE_BYTES, PROTOCOL_VERSION, to_wire, wire};
use distillery_common::security::{self, Authority, RequireToken, Token};

pub use self::gate::Door;
use self::gate::Visit;
use self::status::status_reply;
use crate::driver::Handle;
use crate::metrics::Metrics;
use crate::scheduler::{ConnectionId, Event, FromWorker, Hello, Timings, ToWorker};

/// How long a new stream may take to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// Longest name of a device that is shown.
const DEVICE_CHARS: usize = 64;
/// Between two pings of an idle connection, and how long the answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// Calls at a time on one connection: a worker has one, a person's command one after the other.
const MAX_STREAMS: u32 = 16;
/// Calls that one connection may begin and take back before they are read.
const MAX_RESETS: usize = 16;
/// Longest headers of a call; the token is the longest of ours.
const MAX_HEADER_BYTES: u32 = 16 << 10;

/// What the service says about the run it serves.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Names the run among all runs.
    pub run_id: String,
    /// Where its objects are.
    pub run_uri: String,
    /// Its name for people.
    pub name: String,
    /// The coordinator's life.
    pub term: u64,
    /// Waiting times that workers keep to.
    pub timings: Timings,
}

/// The service could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What carries it failed.
    #[error("the gRPC service ended")]
    Transport(#[from] tonic::transport::Error),
    /// It cannot prove who it is.
    #[error("the gRPC service has no certificates")]
    Security(#[from] security::Error),
}

/// Serves at `door` until `shutdown` is done. Whoever is turned away is counted in `metrics`.
pub async fn serve(
    door: Door,
    identity: Identity,
    token: Token,
    tls: Option<Authority>,
    handle: Handle,
    metrics: Metrics,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let service = Service::new(identity, handle);
    let server = CoordinatorServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let tls = match tls {
        Some(authority) => Some(TlsAcceptor::from(authority.server_config()?)),
        None => None,
    };
    let (guests, incoming) = gate::hall();
    let incoming = ReceiverStream::new(incoming).map(Ok::<_, std::convert::Infallible>);
    let keeping = tokio::spawn(gate::keep(door, tls, guests, metrics));
    let served = Server::builder()
        .http2_keepalive_interval(Some(PING.0))
        .http2_keepalive_timeout(Some(PING.1))
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_pending_accept_reset_streams(Some(MAX_RESETS))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .add_service(InterceptedService::new(
            server,
            Admit(RequireToken::new(token)),
        ))
        .serve_with_incoming_shutdown(incoming, shutdown)
        .await;
    // It has noticed already that nobody takes guests any more.
    let _ = keeping.await;
    Ok(served?)
}

/// Makes members of those who show the token.
#[derive(Debug, Clone)]
struct Admit(RequireToken);

impl Interceptor for Admit {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let visit = request.extensions().get::<Arc<Visit>>().map(Arc::clone);
        let admitted = self.0.call(request);
        if let Some(visit) = visit {
            match &admitted {
                Ok(_) => visit
                    .prove()
                    .map_err(|full| Status::resource_exhausted(full.to_string()))?,
                Err(_) => visit.failed("its token is not this run's".to_owned()),
            }
        }
        admitted
    }
}

/// What answers workers and people, whatever carries their messages.
#[derive(Debug, Clone)]
pub struct Service {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    identity: Identity,
    handle: Handle,
    connections: AtomicU64,
}

/// What a worker is told on one stream.
pub type Outbound = Pin<Box<dyn Stream<Item = Result<wire::CoordinatorMessage, Status>> + Send>>;

impl Service {
    /// A service for the run of `handle`'s driver.
    pub fn new(identity: Identity, handle: Handle) -> Self {
        Self {
            shared: Arc::new(Shared {
                identity,
                handle,
                connections: AtomicU64::new(0),
            }),
        }
    }

    /// Converses with a worker, whose greeting must come first on `inbound`.
    ///
    /// # Errors
    /// When the worker is not welcome, or the driver has ended.
    pub async fn converse<S>(&self, mut inbound: S) -> Result<Outbound, Status>
    where
        S: Stream<Item = Result<wire::WorkerMessage, Status>> + Send + Unpin + 'static,
    {
        let first = tokio::time::timeout(HELLO, inbound.next())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello came"))?
            .transpose()?;
        let Some(wire::worker_message::Message::Hello(hello)) = first.and_then(|m| m.message)
        else {
            return Err(Status::invalid_argument("the first message is not a hello"));
        };
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "the worker speaks protocol version {}, this coordinator {PROTOCOL_VERSION}; install the same release on every host",
                hello.protocol_version
            )));
        }
        let hello = read_hello(hello).map_err(refuse)?;
        let connection = ConnectionId(self.shared.connections.fetch_add(1, Ordering::Relaxed));
        let told = self
            .shared
            .handle
            .connect(connection, hello)
            .await
            .map_err(|ended| Status::unavailable(ended.to_string()))?;
        tokio::spawn(listen(inbound, connection, self.shared.handle.clone()));
        let shared = Arc::clone(&self.shared);
        let outbound = ReceiverStream::new(told).map(move |message| Ok(shared.to_wire(&message)));
        Ok(outbound.boxed())
    }
}

#[tonic::async_trait]
impl Coordinator for Service {
    type SessionStream = Outbound;

    async fn session(
        &self,
        request: Request<Streaming<wire::WorkerMessage>>,
    ) -> Result<Response<Outbound>, Status> {
        let visit = request.extensions().get::<Arc<Visit>>().map(Arc::clone);
        let welcomed = self.converse(request.into_inner()).await;
        if let Err(status) = &welcomed
            && is_of_a_worker(status)
        {
            let address = visit.map(|visit| visit.address().to_string());
            let reason = status.message();
            tracing::warn!(address, reason, "a worker is not welcome");
        }
        welcomed.map(Response::new)
    }

    async fn status(
        &self,
        _: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusReply>, Status> {
        let snapshot = self
            .shared
            .handle
            .snapshot()
            .await
            .map_err(|ended| Status::unavailable(ended.to_string()))?;
        Ok(Response::new(status_reply(
            &self.shared.identity,
            &snapshot,
        )))
    }

    async fn control(
        &self,
        request: Request<wire::ControlRequest>,
    ) -> Result<Response<wire::ControlReply>, Status> {
        use wire::control_request::Request as Wire;
        let event = match request.into_inner().request {
            Some(Wire::Stop(stop)) => Event::StopRequested {
                now: stop.now,
                returns: false,
            },
            Some(Wire::Pause(pause)) => Event::PauseRequested {
                reason: pause.reason,
            },
            Some(Wire::Resume(wire::Resume {})) => Event::ResumeRequested,
            Some(Wire::Cancel(cancel)) => Event::CancelRequested {
                reason: cancel.reason,
            },
            Some(Wire::Drain(drain)) => {
                self.known(&drain.worker).await?;
                Event::DrainRequested {
                    worker: drain.worker,
                }
            }
            None => return Err(Status::invalid_argument("nothing is asked")),
        };
        self.shared
            .handle
            .event(event)
            .await
            .map_err(|ended| Status::unavailable(ended.to_string()))?;
        Ok(Response::new(wire::ControlReply {}))
    }
}

impl Service {
    /// Refuses the name of a worker that is not here.
    async fn known(&self, worker: &str) -> Result<(), Status> {
        let snapshot = self.shared.handle.snapshot().await;
        let snapshot = snapshot.map_err(|ended| Status::unavailable(ended.to_string()))?;
        let mut names: Vec<_> = snapshot.view.workers.iter().map(|w| &w.name[..]).collect();
        if names.contains(&worker) {
            return Ok(());
        }
        names.sort_unstable();
        names.dedup();
        Err(Status::not_found(match names.len() {
            0 => format!("there is no worker {worker:?}, nor any other"),
            _ => format!(
                "there is no worker {worker:?}; there are: {}",
                names.join(", ")
            ),
        }))
    }
}

/// Passes on what a worker says until its stream ends. A message that makes no sense ends it.
async fn listen<S>(mut inbound: S, connection: ConnectionId, handle: Handle)
where
    S: Stream<Item = Result<wire::WorkerMessage, Status>> + Send + Unpin,
{
    loop {
        let message = match inbound.next().await {
            Some(Ok(message)) => message,
            Some(Err(status)) if is_of_a_message(&status) => {
                tracing::warn!(
                    ?connection,
                    reason = status.message(),
                    "a worker sent what cannot be read"
                );
                break;
            }
            // The stream is over.
            Some(Err(_)) | None => break,
        };
        match read_message(message) {
            Ok(message) => {
                if handle.said(connection, message).await.is_err() {
                    return;
                }
            }
            Err(malformed) => {
                tracing::warn!(?connection, %malformed, "a worker sent what no worker sends");
                break;
            }
        }
    }
    // The driver may have ended meanwhile; then nobody needs to know.
    let _ = handle.closed(connection).await;
}

/// Whether a message, rather than what carries it, is at fault: too large, or not of the protocol.
fn is_of_a_message(status: &Status) -> bool {
    matches!(status.code(), Code::OutOfRange | Code::Internal)
}

/// Whether a worker that is not welcome is at fault itself, rather than what carries its words, or the end of the run.
fn is_of_a_worker(status: &Status) -> bool {
    !matches!(
        status.code(),
        Code::Unavailable | Code::Cancelled | Code::Unknown
    )
}

fn refuse(malformed: Malformed) -> Status {
    Status::invalid_argument(malformed.to_string())
}

fn read_hello(hello: wire::Hello) -> Result<Hello, Malformed> {
    Ok(Hello {
        name: hello.name,
        host: hello.host,
        device: device(&hello.devices),
        slots: u32::try_from(hello.devices.len()).unwrap_or(1).max(1),
        incarnation: (hello.incarnation != 0).then_some(Incarnation(hello.incarnation)),
        leases: hello
            .leases
            .into_iter()
            .map(|lease| from_wire::lease(Some(lease)))
            .collect::<Result<_, _>>()?,
        group: match hello.group {
            Some(group) => Some(from_wire::group_id(Some(group))?),
            None => None,
        },
        starting: hello.engine_starting,
    })
}

/// The devices of a worker, for people.
fn device(devices: &[wire::Device]) -> String {
    let names = devices.iter().map(|device| match device.kind.as_str() {
        "cpu" => "cpu".to_owned(),
        kind => format!("{kind}:{}", device.index),
    });
    let text = names.collect::<Vec<_>>().join(",");
    let plain = distillery_common::logs::plain(&text);
    plain.chars().take(DEVICE_CHARS).collect()
}

fn read_message(message: wire::WorkerMessage) -> Result<FromWorker, Malformed> {
    use wire::worker_message::Message;
    match message.message.ok_or(Malformed::Missing("message"))? {
        Message::Hello(_) => Err(Malformed::Missing("place for a second hello")),
        Message::Beat(beat) => Ok(FromWorker::Beat {
            seq: beat.seq,
            tasks: beat
                .tasks
                .into_iter()
                .map(from_wire::task_progress)
                .collect::<Result<_, _>>()?,
            group: match beat.group {
                Some(progress) => Some(from_wire::group_progress(progress)?),
                None => None,
            },
            rss_bytes: beat.rss_bytes,
            starting: beat.engine_starting,
            leaving: beat.leaving,
        }),
        Message::Report(report) => read_report(report),
        Message::Goodbye(goodbye) => Ok(FromWorker::Goodbye {
            reason: goodbye.reason,
        }),
    }
}

fn read_report(report: wire::Report) -> Result<FromWorker, Malformed> {
    use wire::report::Report;
    let seq = report.seq;
    Ok(match report.report.ok_or(Malformed::Missing("report"))? {
        Report::TaskCommitted(said) => FromWorker::TaskCommitted {
            seq,
            lease: from_wire::lease(said.lease)?,
        },
        Report::TaskFailed(said) => FromWorker::TaskFailed {
            seq,
            lease: from_wire::lease(said.lease)?,
            failure: from_wire::failure(said.failure)?,
        },
        Report::GroupReady(said) => FromWorker::GroupReady {
            seq,
            group: from_wire::group_id(said.group)?,
            rank: said.rank,
            address: said.address,
        },
        Report::Checkpoint(said) => FromWorker::CheckpointCommitted {
            seq,
            checkpoint: from_wire::checkpoint_committed(said)?,
        },
        Report::GroupFailed(said) => FromWorker::GroupFailed {
            seq,
            group: from_wire::group_id(said.group)?,
            rank: said.rank,
            failure: from_wire::failure(said.failure)?,
        },
    })
}

impl Shared {
    fn to_wire(&self, message: &ToWorker) -> wire::CoordinatorMessage {
        use wire::coordinator_message::Message;
        let identity = &self.identity;
        let message = match message {
            ToWorker::Welcome { incarnation } => Message::Welcome(wire::Welcome {
                protocol_version: PROTOCOL_VERSION,
                term: identity.term,
                incarnation: incarnation.0,
                run_id: identity.run_id.clone(),
                run_uri: identity.run_uri.clone(),
                beat_ms: identity.timings.beat.as_millis() as u64,
                lease_ttl_ms: identity.timings.lease_ttl.as_millis() as u64,
            }),
            ToWorker::BeatAck { seq } => Message::BeatAck(wire::BeatAck { seq: *seq }),
            ToWorker::Grant(lease) => Message::Grant(wire::Grant {
                lease: Some(to_wire::lease(lease)),
            }),
            ToWorker::Revoke { lease, reason } => Message::Revoke(wire::Revoke {
                lease: Some(to_wire::lease(lease)),
                reason: reason.clone(),
            }),
            ToWorker::GroupJoin(membership) => Message::GroupJoin(to_wire::membership(membership)),
            ToWorker::GroupPeers { group, addresses } => {
                Message::GroupPeers(to_wire::group_peers(group, addresses))
            }
            ToWorker::GroupAbort { group, reason } => Message::GroupAbort(wire::GroupAbort {
                group: Some(to_wire::group_id(group)),
                reason: reason.clone(),
            }),
            ToWorker::ReportAck { seq } => Message::ReportAck(wire::ReportAck { seq: *seq }),
            ToWorker::Drain {
                checkpoint,
                returns,
                reason,
            } => Message::Drain(wire::Drain {
                checkpoint: *checkpoint,
                reason: reason.clone(),
                returns: *returns,
            }),
        };
        wire::CoordinatorMessage {
            message: Some(message),
        }
    }
}
