//! Files that attempts left behind: found by reading what every COMMIT and MANIFEST names, and everything else that is
//! there.
//!
//! An attempt that lost, or died, leaves files that nothing names. Where its task has a COMMIT they can go at once:
//! nobody reads them. Where it has none they may still be committed, so that they must be old, by the store's own
//! clock. Must never delete what a COMMIT or a MANIFEST names, nor decide anything about a run.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};

use distillery_common::checkpoint;
use distillery_common::commit::TaskCommit;
use distillery_common::latents::manifest;
use distillery_common::storage::layout::{self, Key};
use distillery_common::storage::{Entry, Error, Store};

use crate::driver::unique_id;

mod staging;

/// Age from which what an engine printed can go.
const LOG_SECONDS: i64 = 30 * 24 * 3600;
/// COMMITs read, and objects deleted, at a time.
const AT_A_TIME: usize = 32;

/// Why an object is garbage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// Its place has a COMMIT, which does not name it: of an attempt that lost, or an account that is settled.
    Superseded,
    /// Its attempt or generation never committed, and is old.
    Abandoned,
    /// It is a part of a commit index, and the MANIFEST says all of it.
    Sealed,
    /// A check of the store was interrupted.
    Probe,
    /// A write to this disk was interrupted.
    Staging,
    /// It is what an engine printed long ago.
    OldLog,
}

impl Why {
    /// In a few words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Superseded => "beside a COMMIT that does not name them",
            Self::Abandoned => "of attempts that never committed",
            Self::Sealed => "of commit indexes that a MANIFEST has replaced",
            Self::Probe => "of interrupted checks of the store",
            Self::Staging => "of interrupted writes to this disk",
            Self::OldLog => "of what engines printed more than 30 days ago",
        }
    }
}

/// One object that nothing names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Garbage {
    /// Where it is, relative to the run URI.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
    /// Why nobody needs it.
    pub why: Why,
    target: Target,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    /// An object; where it may still be committed, the COMMIT that must still be missing.
    Object(Key, Option<Key>),
    /// A file that the store does not show.
    File(std::path::PathBuf),
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// What can go.
    pub garbage: Vec<Garbage>,
    /// Folders that were left alone because their COMMIT or MANIFEST is not readable, and why.
    pub unreadable: Vec<(String, String)>,
}

/// Looks for garbage; what may still be committed counts once it is `grace_seconds` old. Logs are no garbage until they
/// are old.
pub async fn find(store: &Store, grace_seconds: u64) -> Result<Found, Error> {
    let now = store_time(store).await?;
    let old = now - i64::try_from(grace_seconds).unwrap_or(i64::MAX / 2);
    let mut found = Found::default();
    let sealed = sealed_datasets(store, &mut found).await?;
    for root in [
        layout::trajectories(),
        layout::all_tasks(),
        layout::all_checkpoints(),
    ] {
        let places = by_place(store.list(&root).await?);
        let names: Vec<_> = stream::iter(places.keys().cloned())
            .map(|place| async { named(store, place).await })
            .buffered(AT_A_TIME)
            .try_collect()
            .await?;
        for ((place, entries), named) in places.into_iter().zip(names) {
            match named {
                Ok(named) => sort_out(&place, entries, &named, &sealed, old, &mut found.garbage),
                Err(reason) => found.unreadable.push((place, reason)),
            }
        }
    }
    let probes = store.list(&layout::probes()).await?;
    let probes = probes.into_iter().filter(|entry| entry.modified <= old);
    found
        .garbage
        .extend(probes.map(|entry| object(entry, Why::Probe, None)));
    found.garbage.extend(staging::leftovers(store, old));
    let logs = store.list(&layout::logs()).await?;
    let logs = logs.into_iter().filter(|entry| {
        layout::parse_log_part(&entry.key).is_some() && entry.modified <= now - LOG_SECONDS
    });
    found
        .garbage
        .extend(logs.map(|entry| object(entry, Why::OldLog, None)));
    Ok(found)
}

/// Deletes `garbage`; says how many files were left, because they were committed meanwhile or cannot be deleted.
pub async fn delete(store: &Store, garbage: &[Garbage]) -> Result<usize, Error> {
    let left: Vec<bool> = stream::iter(garbage.iter().cloned())
        .map(|garbage| async move {
            match garbage.target {
                Target::File(path) => Ok(!staging::delete(&path)),
                Target::Object(key, commit) => {
                    let is_committed = match commit {
                        Some(commit) => store.find(&commit).await?.is_some(),
                        None => false,
                    };
                    if !is_committed {
                        store.delete(&key).await?;
                    }
                    Ok(is_committed)
                }
            }
        })
        .buffer_unordered(AT_A_TIME)
        .try_collect()
        .await?;
    Ok(left.into_iter().filter(|&left| left).count())
}

/// The time by the store's clock, in seconds since 1970.
async fn store_time(store: &Store) -> Result<i64, Error> {
    let key = layout::probe(&unique_id().to_string());
    store.put(&key, Bytes::from_static(b"time")).await?;
    let now = store.head(&key).await?.modified;
    store.delete(&key).await?;
    Ok(now)
}

/// Datasets that have a MANIFEST.
async fn sealed_datasets(store: &Store, found: &mut Found) -> Result<BTreeSet<String>, Error> {
    let listed = store.list(&layout::trajectories()).await?;
    let names: BTreeSet<_> = listed
        .iter()
        .filter_map(|entry| entry.key.as_str().split('/').nth(1))
        .map(str::to_owned)
        .collect();
    let mut sealed = BTreeSet::new();
    for name in names {
        let folder = layout::dataset(&name);
        match manifest::find(store, &folder).await {
            Ok(Some(_)) => {
                sealed.insert(folder.as_str().to_owned());
            }
            Ok(None) => {}
            Err(error) => found
                .unreadable
                .push((folder.as_str().to_owned(), error.to_string())),
        }
    }
    Ok(sealed)
}

/// Objects by the folder that one COMMIT decides about: the first three segments of their keys. MANIFESTs, which lie
/// above those, are left out.
fn by_place(entries: Vec<Entry>) -> BTreeMap<String, Vec<Entry>> {
    let mut places: BTreeMap<String, Vec<Entry>> = BTreeMap::new();
    for entry in entries {
        let segments: Vec<_> = entry.key.as_str().split('/').collect();
        if segments.len() > 3 {
            let place = segments[..3].join("/");
            places.entry(place).or_default().push(entry);
        }
    }
    places
}

/// What the COMMIT of a place names, with itself; none where there is no COMMIT.
type Named = Option<BTreeSet<Key>>;

/// Reads the COMMIT of a place. The inner error says why it cannot be understood.
async fn named(store: &Store, place: String) -> Result<Result<Named, String>, Error> {
    let Some(folder) = layout::parse_committed_folder(&place) else {
        return Ok(Ok(None));
    };
    let commit = layout::commit(&folder);
    let Some(bytes) = store.find(&commit).await? else {
        return Ok(Ok(None));
    };
    let files = if place.starts_with(layout::all_checkpoints().as_str()) {
        checkpoint::Manifest::from_bytes(commit.as_str(), &bytes)
            .map(|manifest| manifest.files)
            .map_err(|error| error.to_string())
    } else {
        TaskCommit::from_bytes(&folder, &bytes)
            .map(|commit| commit.files)
            .map_err(|error| error.to_string())
    };
    Ok(files.map(|files| {
        let files = files.into_iter().map(|file| file.key);
        Some(files.chain([commit]).collect())
    }))
}

fn sort_out(
    place: &str,
    entries: Vec<Entry>,
    named: &Named,
    sealed: &BTreeSet<String>,
    old: i64,
    garbage: &mut Vec<Garbage>,
) {
    let commit = layout::parse_committed_folder(place).map(|folder| layout::commit(&folder));
    for entry in entries {
        match (named, &commit) {
            (Some(named), _) if named.contains(&entry.key) => {}
            (Some(_), _) => garbage.push(object(entry, Why::Superseded, None)),
            (None, Some(commit)) if entry.modified <= old => {
                garbage.push(object(entry, Why::Abandoned, Some(commit.clone())));
            }
            (None, Some(_)) => {}
            (None, None) => {
                let dataset = layout::parse_commit_index(place);
                if dataset.is_some_and(|dataset| sealed.contains(dataset)) {
                    garbage.push(object(entry, Why::Sealed, None));
                }
            }
        }
    }
}

fn object(entry: Entry, why: Why, commit: Option<Key>) -> Garbage {
    Garbage {
        name: entry.key.to_string(),
        len: entry.len,
        why,
        target: Target::Object(entry.key, commit),
    }
}
