//! Streams between workers and coordinators, as TCP would carry them: in order, late, stalled while a link is cut,
//! broken on one side before the other, and ended for good by keepalive.
//!
//! Carries the wire's own messages between the real ends. Must never know what they lead to.

use std::sync::Arc;
use std::time::Duration;

use distillery_common::proto::wire;
use distillery_coordinator::service::{Outbound, Service};
use distillery_worker::agent::{Closed, Heard, Said};
use futures::StreamExt as _;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::world::{Host, Pid, World, moment};

/// Messages on their way.
const IN_FLIGHT: usize = 4096;
/// How long a connection may take to open.
const CONNECT: Duration = Duration::from_secs(5);
/// Silence after which an end gives its connection up, at least and at most.
const KEEPALIVE_MS: (u64, u64) = (10_000, 15_000);
/// Between two looks of the keepalive.
const LOOK: Duration = Duration::from_millis(500);

/// One stream, seen from outside.
#[derive(Debug)]
pub(super) struct Connection {
    agent: Pid,
    coordinator: Pid,
    worker_host: Host,
    coordinator_host: Host,
    /// True once the worker's side has seen its end.
    worker_end: watch::Sender<bool>,
    /// The same of the coordinator's.
    coordinator_end: watch::Sender<bool>,
}

impl Connection {
    /// Breaks one side, so that it sees an error now; the other side sees nothing.
    pub(super) fn break_end(&self, worker: bool) {
        let end = if worker {
            &self.worker_end
        } else {
            &self.coordinator_end
        };
        end.send_replace(true);
    }
}

async fn broken(end: &watch::Sender<bool>) {
    let mut seen = end.subscribe();
    // The connection holds the sender.
    let _ = seen.wait_for(|&is_broken| is_broken).await;
}

fn gone() -> Status {
    Status::unavailable("the connection is gone")
}

fn refuse(reason: &str) -> Closed {
    Closed {
        reason: reason.into(),
        fatal: false,
    }
}

/// Opens a stream from the agent `agent` to a coordinator that it finds.
pub(super) async fn dial(
    world: &Arc<World>,
    agent: Pid,
    worker: usize,
    said: Said,
) -> Result<Heard, Closed> {
    let greeted = moment();
    world.gate(agent).await;
    let stream = world.new_stream();
    let here = Host::Worker(worker);
    let Some((number, coordinator, service)) = find(world, stream) else {
        sleep(Duration::from_millis(2)).await;
        return Err(refuse("nobody listens"));
    };
    let there = Host::Coordinator(number);
    let handshake = async {
        world.travel(stream, here, there).await;
        world.travel(stream, there, here).await;
    };
    if tokio::time::timeout(CONNECT, handshake).await.is_err() {
        return Err(refuse("no answer"));
    }
    if !world.is_alive(coordinator) {
        return Err(refuse("nobody listens any more"));
    }
    let connection = Arc::new(Connection {
        agent,
        coordinator,
        worker_host: here,
        coordinator_host: there,
        worker_end: watch::Sender::new(false),
        coordinator_end: watch::Sender::new(false),
    });
    let weak = Arc::downgrade(&connection);
    world.state().connections.push((worker, weak));
    tokio::spawn(keep_alive(Arc::clone(world), Arc::downgrade(&connection)));
    world.state().ledger.greeted(agent, greeted);

    let (up, inbound) = mpsc::channel(IN_FLIGHT);
    let (down, heard) = mpsc::channel(IN_FLIGHT);
    tokio::spawn(carry_up(
        Arc::clone(world),
        Arc::clone(&connection),
        said,
        up,
    ));
    let (accept, accepted) = oneshot::channel();
    let (own, link) = (Arc::clone(world), Arc::clone(&connection));
    tokio::spawn(async move {
        let answer = service.converse(ReceiverStream::new(inbound)).await;
        own.travel(stream, there, here).await;
        match answer {
            Ok(outbound) => {
                let _ = accept.send(Ok(()));
                carry_down(own, link, outbound, down).await;
            }
            Err(status) => {
                let _ = accept.send(Err(status));
            }
        }
    });
    let answer = tokio::select! {
        biased;
        () = broken(&connection.worker_end) => return Err(refuse("the connection broke")),
        answer = accepted => answer,
    };
    match answer {
        Ok(Ok(())) => Ok(Box::pin(ReceiverStream::new(heard))),
        Ok(Err(status)) => Err(refuse(status.message())),
        Err(_) => Err(refuse("the coordinator died")),
    }
}

/// The newest coordinator; sometimes an older one that lives, as when a join file is written late.
fn find(world: &World, stream: u64) -> Option<(u32, Pid, Service)> {
    let late = world.below(stream, 5) == 0;
    let state = world.state();
    let mut listening: Vec<_> = state
        .coordinators
        .iter()
        .filter(|(_, pid, _)| state.processes[pid].alive)
        .filter_map(|(number, pid, running)| {
            let running = running.as_ref()?;
            Some((*number, *pid, running.service.clone()))
        })
        .collect();
    if late && listening.len() > 1 {
        listening.pop();
    }
    listening.pop()
}

/// Carries what the worker says.
async fn carry_up(
    world: Arc<World>,
    connection: Arc<Connection>,
    mut said: Said,
    up: mpsc::Sender<Result<wire::WorkerMessage, Status>>,
) {
    let stream = world.new_stream();
    let (from, to) = (connection.worker_host, connection.coordinator_host);
    loop {
        let message = tokio::select! {
            biased;
            () = broken(&connection.coordinator_end) => {
                let _ = up.send(Err(gone())).await;
                return;
            }
            message = said.next() => message,
        };
        let is_cut_off = *connection.worker_end.borrow() || world.is_silent(connection.agent);
        if is_cut_off {
            // Nobody tells the other side; it finds out by itself.
            broken(&connection.coordinator_end).await;
            let _ = up.send(Err(gone())).await;
            return;
        }
        if let Some(message) = &message {
            let said = world
                .state()
                .ledger
                .said(connection.agent, message, moment());
            if let Err((invariant, seen)) = said {
                world.broken(invariant, seen);
            }
        }
        tokio::select! {
            biased;
            () = broken(&connection.coordinator_end) => {
                let _ = up.send(Err(gone())).await;
                return;
            }
            () = world.travel(stream, from, to) => {}
        }
        let Some(message) = message else {
            return;
        };
        let is_report = matches!(
            message.message,
            Some(wire::worker_message::Message::Report(_))
        );
        let twice = is_report && moment() < world.state().duplicates_until;
        if twice && world.below(stream, 2) == 0 {
            let _ = up.send(Ok(message.clone())).await;
        }
        let _ = up.send(Ok(message)).await;
    }
}

/// Carries what the coordinator says.
async fn carry_down(
    world: Arc<World>,
    connection: Arc<Connection>,
    mut outbound: Outbound,
    down: mpsc::Sender<Result<wire::CoordinatorMessage, Status>>,
) {
    let stream = world.new_stream();
    let (from, to) = (connection.coordinator_host, connection.worker_host);
    let mut down = Some(down);
    loop {
        let message = tokio::select! {
            biased;
            () = broken(&connection.coordinator_end), if down.is_none() => return,
            () = broken(&connection.worker_end), if down.is_some() => {
                let ended = down.take().expect("the guard has just seen it");
                let _ = ended.send(Err(gone())).await;
                continue;
            }
            message = outbound.next() => message,
        };
        let silent =
            *connection.coordinator_end.borrow() || world.is_silent(connection.coordinator);
        if silent || down.is_none() {
            if message.is_some() && !silent {
                continue;
            }
            if let Some(down) = down.take() {
                broken(&connection.worker_end).await;
                let _ = down.send(Err(gone())).await;
            } else {
                broken(&connection.coordinator_end).await;
            }
            return;
        }
        if let Some(Ok(message)) = &message {
            let told = world.state().ledger.told(connection.agent, message);
            if let Err((invariant, seen)) = told {
                world.broken(invariant, seen);
            }
        }
        tokio::select! {
            biased;
            () = broken(&connection.worker_end) => continue,
            () = world.travel(stream, from, to) => {}
        }
        let sender = down.as_ref().expect("it was seen above");
        let sent = match message {
            Some(message) => {
                if let Ok(message) = &message {
                    world.state().ledger.heard(connection.agent, message);
                    world.happened(format_args!("{to:?} hears {message:?}"));
                }
                sender.send(message).await
            }
            None if world.is_alive(connection.coordinator) => return,
            None => {
                let _ = sender.send(Err(gone())).await;
                return;
            }
        };
        if sent.is_err() {
            // The worker has let go of the stream, and its host says so.
            world.travel(stream, to, from).await;
            return;
        }
    }
}

/// Ends the side whose pings are not answered.
async fn keep_alive(world: Arc<World>, connection: std::sync::Weak<Connection>) {
    let stream = world.new_stream();
    let spread = KEEPALIVE_MS.1 - KEEPALIVE_MS.0;
    let patience: [Duration; 2] = std::array::from_fn(|_| {
        Duration::from_millis(KEEPALIVE_MS.0 + world.below(stream, spread))
    });
    let mut dark = [Duration::ZERO; 2];
    loop {
        sleep(LOOK).await;
        let Some(connection) = connection.upgrade() else {
            return;
        };
        let (worker, coordinator) = (connection.worker_host, connection.coordinator_host);
        let now = moment();
        let is_cut = world.link_opens(worker, coordinator) > now
            || world.link_opens(coordinator, worker) > now
            || *connection.worker_end.borrow()
            || *connection.coordinator_end.borrow();
        let ends = [
            (
                connection.agent,
                connection.coordinator,
                &connection.worker_end,
            ),
            (
                connection.coordinator,
                connection.agent,
                &connection.coordinator_end,
            ),
        ];
        for (at, (own, peer, end)) in ends.into_iter().enumerate() {
            let pings = world.paused_until(own) <= now;
            let unanswered = is_cut || !world.answers(peer);
            dark[at] = match (pings, unanswered) {
                (true, true) => dark[at] + LOOK,
                (true, false) => Duration::ZERO,
                (false, _) => dark[at],
            };
            if dark[at] >= patience[at] {
                end.send_replace(true);
            }
        }
    }
}

/// Breaks the newest stream of a worker, one side first.
pub(super) async fn cut(world: Arc<World>, worker: usize, worker_first: bool, lag_ms: u64) {
    let newest = {
        let mut state = world.state();
        state
            .connections
            .retain(|(_, connection)| connection.strong_count() > 0);
        let mut own = state.connections.iter().rev();
        own.find(|(of, _)| *of == worker)
            .and_then(|(_, connection)| connection.upgrade())
    };
    let Some(connection) = newest else {
        return;
    };
    connection.break_end(worker_first);
    let until: Instant = moment() + Duration::from_millis(lag_ms);
    sleep_until(until).await;
    connection.break_end(!worker_first);
}
