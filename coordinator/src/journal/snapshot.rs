//! The stored form of what the journal comes to, so that a restart need not read it from the beginning.
//!
//! A cache: the segments are never deleted during a run, and a snapshot that is damaged or of another version is
//! passed over. Bytes are canonical: equal states have equal bytes. Serde stops here.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use distillery_common::ids::{Digest, Generation, Incarnation, Term};

use super::spent::{Account, StageCost};
use super::stored::{
    StoredCheckpoint, StoredOutcome, checkpoint_from_stored, checkpoint_to_stored,
    outcome_from_stored, outcome_to_stored,
};
use super::{Folded, checked};
use crate::scheduler::{Durable, Formed, StageLog};

const FORMAT_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format_version: u32,
    next: u64,
    term: u64,
    endpoint: String,
    generation: u64,
    stages: BTreeMap<String, StoredStage>,
    paused: Option<String>,
    outcome: Option<StoredOutcome>,
    account: StoredAccount,
    /// None in snapshots of before it was recorded.
    #[serde(default)]
    writer: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredStage {
    started: bool,
    sealed: Option<String>,
    granted_below: u64,
    generations: Vec<StoredFormed>,
    ended: Option<u64>,
    checkpoints: Vec<StoredCheckpoint>,
    fruitless: u32,
    failures: BTreeMap<u64, u32>,
    quarantined: BTreeSet<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredFormed {
    generation: u64,
    base_step: u64,
    base: Option<String>,
    members: Vec<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredAccount {
    lives: u32,
    peak_bytes: Option<u64>,
    has_gaps: bool,
    term: u64,
    earlier_ms: u64,
    elapsed_ms: u64,
    stages: BTreeMap<String, (u64, Option<u64>)>,
}

/// The bytes of a snapshot.
pub(super) fn write(folded: &Folded) -> Bytes {
    let durable = &folded.durable;
    let stored = Stored {
        format_version: FORMAT_VERSION,
        next: folded.next,
        term: durable.term.0,
        endpoint: durable.endpoint.clone(),
        generation: durable.generation.0,
        stages: durable
            .stages
            .iter()
            .map(|(name, log)| (name.clone(), stage_to_stored(log)))
            .collect(),
        paused: durable.paused.clone(),
        outcome: durable.outcome.clone().map(outcome_to_stored),
        account: account_to_stored(&folded.account),
        writer: folded.writer.clone(),
    };
    checked::write(serde_json::to_vec(&stored).expect("text and numbers become JSON"))
}

/// Reads a snapshot.
pub(super) fn parse(bytes: &[u8]) -> Result<Folded, String> {
    let body = checked::read(bytes)?;
    let stored: Stored = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    if stored.format_version != FORMAT_VERSION {
        let found = stored.format_version;
        return Err(format!("it has format version {found}"));
    }
    let stages = stored.stages.into_iter();
    Ok(Folded {
        durable: Durable {
            term: Term(stored.term),
            endpoint: stored.endpoint,
            generation: Generation(stored.generation),
            stages: stages
                .map(|(name, stage)| Ok((name, stage_from_stored(stage)?)))
                .collect::<Result<_, String>>()?,
            paused: stored.paused,
            outcome: stored.outcome.map(outcome_from_stored),
        },
        account: account_from_stored(stored.account),
        writer: stored.writer,
        next: stored.next,
    })
}

fn stage_to_stored(log: &StageLog) -> StoredStage {
    let formed = |formed: &Formed| StoredFormed {
        generation: formed.generation.0,
        base_step: formed.base_step,
        base: formed.base.clone(),
        members: formed.members.iter().map(|member| member.0).collect(),
    };
    StoredStage {
        started: log.started,
        sealed: log.sealed.map(|digest| digest.to_string()),
        granted_below: log.granted_below,
        generations: log.generations.iter().map(formed).collect(),
        ended: log.ended.map(|generation| generation.0),
        checkpoints: log
            .checkpoints
            .iter()
            .cloned()
            .map(checkpoint_to_stored)
            .collect(),
        fruitless: log.fruitless,
        failures: log.failures.clone(),
        quarantined: log.quarantined.clone(),
    }
}

fn stage_from_stored(stage: StoredStage) -> Result<StageLog, String> {
    let formed = |formed: StoredFormed| Formed {
        generation: Generation(formed.generation),
        base_step: formed.base_step,
        base: formed.base,
        members: formed.members.into_iter().map(Incarnation).collect(),
    };
    let digest =
        |text: String| Digest::parse(&text).ok_or_else(|| format!("the digest {text:?} is none"));
    Ok(StageLog {
        started: stage.started,
        sealed: stage.sealed.map(digest).transpose()?,
        granted_below: stage.granted_below,
        generations: stage.generations.into_iter().map(formed).collect(),
        ended: stage.ended.map(Generation),
        checkpoints: stage
            .checkpoints
            .into_iter()
            .map(checkpoint_from_stored)
            .collect::<Result<_, _>>()?,
        fruitless: stage.fruitless,
        failures: stage.failures,
        quarantined: stage.quarantined,
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn account_to_stored(account: &Account) -> StoredAccount {
    let stage = |stage: &StageCost| (millis(stage.counted), stage.since.map(millis));
    StoredAccount {
        lives: account.lives,
        peak_bytes: account.peak_bytes,
        has_gaps: account.has_gaps,
        term: account.term.0,
        earlier_ms: millis(account.earlier),
        elapsed_ms: millis(account.elapsed),
        stages: account
            .stages
            .iter()
            .map(|(name, cost)| (name.clone(), stage(cost)))
            .collect(),
    }
}

fn account_from_stored(account: StoredAccount) -> Account {
    let ms = Duration::from_millis;
    Account {
        lives: account.lives,
        peak_bytes: account.peak_bytes,
        has_gaps: account.has_gaps,
        term: Term(account.term),
        earlier: ms(account.earlier_ms),
        elapsed: ms(account.elapsed_ms),
        stages: account
            .stages
            .into_iter()
            .map(|(name, (counted, since))| {
                let cost = StageCost {
                    counted: ms(counted),
                    since: since.map(ms),
                };
                (name, cost)
            })
            .collect(),
    }
}
