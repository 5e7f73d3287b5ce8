//! Talking to the coordinator that has a run.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use distillery_common::proto::wire;
use distillery_common::proto::wire::coordinator_client::CoordinatorClient;
use distillery_common::security::{Join, ShowToken};
use distillery_common::storage::Store;

use super::TRY_AGAIN;
use crate::journal;
use crate::scheduler::{Durable, Outcome};

/// How long a coordinator may be silent before it counts as gone.
const SILENCE: Duration = Duration::from_secs(5);
/// Between two looks at a run.
const LOOK: Duration = Duration::from_secs(1);

/// A connection to a coordinator.
#[derive(Debug, Clone)]
pub struct Client {
    client: CoordinatorClient<InterceptedService<Channel, ShowToken>>,
}

impl Client {
    /// The coordinator of `join`'s run, if it answers.
    pub async fn find(join: &Join) -> Option<Self> {
        let attempt = async {
            let channel = join.endpoint().ok()?.connect().await.ok()?;
            let client = CoordinatorClient::with_interceptor(channel, ShowToken::new(join.token()));
            let mut client = Self { client };
            let status = client.status().await.ok()?;
            (status.run_id == join.run_id()).then_some(client)
        };
        tokio::time::timeout(SILENCE, attempt).await.ok()?
    }

    /// How the run is.
    pub async fn status(&mut self) -> Result<wire::StatusReply, tonic::Status> {
        let reply = self.client.status(wire::StatusRequest {}).await?;
        Ok(reply.into_inner())
    }

    /// Asks the run to stop.
    pub async fn stop(&mut self, now: bool) -> Result<(), tonic::Status> {
        self.client.stop(wire::StopRequest { now }).await?;
        Ok(())
    }
}

/// Shows a run that another process has, until it ends. Ctrl-C stops the run as it would there.
pub(super) async fn follow(mut client: Client, store: &Store) -> anyhow::Result<ExitCode> {
    let mut interrupted = false;
    let mut shown = String::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {
                let Ok(status) = client.status().await else {
                    break;
                };
                let line = summary(&status);
                if line != shown {
                    eprintln!("{line}");
                    shown = line;
                }
            }
            _ = tokio::signal::ctrl_c() => {
                client.stop(interrupted).await.context("the coordinator does not answer")?;
                interrupted = true;
            }
        }
    }
    let history = journal::read(store).await?;
    match Durable::replay(&history.records).outcome {
        Some(Outcome::Succeeded) => Ok(ExitCode::SUCCESS),
        Some(Outcome::Failed { message }) => {
            eprintln!("error: {message}");
            Ok(ExitCode::FAILURE)
        }
        Some(Outcome::Stopped { .. }) | None => {
            eprintln!("the coordinator is gone; run the same command to resume");
            Ok(ExitCode::from(TRY_AGAIN))
        }
    }
}

fn summary(status: &wire::StatusReply) -> String {
    let stages: Vec<_> = status
        .stages
        .iter()
        .filter(|stage| !["blocked", "sealed"].contains(&stage.state.as_str()))
        .map(|stage| format!("{} {}/{}", stage.name, stage.done, stage.total))
        .collect();
    format!("{}: {}", status.state, stages.join(", "))
}

/// A run for people.
pub fn status_text(status: &wire::StatusReply) -> String {
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
    for worker in &status.workers {
        let _ = writeln!(
            text,
            "  worker {:<12} {:<12} {}",
            worker.name, worker.state, worker.doing
        );
    }
    for decision in status.decisions.iter().rev().take(10).rev() {
        let _ = writeln!(text, "  - {decision}");
    }
    text
}
