//! A run by its URI: what is stored of it, and its coordinator if one answers.

use anyhow::Context as _;

use distillery_common::run::RunRecord;
use distillery_common::storage::{Store, layout};

use super::Access;
use crate::journal;
use crate::scheduler::Durable;
use crate::service::client::Client;

/// What was found.
#[derive(Debug)]
pub struct Found {
    /// Where it is stored.
    pub store: Store,
    /// What it is.
    pub record: RunRecord,
    /// What its journal comes to.
    pub durable: Durable,
    /// Its coordinator, if one answers.
    pub client: Option<Client>,
}

/// Finds the run at `uri`.
///
/// # Errors
/// When there is none, or what is stored of it is not readable.
pub async fn find(uri: &str) -> anyhow::Result<Found> {
    let store = Store::open(uri)?;
    let bytes = store
        .find(&layout::run_record())
        .await?
        .with_context(|| format!("there is no run at {}", store.uri()))?;
    let record = RunRecord::from_bytes(&bytes)?;
    let durable = journal::read(&store).await?.durable;
    let tls = record
        .recipe
        .pointer("/cluster/tls")
        .is_none_or(|tls| tls != "off" && tls != false);
    let client = match (Access::find(&store, &record)?, durable.endpoint.as_str()) {
        (None, _) | (_, "") => None,
        (Some(access), endpoint) => Client::find(&access.join(endpoint, tls)?).await,
    };
    Ok(Found {
        store,
        record,
        durable,
        client,
    })
}
