//! One simulated worker: a stream, and what is held on it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::group::{Membership, Phase, Progress};
use distillery_common::ids::Incarnation;
use distillery_common::proto::wire::coordinator_client::CoordinatorClient;
use distillery_common::proto::wire::{coordinator_message, report, worker_message};
use distillery_common::proto::{MAX_MESSAGE_BYTES, PROTOCOL_VERSION, from_wire, to_wire, wire};
use distillery_common::security::{Join, ShowToken};
use distillery_common::task::{Failure, FailureClass, Lease, Progress as TaskProgress};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;

use super::{GroupEvent, Order, Seen, Spec, Tally, commits, now};

/// As a real worker.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// Messages that may wait for the stream.
const QUEUE: usize = 32;
/// Before a broken stream is opened again.
const RECONNECT: Duration = Duration::from_millis(100);
/// Streams that may break, one after the other, until a worker gives up.
const STREAMS: u32 = 20;
/// A task that takes longer than this never ends.
const NEVER: Duration = Duration::from_secs(u32::MAX as u64);

/// How a real worker reaches the coordinator.
pub(super) fn endpoint(join: &Join) -> anyhow::Result<Endpoint> {
    let endpoint = join.endpoint().context("the join string cannot be used")?;
    Ok(endpoint
        .connect_timeout(Duration::from_secs(30))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1)
        .keep_alive_while_idle(true))
}

/// A worker before and between its streams.
pub(super) struct Worker {
    spec: Arc<Spec>,
    tally: Arc<Tally>,
    number: u32,
    endpoint: Endpoint,
    seen: mpsc::UnboundedSender<Seen>,
    incarnation: Option<Incarnation>,
    held: Vec<(Lease, Instant)>,
    member: Option<Membership>,
    stepping: bool,
    seq: u64,
    /// Reports without an acknowledgement, and when they were first sent.
    reports: BTreeMap<u64, (report::Report, Instant)>,
}

/// One stream.
struct Stream {
    outgoing: mpsc::Sender<wire::WorkerMessage>,
    beat: Duration,
    next_beat: Instant,
    beats: VecDeque<(u64, Instant)>,
    idle_since: Option<Instant>,
}

impl Worker {
    pub(super) fn new(
        spec: Arc<Spec>,
        tally: Arc<Tally>,
        number: u32,
        endpoint: Endpoint,
        seen: mpsc::UnboundedSender<Seen>,
    ) -> Self {
        Self {
            spec,
            tally,
            number,
            endpoint,
            seen,
            incarnation: None,
            held: Vec::new(),
            member: None,
            stepping: false,
            seq: 0,
            reports: BTreeMap::new(),
        }
    }

    /// Works until told to leave, over as many streams as it takes.
    pub(super) async fn run(mut self, mut told: watch::Receiver<Order>) -> anyhow::Result<()> {
        let mut last = None;
        for _ in 0..STREAMS {
            match self.converse(&mut told).await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => last = Some(error),
            }
            if *told.borrow() == Order::Leave {
                return Ok(());
            }
            self.tally.broken.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(RECONNECT).await;
        }
        let error = last.unwrap_or_else(|| anyhow::anyhow!("the coordinator closed it"));
        Err(error).with_context(|| format!("stream of simulated worker {}", self.number))
    }

    /// One stream from hello to its end; true when the worker left on purpose.
    async fn converse(&mut self, told: &mut watch::Receiver<Order>) -> anyhow::Result<bool> {
        let channel = self.endpoint.connect().await?;
        let show = ShowToken::new(self.spec.join.token());
        let mut client = CoordinatorClient::with_interceptor(channel, show)
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let (outgoing, queued) = mpsc::channel(QUEUE);
        outgoing.send(self.hello()).await?;
        let mut incoming = client
            .session(ReceiverStream::new(queued))
            .await?
            .into_inner();
        let mut stream = self.welcome(&mut incoming, outgoing).await?;
        for (seq, (report, _)) in &self.reports {
            stream.report(*seq, report.clone()).await?;
        }
        loop {
            let next = self.next_end().min(stream.next_beat);
            tokio::select! {
                message = incoming.message() => match message? {
                    Some(message) => {
                        if self.hear(message, &mut stream).await? {
                            stream.goodbye().await;
                            return Ok(true);
                        }
                    }
                    None => return Ok(false),
                },
                Ok(()) = told.changed() => {
                    let order = told.borrow_and_update().clone();
                    if self.obey(&order, &mut stream).await? {
                        return Ok(true);
                    }
                }
                () = sleep_until(next) => {
                    let moment = now();
                    if moment >= stream.next_beat {
                        self.beat(moment, &mut stream).await?;
                    }
                    self.finish_due(moment, &mut stream).await?;
                }
            }
        }
    }

    fn hello(&self) -> wire::WorkerMessage {
        let hello = wire::Hello {
            protocol_version: PROTOCOL_VERSION,
            name: format!("sim-{}", self.number),
            host: format!("host-{}", self.number / 8),
            pid: std::process::id(),
            devices: vec![wire::Device {
                kind: "cpu".into(),
                index: 0,
                name: String::new(),
                memory_bytes: 0,
            }],
            incarnation: self.incarnation.unwrap_or_default().0,
            leases: self
                .held
                .iter()
                .map(|(lease, _)| to_wire::lease(lease))
                .collect(),
            group: self
                .member
                .as_ref()
                .map(|member| to_wire::group_id(&member.group)),
            engine_starting: false,
        };
        say(worker_message::Message::Hello(hello))
    }

    async fn welcome(
        &mut self,
        incoming: &mut Streaming<wire::CoordinatorMessage>,
        outgoing: mpsc::Sender<wire::WorkerMessage>,
    ) -> anyhow::Result<Stream> {
        let first = incoming
            .message()
            .await?
            .and_then(|message| message.message);
        let Some(coordinator_message::Message::Welcome(welcome)) = first else {
            anyhow::bail!("the first answer is not a welcome");
        };
        let incarnation = Incarnation(welcome.incarnation);
        match self.incarnation.replace(incarnation) {
            None => {
                self.tally.welcomed.fetch_add(1, Ordering::Relaxed);
            }
            Some(before) if before != incarnation => {
                self.tally.deaths.fetch_add(1, Ordering::Relaxed);
                self.held.clear();
                self.member = None;
            }
            Some(_) => {}
        }
        let moment = now();
        let beat = Duration::from_millis(welcome.beat_ms);
        Ok(Stream {
            outgoing,
            beat,
            // Spread over a whole interval, as workers that started at different times are.
            next_beat: moment + beat.mul_f64(spread(u64::from(self.number))),
            beats: VecDeque::new(),
            idle_since: Some(moment),
        })
    }

    /// Acts on what the coordinator said; true when it was told to leave.
    async fn hear(
        &mut self,
        message: wire::CoordinatorMessage,
        stream: &mut Stream,
    ) -> anyhow::Result<bool> {
        use coordinator_message::Message;
        let moment = now();
        match message.message.context("an empty message")? {
            Message::Welcome(_) => anyhow::bail!("a second welcome"),
            Message::BeatAck(ack) => {
                while let Some(&(seq, sent)) = stream.beats.front()
                    && seq <= ack.seq
                {
                    stream.beats.pop_front();
                    if seq == ack.seq {
                        self.tally.beat.record(moment - sent);
                    }
                }
            }
            Message::ReportAck(ack) => {
                if let Some((report::Report::TaskCommitted(_), sent)) =
                    self.reports.remove(&ack.seq)
                {
                    self.tally.acknowledged.fetch_add(1, Ordering::Relaxed);
                    self.tally.report.record(moment - sent);
                }
            }
            Message::Grant(grant) => {
                let lease = from_wire::lease(grant.lease)?;
                self.tally.grants.fetch_add(1, Ordering::Relaxed);
                if let Some(idle) = stream.idle_since.take() {
                    self.tally.grant.record(moment - idle);
                }
                let end = moment + self.task_length(&lease);
                self.held.push((lease, end));
                self.finish_due(moment, stream).await?;
            }
            Message::Revoke(revoke) => {
                let lease = from_wire::lease(revoke.lease)?;
                self.tally.revoked.fetch_add(1, Ordering::Relaxed);
                self.held.retain(|(held, _)| *held != lease);
            }
            Message::GroupJoin(join) => self.join(from_wire::membership(join)?, stream).await?,
            Message::GroupPeers(peers) => {
                let group = from_wire::group_id(peers.group)?;
                self.stepping = true;
                self.see(group, GroupEvent::Peers(peers.addresses.len()));
            }
            Message::GroupAbort(abort) => {
                let group = from_wire::group_id(abort.group)?;
                self.member = self.member.take().filter(|member| member.group != group);
                self.see(group, GroupEvent::Aborted);
            }
            Message::Drain(_) => return Ok(true),
        }
        Ok(false)
    }

    /// Between half and one and a half times the usual, so that tasks do not end together.
    fn task_length(&self, lease: &Lease) -> Duration {
        let usual = self.spec.task;
        if usual >= NEVER {
            return NEVER;
        }
        usual.mul_f64(0.5 + spread(lease.task.index))
    }

    async fn join(&mut self, membership: Membership, stream: &mut Stream) -> anyhow::Result<()> {
        self.see(membership.group.clone(), GroupEvent::Joined);
        let ready = report::Report::GroupReady(wire::GroupReady {
            group: Some(to_wire::group_id(&membership.group)),
            rank: membership.rank,
            address: format!(
                "10.{}.{}.7:40123",
                membership.rank / 200,
                membership.rank % 200
            ),
        });
        self.member = Some(membership);
        self.stepping = false;
        self.report(ready, stream).await
    }

    fn see(&self, group: distillery_common::group::GroupId, what: GroupEvent) {
        // Nobody may be looking.
        let _ = self.seen.send(Seen {
            group,
            at: now(),
            what,
        });
    }

    /// Obeys; true when the worker has left.
    async fn obey(&mut self, order: &Order, stream: &mut Stream) -> anyhow::Result<bool> {
        match order {
            Order::Work => {}
            Order::Leave => {
                stream.goodbye().await;
                return Ok(true);
            }
            Order::Fail(group) => {
                let is_first = |member: &&Membership| member.rank == 0 && member.group == *group;
                if self.member.as_ref().filter(is_first).is_some() {
                    self.fail_group(stream).await?;
                }
            }
        }
        Ok(false)
    }

    async fn fail_group(&mut self, stream: &mut Stream) -> anyhow::Result<()> {
        let Some(member) = &self.member else {
            return Ok(());
        };
        let failed = report::Report::GroupFailed(wire::GroupFailed {
            group: Some(to_wire::group_id(&member.group)),
            rank: member.rank,
            failure: Some(to_wire::failure(&Failure {
                class: FailureClass::Stale,
                message: "told to give up".into(),
            })),
        });
        self.report(failed, stream).await
    }

    async fn beat(&mut self, moment: Instant, stream: &mut Stream) -> anyhow::Result<()> {
        self.seq += 1;
        let progress = |(lease, _): &(Lease, Instant)| {
            to_wire::task_progress(&TaskProgress {
                lease: lease.clone(),
                done: self.seq,
                total: self.seq + 100,
            })
        };
        let beat = wire::Beat {
            seq: self.seq,
            tasks: self.held.iter().map(progress).collect(),
            group: self.member.as_ref().map(|member| self.progress(member)),
            rss_bytes: 1 << 30,
            engine_starting: false,
            leaving: false,
        };
        self.tally.beats.fetch_add(1, Ordering::Relaxed);
        stream.beats.push_back((self.seq, moment));
        // 10 % about the interval, as real workers keep it.
        let stretch = 0.9 + 0.2 * spread(self.seq ^ u64::from(self.number) << 32);
        stream.next_beat = moment + stream.beat.mul_f64(stretch);
        stream.say(worker_message::Message::Beat(beat)).await
    }

    fn progress(&self, member: &Membership) -> wire::GroupProgress {
        let phase = if self.stepping {
            Phase::Stepping
        } else {
            Phase::Exchanging
        };
        to_wire::group_progress(&Progress {
            group: member.group.clone(),
            phase,
            step: self.seq,
            total_steps: 1_000_000,
            loss: 0.5,
            samples_per_second: 1.0,
            step_ms: 1.0,
        })
    }

    fn next_end(&self) -> Instant {
        let ends = self.held.iter().map(|(_, end)| *end);
        ends.min().unwrap_or_else(|| now() + NEVER)
    }

    /// Commits and reports what is due.
    async fn finish_due(&mut self, moment: Instant, stream: &mut Stream) -> anyhow::Result<()> {
        while let Some(at) = self.held.iter().position(|(_, end)| *end <= moment) {
            let (lease, _) = self.held.remove(at);
            let spec = &self.spec;
            let (summary, won) =
                commits::put(&spec.store, &lease, spec.dataset, spec.files).await?;
            self.tally.won.fetch_add(u64::from(won), Ordering::Relaxed);
            let committed = report::Report::TaskCommitted(wire::TaskCommitted {
                lease: Some(to_wire::lease(&lease)),
                commit: Some(to_wire::commit_summary(&summary)),
                won,
            });
            stream.idle_since = Some(now());
            self.report(committed, stream).await?;
        }
        Ok(())
    }

    async fn report(&mut self, report: report::Report, stream: &mut Stream) -> anyhow::Result<()> {
        self.seq += 1;
        self.reports.insert(self.seq, (report.clone(), now()));
        stream.report(self.seq, report).await
    }
}

impl Stream {
    async fn say(&self, message: worker_message::Message) -> anyhow::Result<()> {
        self.outgoing
            .send(say(message))
            .await
            .context("the stream is closed")
    }

    async fn report(&self, seq: u64, report: report::Report) -> anyhow::Result<()> {
        let report = wire::Report {
            seq,
            report: Some(report),
        };
        self.say(worker_message::Message::Report(report)).await
    }

    async fn goodbye(&self) {
        let goodbye = wire::Goodbye {
            reason: "the measurement is over".into(),
        };
        // It may be gone already; then nobody waits for a goodbye.
        let _ = self.say(worker_message::Message::Goodbye(goodbye)).await;
        // The stream ends with the queue's last sender, after what was queued.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn say(message: worker_message::Message) -> wire::WorkerMessage {
    wire::WorkerMessage {
        message: Some(message),
    }
}

/// A fraction that looks random and is the same every time.
fn spread(number: u64) -> f64 {
    let mixed = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}
