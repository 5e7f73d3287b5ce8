//! A run by its URI: what is stored of it, and its coordinator if one answers.

use anyhow::Context as _;

use distillery_common::run::RunRecord;
use distillery_common::storage::{Store, layout};

use super::Access;
use crate::journal;
use crate::scheduler::Durable;
use crate::service::client::{Client, Search};

/// What was found.
#[derive(Debug)]
pub struct Found {
    /// Where it is stored.
    pub store: Store,
    /// What it is.
    pub record: RunRecord,
    /// What its journal comes to.
    pub durable: Durable,
    /// Its coordinator.
    pub coordinator: Search,
}

impl Found {
    /// Its coordinator, if one answers.
    ///
    /// # Errors
    /// When somebody answers who may be it and does not take the token that is known here.
    pub fn client(&mut self) -> anyhow::Result<Option<&mut Client>> {
        match &mut self.coordinator {
            Search::Found(client) => Ok(Some(client)),
            Search::Stranger(why) => {
                anyhow::bail!(
                    "{}; set DISTILLERY_TOKEN to this run's token, or ask where the file `token` is",
                    stranger(&self.durable.endpoint, why)
                )
            }
            Search::Nobody(_) => Ok(None),
        }
    }
}

/// That somebody answers who may be the coordinator, in words.
pub(super) fn stranger(endpoint: &str, why: &str) -> String {
    format!("somebody answers at {endpoint}, where a coordinator has had the run: {why}")
}

/// Looks where the journal says that a coordinator has had the run. `access` is what is known here of its token.
pub(super) async fn search(
    access: Option<&Access>,
    durable: &Durable,
    tls: bool,
) -> anyhow::Result<Search> {
    let endpoint = &durable.endpoint;
    let found = match access {
        _ if endpoint.is_empty() => Search::Nobody("none has had it".to_owned()),
        Some(access) => Client::find(&access.join(endpoint, tls)?).await,
        None => Search::without_token(endpoint).await,
    };
    Ok(match found {
        // The coordinator has ended in order, and somebody else may have its port now.
        Search::Stranger(why) if durable.outcome.is_some() => Search::Nobody(why),
        found => found,
    })
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
    let access = Access::find(&store, &record)?;
    let coordinator = search(access.as_ref(), &durable, tls).await?;
    Ok(Found {
        store,
        record,
        durable,
        coordinator,
    })
}
