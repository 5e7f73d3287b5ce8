//! What people ask of a run by its URI: told to its coordinator, or, where none answers, written in its journal.

use anyhow::Context as _;

use serde_json::Value;

use super::access::Access;
use super::find::{Found, find};
#[cfg(feature = "kubernetes")]
use crate::console;
use crate::driver::{Clock, unique_id};
use crate::journal::Journal;
use crate::launch::slurm;
use crate::scheduler::{Outcome, Record};
use crate::service::client::Request;

/// Who heard a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// A living coordinator.
    Coordinator,
    /// The journal: whoever takes the run next will know.
    Journal,
}

/// Asks `request` of the run at `uri`.
///
/// # Errors
/// When there is no such run, when it has ended for good, or when only a living coordinator could do it.
pub async fn control(uri: &str, request: Request, clock: Clock) -> anyhow::Result<Heard> {
    let mut found = find(uri).await?;
    if let Some(outcome) = found.durable.outcome.as_ref().filter(|o| o.is_for_good()) {
        anyhow::bail!("the run at {} has ended ({outcome})", found.store.uri());
    }
    if let Some(client) = found.client()? {
        if let Err(status) = client.ask(request).await {
            anyhow::bail!(
                "the coordinator did not take the request: {}",
                status.message()
            );
        }
        return Ok(Heard::Coordinator);
    }
    let record = match request {
        Request::Pause { reason } => Record::Paused { reason },
        Request::Resume => Record::Resumed,
        Request::Cancel { reason } => Record::RunFinished(Outcome::Cancelled { reason }),
        Request::Stop { .. } | Request::Drain { .. } => {
            anyhow::bail!("no coordinator has the run at {}", found.store.uri())
        }
    };
    let is_end = matches!(record, Record::RunFinished(_));
    note(&found, record, clock).await?;
    if is_end {
        end_workers(&found).await.context("the run is cancelled")?;
    }
    Ok(Heard::Journal)
}

/// Ends the workers that a launcher of this run left with its cluster. Those of this host ended with their coordinator, and
/// those that somebody else started are for somebody else to end.
async fn end_workers(found: &Found) -> anyhow::Result<()> {
    let record = &found.record;
    let said = |key: &str| record.recipe.pointer(key).and_then(Value::as_str);
    let run_id = record.run_id.to_string();
    match said("/cluster/launcher") {
        Some("slurm") => {
            // Without it jobs are ended all the same.
            let access = Access::find(&found.store, record).ok().flatten();
            slurm::end_jobs(&run_id, access.as_ref().map(Access::token)).await
        }
        Some("kubernetes") => {
            let namespace = said("/cluster/kubernetes/namespace");
            // Stored as a recipe writes it.
            end_pods(&run_id, namespace.filter(|name| *name != "none")).await
        }
        Some(_) | None => Ok(()),
    }
}

#[cfg(feature = "kubernetes")]
async fn end_pods(run_id: &str, namespace: Option<&str>) -> anyhow::Result<()> {
    let told = crate::launch::kubernetes::end_job(run_id, namespace).await?;
    told.iter().for_each(console::note);
    Ok(())
}

#[cfg(not(feature = "kubernetes"))]
async fn end_pods(run_id: &str, _: Option<&str>) -> anyhow::Result<()> {
    anyhow::bail!(
        "its workers are pods, and this coordinator was built without Kubernetes; `kubectl delete job distillery-{run_id}` ends them"
    )
}

/// Writes one record, as a coordinator that lives for no more than that. One that is alive after all, and only did not
/// answer, is fenced by it and ends.
async fn note(found: &Found, record: Record, clock: Clock) -> anyhow::Result<()> {
    let mut journal = Journal::claim(&found.store, "", unique_id(), clock.spent()).await?;
    let is_known = match &record {
        Record::Paused { .. } => journal.durable().paused.is_some(),
        Record::Resumed => journal.durable().paused.is_none(),
        // A cancellation: an end for good is not followed by another.
        _ => journal
            .durable()
            .outcome
            .as_ref()
            .is_some_and(Outcome::is_for_good),
    };
    if !is_known {
        journal.append(&[record], clock.spent()).await?;
    }
    Ok(())
}
