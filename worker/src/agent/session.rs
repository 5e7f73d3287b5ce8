//! The agent's session with the coordinator: opened, kept alive with beats, opened again.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::security::GroupSecret;
use tokio::time::Instant;

use super::client::{self, Closed, Condition, FromCoordinator, Hello, Welcome};
use super::{Agent, Ended, GIVE_UP, Session, now};

/// Between two lines of the log about a coordinator that is away.
const REMINDER: Duration = Duration::from_secs(60);

impl Agent {
    pub(super) fn open_session(&mut self) -> anyhow::Result<()> {
        self.session_id += 1;
        self.session = Session::Opening(None);
        let join = match self.config.join.read(self.config.insecure) {
            Ok(join) => join,
            // The file of a coordinator that is starting again may be gone for a moment.
            Err(error) if self.incarnation.is_some() => {
                self.session_closed(&Closed {
                    reason: error.to_string(),
                    fatal: false,
                })?;
                return Ok(());
            }
            Err(error) => return Err(error).context("the join string cannot be used"),
        };
        self.group_secret = GroupSecret::derive(join.token(), join.run_id());
        self.advertise = match self.config.advertise {
            Some(address) => Some(address),
            // A host that finds no way to the coordinator finds none to its peers either, and says so when it dials.
            None => self.outside.facing(join.address()).ok(),
        };
        let hello = Hello {
            name: self.name.clone(),
            host: self.config.host.clone(),
            pid: self.outside.process_id(),
            device: client::describe(self.device),
            incarnation: self.incarnation,
            leases: self.held.leases().cloned().collect(),
            group: self
                .held
                .member()
                .map(|member| member.membership.group.clone()),
            engine_starting: self.engine_starting(),
        };
        let events = self.events.0.clone();
        let outside = Arc::clone(&self.outside);
        let id = self.session_id;
        self.client = Some(tokio::spawn(client::run(
            id, outside, join, hello, now, events,
        )));
        Ok(())
    }

    pub(super) fn session_event(&mut self, event: client::Event) -> anyhow::Result<()> {
        match event {
            client::Event::Opened {
                outgoing,
                hello_sent,
            } => self.session = Session::Opening(Some((outgoing, hello_sent))),
            client::Event::Said(FromCoordinator::Welcome(welcome)) => self.welcomed(welcome)?,
            client::Event::Said(message) => self.coordinator_said(message),
            client::Event::Closed(closed) => self.session_closed(&closed)?,
        }
        Ok(())
    }

    fn session_closed(&mut self, closed: &Closed) -> anyhow::Result<()> {
        anyhow::ensure!(
            !closed.fatal,
            "the coordinator refused this worker: {}",
            closed.reason
        );
        let delay = self.reconnect.next_delay(self.jitter());
        let now = now();
        let reason = &closed.reason;
        if self.missed.is_none_or(|told| now >= told + REMINDER) {
            self.missed = Some(now);
            let gives_up_in = (self.heard + GIVE_UP).saturating_duration_since(now);
            tracing::info!(reason, ?gives_up_in, "no stream to the coordinator");
        } else {
            tracing::debug!(reason, ?delay, "no stream to the coordinator");
        }
        self.session = Session::Down(now + delay);
        Ok(())
    }

    fn welcomed(&mut self, welcome: Welcome) -> anyhow::Result<()> {
        let Session::Opening(Some((outgoing, hello_sent))) = &self.session else {
            tracing::error!("a welcome to a worker that did not greet");
            return Ok(());
        };
        let (outgoing, hello_sent) = (outgoing.clone(), *hello_sent);
        if welcome.term < self.term {
            // Whatever it ordered or acknowledged would be void. The session's later events are not heard any more.
            self.session_id += 1;
            return self.session_closed(&Closed {
                reason: format!("the coordinator of term {} was replaced", welcome.term),
                fatal: false,
            });
        }
        self.term = welcome.term;
        let moment = now();
        tracing::info!(term = %welcome.term, incarnation = %welcome.incarnation, "registered");
        self.heard = moment;
        self.reconnect.reset();
        self.missed = None;
        self.beat_every = welcome.beat.max(Duration::from_millis(10));
        if self.incarnation != Some(welcome.incarnation) {
            self.start_over(moment);
        }
        self.incarnation = Some(welcome.incarnation);
        self.held.welcomed(hello_sent, welcome.lease_ttl);
        match &self.run {
            Some((uri, _)) => anyhow::ensure!(
                *uri == welcome.run_uri,
                "the coordinator now serves {}, not {uri}; start this worker again",
                welcome.run_uri
            ),
            None => {
                let store = self.outside.open_store(&welcome.run_uri);
                let store = store.context("the run cannot be opened")?;
                self.run = Some((welcome.run_uri, store));
            }
        }
        for (seq, report) in self.outbox.waiting() {
            outgoing.report(*seq, report);
        }
        self.session = Session::Up(outgoing, moment);
        Ok(())
    }

    /// Another registration than before: whatever was held is somebody else's now.
    fn start_over(&mut self, now: Instant) {
        for lease in self.held.take_all() {
            self.end(Ended::Task(lease), now);
        }
        self.leave_group("the worker was registered anew", now);
    }

    pub(super) fn beat(&mut self, now: Instant) {
        let condition = Condition {
            rss_bytes: self.resident_bytes(),
            engine_starting: self.engine_starting(),
            leaving: self.departure.is_some(),
        };
        let due = now + self.beat_every.mul_f64(0.9 + 0.2 * self.jitter());
        let Session::Up(outgoing, at) = &mut self.session else {
            return;
        };
        *at = due;
        self.beats += 1;
        let group = self
            .held
            .member()
            .and_then(|member| member.progress.as_ref());
        let tasks = self.held.progress();
        outgoing.beat(self.beats, &tasks, group, condition);
        self.held.beat_sent(self.beats, now);
    }

    /// In `[0, 1)`, different for each worker and each use.
    pub(super) fn jitter(&self) -> f64 {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let mut hasher = DefaultHasher::new();
        let pid = self.outside.process_id();
        (&self.name, pid, self.beats, self.session_id).hash(&mut hasher);
        (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(super) async fn say_goodbye(&mut self) {
        if let (Session::Up(outgoing, _), Some(departure)) = (&self.session, &self.departure) {
            outgoing.goodbye(&departure.reason);
        }
        // Closing our half lets the coordinator read the goodbye and close its own.
        self.session = Session::Opening(None);
        if let Some(client) = self.client.take() {
            let mut client = client;
            if tokio::time::timeout(Duration::from_secs(1), &mut client)
                .await
                .is_err()
            {
                client.abort();
            }
        }
    }
}
