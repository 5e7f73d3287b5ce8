//! Spans of attempts and of training groups for a collector of OpenTelemetry, where the command line or the environment names
//! one.
//!
//! The trace is the run: its id is the run's, so that all lives of a coordinator are in one. A span begins with a grant
//! or a formation and ends with what became of it. What follows is OTLP over HTTP in its JSON form, which a collector
//! takes as well as the binary one. A collector that is slow or gone costs spans and nothing else. Must never decide
//! anything.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use distillery_common::group::GroupId;
use distillery_common::ids::{Digest, Incarnation};
use distillery_common::task::{Lease, TaskId};
use distillery_common::{cryptography, telemetry};

use crate::scheduler::{Action, Decision, Event, ToWorker};
use crate::service::Identity;

/// Where the collector listens, by the names that OpenTelemetry gives; and what is typed in their place.
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const TRACES: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
const HEADERS: &str = "OTEL_EXPORTER_OTLP_HEADERS";
const FLAG: &str = "--otlp";
/// Ended spans that may wait for the collector.
const QUEUE: usize = 4096;
/// Most spans of one request, and the longest wait for them.
const BATCH: usize = 256;
const EVERY: Duration = Duration::from_secs(5);
/// How long the collector may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Events that one span keeps: the first ones.
const EVENTS: usize = 128;

/// Open spans, and the way to the collector.
#[derive(Debug)]
pub struct Spans {
    trace: String,
    root: Span,
    attempts: BTreeMap<Lease, Span>,
    groups: BTreeMap<GroupId, Span>,
    ended: mpsc::Sender<Value>,
}

#[derive(Debug, Clone)]
struct Span {
    id: String,
    name: String,
    began: i64,
    attributes: Vec<Value>,
    events: Vec<Value>,
}

impl Span {
    /// A span whose id follows from what it is.
    fn begin(name: &str, what: &str, attributes: Vec<Value>) -> Self {
        let id = Digest::of(what.as_bytes()).to_string();
        Self {
            id: id[..16].to_owned(),
            name: name.to_owned(),
            began: telemetry::unix_millis(),
            attributes,
            events: Vec::new(),
        }
    }
}

fn text(key: &str, value: impl ToString) -> Value {
    json!({"key": key, "value": {"stringValue": value.to_string()}})
}

fn number(key: &str, value: u64) -> Value {
    // 64-bit integers are text in the JSON form.
    json!({"key": key, "value": {"intValue": value.to_string()}})
}

fn nanos(millis: i64) -> String {
    millis.saturating_mul(1_000_000).to_string()
}

/// Spans for the collector at `typed`, the base of its URL, or else for that which the environment names, and the task that
/// sends them; none where nobody names one.
///
/// # Errors
/// When what is typed, or what the environment says, makes no sense.
pub fn start(
    typed: Option<&str>,
    identity: &Identity,
) -> anyhow::Result<Option<(Spans, JoinHandle<()>)>> {
    let named = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let below = |base: &str| format!("{}/v1/traces", base.trim_end_matches('/'));
    let (url, from) = match (typed, named(TRACES), named(ENDPOINT)) {
        (Some(base), _, _) => (below(base), FLAG),
        (None, Some(url), _) => (url, TRACES),
        (None, None, Some(base)) => (below(&base), ENDPOINT),
        (None, None, None) => return Ok(None),
    };
    let sender = Sender::new(&url, from, named(HEADERS).as_deref(), identity)?;
    let (ended, queued) = mpsc::channel(QUEUE);
    let sending = tokio::spawn(sender.send_all(queued));
    let what = format!("{} life {}", identity.run_id, identity.term);
    let attributes = vec![
        text("distillery.run.name", &identity.name),
        text("distillery.run.uri", &identity.run_uri),
        number("distillery.term", identity.term),
    ];
    let spans = Spans {
        // A run's id is a UUID: 128 bits, as a trace's is.
        trace: identity.run_id.replace('-', ""),
        root: Span::begin("run", &what, attributes),
        attempts: BTreeMap::new(),
        groups: BTreeMap::new(),
        ended,
    };
    Ok(Some((spans, sending)))
}

impl Spans {
    /// Something happened.
    pub fn heard(&mut self, event: &Event) {
        if let Event::CommitVerified {
            task,
            commit: Ok(Some(_)),
        } = event
        {
            self.end_task(task, Ok(()));
        }
    }

    /// This is done.
    pub fn acts(&mut self, action: &Action) {
        match action {
            Action::Send(_, ToWorker::Revoke { lease, reason }) => {
                self.end_attempt(&lease.clone(), Err(reason));
            }
            Action::Explain(decision) => self.decided(decision),
            _ => {}
        }
    }

    fn decided(&mut self, decision: &Decision) {
        match decision {
            Decision::Granted { lease, why } => {
                let attributes = vec![
                    text("distillery.stage", &lease.task.stage),
                    number("distillery.task", lease.task.index),
                    number("distillery.attempt", lease.attempt.into()),
                    text("distillery.worker", lease.incarnation),
                    text("distillery.why", why),
                ];
                let what = format!("{} {lease} {}", self.trace, lease.term);
                let name = format!("attempt {}", lease.task.stage);
                let span = Span::begin(&name, &what, attributes);
                self.attempts.insert(lease.clone(), span);
            }
            Decision::Retrying { lease, failure, .. } => {
                self.end_attempt(lease, Err(&failure.to_string()));
            }
            Decision::Lost {
                incarnation, cause, ..
            } => self.end_worker(*incarnation, cause),
            Decision::Formed {
                group,
                world,
                base_step,
            } => {
                let attributes = vec![
                    text("distillery.stage", &group.stage),
                    number("distillery.generation", group.generation.0),
                    number("distillery.world", u64::from(*world)),
                    number("distillery.base_step", *base_step),
                ];
                let what = format!("{} {group}", self.trace);
                let name = format!("generation {}", group.stage);
                let span = Span::begin(&name, &what, attributes);
                self.groups.insert(group.clone(), span);
            }
            Decision::Exchanged { group } => self.note(|id| id == group, "connected".into()),
            Decision::Trains { group, step } => {
                self.note(|id| id == group, format!("step {step} applied"));
            }
            Decision::Checkpoint {
                stage,
                step,
                generation,
            } => self.note(
                |id| id.stage == *stage && id.generation == *generation,
                format!("checkpoint at step {step}"),
            ),
            Decision::Aborted { group, reason, .. } => self.end_group(group, Err(reason)),
            Decision::StageSealed { stage, .. } => {
                let groups = self.groups.keys().filter(|id| id.stage == *stage);
                for group in groups.cloned().collect::<Vec<_>>() {
                    self.end_group(&group, Ok(()));
                }
            }
            _ => {}
        }
    }

    fn note(&mut self, is_it: impl Fn(&GroupId) -> bool, name: String) {
        let span = self.groups.iter_mut().find(|(id, _)| is_it(id));
        if let Some((_, span)) = span.filter(|(_, span)| span.events.len() < EVENTS) {
            let at = nanos(telemetry::unix_millis());
            span.events.push(json!({"timeUnixNano": at, "name": name}));
        }
    }

    fn end_task(&mut self, task: &TaskId, how: Result<(), &str>) {
        let leases = self.attempts.keys().filter(|lease| lease.task == *task);
        for lease in leases.cloned().collect::<Vec<_>>() {
            self.end_attempt(&lease, how);
        }
    }

    fn end_worker(&mut self, worker: Incarnation, cause: &str) {
        let leases = self.attempts.keys().filter(|l| l.incarnation == worker);
        for lease in leases.cloned().collect::<Vec<_>>() {
            self.end_attempt(&lease, Err(cause));
        }
    }

    fn end_attempt(&mut self, lease: &Lease, how: Result<(), &str>) {
        if let Some(span) = self.attempts.remove(lease) {
            self.send(span, true, how);
        }
    }

    fn end_group(&mut self, group: &GroupId, how: Result<(), &str>) {
        if let Some(span) = self.groups.remove(group) {
            self.send(span, true, how);
        }
    }

    /// A span that the collector cannot take in time is left out.
    fn send(&self, span: Span, is_child: bool, how: Result<(), &str>) {
        let status = match how {
            Ok(()) => json!({"code": 1}),
            Err(message) => json!({"code": 2, "message": message}),
        };
        let mut value = json!({
            "traceId": self.trace, "spanId": span.id, "name": span.name, "kind": 1,
            "startTimeUnixNano": nanos(span.began),
            "endTimeUnixNano": nanos(telemetry::unix_millis()),
            "attributes": span.attributes, "events": span.events, "status": status,
        });
        if is_child {
            value["parentSpanId"] = json!(self.root.id);
        }
        let _ = self.ended.try_send(value);
    }
}

/// What is still open ends with the coordinator.
impl Drop for Spans {
    fn drop(&mut self) {
        let open = std::mem::take(&mut self.attempts).into_values();
        let open: Vec<_> = open
            .chain(std::mem::take(&mut self.groups).into_values())
            .collect();
        for span in open {
            self.send(span, true, Err("the coordinator ended"));
        }
        self.send(self.root.clone(), false, Ok(()));
    }
}

/// The way to a collector.
#[derive(Debug)]
struct Sender {
    client: reqwest::Client,
    url: String,
    resource: Value,
}

impl Sender {
    /// A way to `url`, which `from` names.
    fn new(
        url: &str,
        from: &str,
        headers: Option<&str>,
        identity: &Identity,
    ) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
        // It may hold a key, and so may whatever an answer points to.
        let parsed = reqwest::Url::parse(url);
        let is_http = parsed.is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
        anyhow::ensure!(
            is_http,
            "{from} is no URL of a collector, such as http://127.0.0.1:4318"
        );
        let mut shown = HeaderMap::new();
        for pair in headers
            .unwrap_or_default()
            .split(',')
            .filter(|p| !p.trim().is_empty())
        {
            // The values are secrets more often than not.
            let wrong = || format!("{HEADERS} is not of the form name=value,name=value");
            let (name, value) = pair.split_once('=').with_context(wrong)?;
            let name = HeaderName::try_from(name.trim()).ok().with_context(wrong)?;
            let mut value = HeaderValue::try_from(value.trim())
                .ok()
                .with_context(wrong)?;
            value.set_sensitive(true);
            shown.insert(name, value);
        }
        cryptography::choose();
        let client = reqwest::Client::builder()
            .timeout(PATIENCE)
            .redirect(reqwest::redirect::Policy::none())
            .default_headers(shown)
            .build()
            .context("no HTTP client for spans can be made")?;
        Ok(Self {
            client,
            url: url.to_owned(),
            resource: json!({"attributes": [
                text("service.name", "distillery-coordinator"),
                text("service.version", env!("CARGO_PKG_VERSION")),
                text("service.instance.id", format!("{}/{}", identity.run_id, identity.term)),
            ]}),
        })
    }

    async fn send_all(self, mut queued: mpsc::Receiver<Value>) {
        let mut told = false;
        loop {
            let mut spans = Vec::new();
            if queued.recv_many(&mut spans, BATCH).await == 0 {
                return;
            }
            let gather = async {
                while spans.len() < BATCH {
                    match queued.recv().await {
                        Some(span) => spans.push(span),
                        None => return,
                    }
                }
            };
            // What has not come by then goes with the next.
            let _ = tokio::time::timeout(EVERY, gather).await;
            let result = self.post(spans).await;
            match (result, told) {
                (Err(error), false) => {
                    tracing::warn!(%error, "spans do not reach the collector; this is told once");
                    told = true;
                }
                (Err(error), true) => tracing::debug!(%error, "spans do not reach the collector"),
                (Ok(()), _) => {}
            }
        }
    }

    async fn post(&self, spans: Vec<Value>) -> Result<(), reqwest::Error> {
        let scope = json!({"name": "distillery", "version": env!("CARGO_PKG_VERSION")});
        let body = json!({"resourceSpans": [{
            "resource": self.resource,
            "scopeSpans": [{"scope": scope, "spans": spans}],
        }]});
        let request = self.client.post(&self.url);
        let request = request.header("content-type", "application/json");
        let sent = request.body(body.to_string()).send().await;
        let answered = sent.and_then(reqwest::Response::error_for_status);
        answered.map(drop).map_err(reqwest::Error::without_url)
    }
}
