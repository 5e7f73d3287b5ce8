//! The other end of the calls for people: asks a coordinator how its run is, or to stop it.

use std::error::Error;
use std::fmt::Write as _;
use std::io;
use std::time::Duration;

use serde_json::{Value, json};
use tonic::Code;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use distillery_common::ids::Incarnation;
use distillery_common::proto::wire;
use distillery_common::proto::wire::coordinator_client::CoordinatorClient;
use distillery_common::security::{Join, ShowToken};

/// How long a coordinator may be silent before it counts as gone.
const SILENCE: Duration = Duration::from_secs(5);

/// What people ask of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Stop, to be resumed.
    Stop {
        /// Without waiting for a checkpoint.
        now: bool,
    },
    /// Begin nothing new.
    Pause {
        /// Who or why.
        reason: String,
    },
    /// Go on after a pause.
    Resume,
    /// Give the run up for good.
    Cancel {
        /// Who or why.
        reason: String,
    },
    /// Let workers leave after what they have in hand.
    Drain {
        /// Their name.
        worker: String,
    },
}

/// A connection to a coordinator.
#[derive(Debug, Clone)]
pub struct Client {
    client: CoordinatorClient<InterceptedService<Channel, ShowToken>>,
}

/// Who answers where a run's coordinator should be.
#[derive(Debug)]
pub enum Search {
    /// It.
    Found(Client),
    /// Somebody who may be it, and does not take the token that is known here; in words.
    Stranger(String),
    /// Nobody who could be it; why not, in words.
    Nobody(String),
}

impl Search {
    /// What an error on the way to a coordinator tells. One of TLS comes from somebody who speaks it.
    fn judge(error: &(dyn Error + 'static)) -> Self {
        let mut last = error.to_string();
        let mut next = Some(error);
        while let Some(error) = next {
            let inner = error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref);
            let tls = error
                .downcast_ref::<rustls::Error>()
                .or_else(|| inner?.downcast_ref::<rustls::Error>());
            match tls {
                Some(rustls::Error::InvalidMessage(_)) => {
                    return Self::Nobody("what listens there speaks no TLS".to_owned());
                }
                Some(fault) => {
                    return Self::Stranger(format!("it does not belong to this token ({fault})"));
                }
                None => last = error.to_string(),
            }
            next = error.source();
        }
        Self::Nobody(last)
    }

    /// Of one whose token is not known here: whether anybody listens at `address`.
    pub async fn without_token(address: &str) -> Self {
        let attempt = tokio::net::TcpStream::connect(address);
        match tokio::time::timeout(SILENCE, attempt).await {
            Ok(Ok(_)) => Self::Stranger("this run's token is not known here".to_owned()),
            Ok(Err(error)) => Self::Nobody(error.to_string()),
            Err(_) => Self::silent(),
        }
    }

    fn silent() -> Self {
        Self::Nobody(format!("no answer in {} s", SILENCE.as_secs()))
    }
}

impl Client {
    /// Looks for the coordinator of `join`'s run.
    pub async fn find(join: &Join) -> Search {
        let attempt = Self::meet(join);
        let found = tokio::time::timeout(SILENCE, attempt).await;
        found.unwrap_or_else(|_| Search::silent())
    }

    async fn meet(join: &Join) -> Search {
        let endpoint = match join.endpoint() {
            Ok(endpoint) => endpoint,
            Err(error) => return Search::judge(&error),
        };
        let channel = match endpoint.connect().await {
            Ok(channel) => channel,
            Err(error) => return Search::judge(&error),
        };
        let client = CoordinatorClient::with_interceptor(channel, ShowToken::new(join.token()));
        let mut client = Self { client };
        match client.status().await {
            Ok(status) if status.0.run_id == join.run_id() => Search::Found(client),
            Ok(status) => Search::Stranger(format!("it has the run {}", status.0.run_id)),
            Err(status) if status.code() == Code::Unauthenticated => {
                Search::Stranger(status.message().to_owned())
            }
            Err(status) => Search::judge(&status),
        }
    }

    /// How the run is.
    pub async fn status(&mut self) -> Result<Status, tonic::Status> {
        let reply = self.client.status(wire::StatusRequest {}).await?;
        Ok(Status(reply.into_inner()))
    }

    /// Asks something of the run; done once it was heard.
    pub async fn ask(&mut self, request: Request) -> Result<(), tonic::Status> {
        use wire::control_request::Request as Wire;
        let request = match request {
            Request::Stop { now } => Wire::Stop(wire::Stop { now }),
            Request::Pause { reason } => Wire::Pause(wire::Pause { reason }),
            Request::Resume => Wire::Resume(wire::Resume {}),
            Request::Cancel { reason } => Wire::Cancel(wire::Cancel { reason }),
            Request::Drain { worker } => Wire::Drain(wire::DrainWorker { worker }),
        };
        let request = Some(request);
        self.client
            .control(wire::ControlRequest { request })
            .await?;
        Ok(())
    }
}

/// How a run is, as its coordinator says.
#[derive(Debug)]
pub struct Status(wire::StatusReply);

impl Status {
    /// The stages at work, in one line.
    pub fn summary(&self) -> String {
        let status = &self.0;
        let stages: Vec<_> = status
            .stages
            .iter()
            .filter(|stage| !["blocked", "sealed"].contains(&stage.state.as_str()))
            .map(|stage| format!("{} {}/{}", stage.name, stage.done, stage.total))
            .collect();
        format!("{}: {}", status.state, stages.join(", "))
    }

    /// A run for people.
    pub fn text(&self) -> String {
        let status = &self.0;
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "run {} ({}) at {}: {}, term {}",
            status.name, status.run_id, status.run_uri, status.state, status.term
        );
        for stage in &status.stages {
            let _ = writeln!(
                text,
                "  {:<14} {:<13} {:<11} {:>8} of {}",
                stage.name, stage.kind, stage.state, stage.done, stage.total
            );
        }
        if !status.workers.is_empty() {
            text.push_str(&self.workers_text());
        }
        for decision in status.decisions.iter().rev().take(10).rev() {
            let _ = writeln!(text, "  - {decision}");
        }
        if !status.note.is_empty() {
            let _ = writeln!(text, "  {}", status.note);
        }
        if let Some(failure) = status.failures.last() {
            text.push_str(&failure_text(failure, &status.run_uri));
        }
        text
    }

    /// The workers for people: a line each.
    pub fn workers_text(&self) -> String {
        let workers = &self.0.workers;
        if workers.is_empty() {
            return "no worker is here\n".into();
        }
        let width = |of: fn(&wire::WorkerStatus) -> &str, least: usize| {
            workers
                .iter()
                .map(|worker| of(worker).chars().count())
                .max()
                .unwrap_or(0)
                .max(least)
        };
        let name = width(|worker| &worker.name, 6);
        let host = width(|worker| &worker.host, 4);
        let device = width(|worker| &worker.device, 6);
        let doing = width(|worker| &worker.doing, 5);
        let mut text = format!(
            "  {:<name$}  {:<host$}  {:<device$}  {:<12}  {:>8}  {:>12}  {:<doing$}  detail\n",
            "worker", "host", "device", "state", "since", "registration", "doing"
        );
        for worker in workers {
            let since = hms(worker.age_ms);
            let line = format!(
                "  {:<name$}  {:<host$}  {:<device$}  {:<12}  {since:>8}  {:>12}  {:<doing$}  {}",
                worker.name,
                worker.host,
                worker.device,
                worker.state,
                Incarnation(worker.incarnation).to_string(),
                worker.doing,
                worker.detail,
            );
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }

    /// A run for programs.
    pub fn to_json(&self) -> Value {
        let status = &self.0;
        let stages: Vec<_> = status
            .stages
            .iter()
            .map(|stage| {
                json!({
                    "name": stage.name, "kind": stage.kind, "state": stage.state,
                    "done": stage.done, "total": stage.total, "world": stage.world,
                })
            })
            .collect();
        let workers: Vec<_> = status
            .workers
            .iter()
            .map(|worker| {
                json!({
                    "name": worker.name, "incarnation": worker.incarnation, "state": worker.state,
                    "doing": worker.doing, "rss_bytes": worker.rss_bytes,
                    "silent_ms": worker.silent_ms, "host": worker.host, "device": worker.device,
                    "detail": worker.detail, "age_ms": worker.age_ms,
                })
            })
            .collect();
        let failures: Vec<_> = status.failures.iter().map(failure_json).collect();
        json!({
            "run_id": status.run_id, "output": status.run_uri, "name": status.name,
            "term": status.term, "state": status.state, "stages": stages,
            "workers": workers, "decisions": status.decisions, "failures": failures,
            "note": status.note, "elapsed_ms": status.elapsed_ms,
        })
    }
}

/// Lines of output that are shown of the last failure.
const SHOWN: usize = 10;

fn failure_text(failure: &wire::FailureReport, uri: &str) -> String {
    let mut text = format!(
        "  last failure, {} ago: {} by worker {}: {}\n",
        hms(failure.ago_ms),
        failure.what,
        failure.worker,
        failure.message
    );
    let lines: Vec<_> = failure.output.lines().collect();
    for line in &lines[lines.len().saturating_sub(SHOWN)..] {
        let _ = writeln!(text, "    {line}");
    }
    if !lines.is_empty() {
        let worker = &failure.worker;
        let _ = writeln!(text, "    (more: coordinator logs {uri} --worker {worker})");
    }
    text
}

fn failure_json(failure: &wire::FailureReport) -> Value {
    json!({
        "worker": failure.worker, "what": failure.what, "message": failure.message,
        "output": failure.output, "ago_ms": failure.ago_ms,
    })
}

fn hms(ms: u64) -> String {
    let s = ms / 1000;
    format!("{:02}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}
