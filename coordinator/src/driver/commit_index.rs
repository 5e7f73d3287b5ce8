//! The commit index: verified COMMITs of a task stage, many to an object, so that a restart does not read each one.
//!
//! A cache. A part that is damaged is passed over, and what it held is looked for in the store. Serde stops here.

use std::collections::BTreeMap;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde::{Deserialize, Serialize};

use distillery_common::ids::{Digest, Term};
use distillery_common::storage::layout::{self, Prefix};
use distillery_common::storage::{self, Store};
use distillery_common::task::CommitSummary;

use crate::journal::checked;

const FORMAT_VERSION: u32 = 1;
/// Parts read at a time.
const READS_IN_FLIGHT: usize = 16;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format_version: u32,
    /// Index, rows, bytes, digest of the COMMIT.
    commits: Vec<(u64, u64, u64, String)>,
}

/// Writes one part of the index of the stage whose tasks lie in `folder`.
pub(super) async fn write(
    store: &Store,
    folder: &Prefix,
    term: Term,
    part: u64,
    commits: &[(u64, CommitSummary)],
) -> Result<(), storage::Error> {
    let stored = Stored {
        format_version: FORMAT_VERSION,
        commits: commits
            .iter()
            .map(|(index, commit)| (*index, commit.rows, commit.bytes, commit.digest.to_string()))
            .collect(),
    };
    let body = serde_json::to_vec(&stored).expect("text and numbers become JSON");
    let key = layout::commit_index_part(folder, term, part);
    store.create(&key, checked::write(body)).await.map(drop)
}

/// Everything that the parts in `folder` hold; `key_of` spells the key of a task's COMMIT.
pub(super) async fn read(
    store: &Store,
    folder: &Prefix,
    key_of: impl Fn(u64) -> String,
) -> Result<BTreeMap<u64, CommitSummary>, storage::Error> {
    let listed = store.list(&layout::commit_index(folder)).await?;
    let keys: Vec<_> = listed.into_iter().map(|entry| entry.key).collect();
    let mut parts = stream::iter(keys)
        .map(|key| async move { store.get(&key).await.map(|bytes| (key, bytes)) })
        .buffered(READS_IN_FLIGHT);
    let mut commits = BTreeMap::new();
    while let Some((key, bytes)) = parts.try_next().await? {
        match parse(&bytes) {
            Ok(found) => commits.extend(found.into_iter().map(|mut found| {
                found.1.key = key_of(found.0);
                found
            })),
            Err(reason) => {
                tracing::warn!(%key, reason, "a damaged part of the commit index is passed over");
            }
        }
    }
    Ok(commits)
}

/// COMMITs of one part, without their keys, or why it is passed over.
pub fn parse(bytes: &[u8]) -> Result<Vec<(u64, CommitSummary)>, String> {
    let body = checked::read(bytes)?;
    let stored: Stored = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    if stored.format_version != FORMAT_VERSION {
        return Err(format!("it has format version {}", stored.format_version));
    }
    let commits = stored.commits.into_iter();
    commits
        .map(|(index, rows, bytes, digest)| {
            let digest =
                Digest::parse(&digest).ok_or_else(|| format!("the digest {digest:?} is none"))?;
            let commit = CommitSummary {
                key: String::new(),
                rows,
                bytes,
                digest,
            };
            Ok((index, commit))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(index: u64) -> (u64, CommitSummary) {
        let commit = CommitSummary {
            key: format!("k{index}"),
            rows: index,
            bytes: 2 * index,
            digest: Digest::of(&index.to_le_bytes()),
        };
        (index, commit)
    }

    #[tokio::test]
    async fn whole_parts_are_read_back_and_damaged_ones_passed_over() {
        let store = Store::in_memory();
        let folder = layout::dataset("d");
        let key_of = |index| format!("k{index}");
        assert!(
            read(&store, &folder, key_of)
                .await
                .expect("empty")
                .is_empty()
        );
        let (first, second) = ([commit(1), commit(5)], [commit(2)]);
        for (term, part, commits) in [(1, 0, &first[..]), (2, 0, &second)] {
            let written = write(&store, &folder, Term(term), part, commits).await;
            written.expect("a store in memory");
        }
        let damaged = layout::commit_index_part(&folder, Term(2), 1);
        let created = store.create(&damaged, bytes::Bytes::from_static(b"{}\n"));
        created.await.expect("a store in memory");
        let found = read(&store, &folder, key_of).await.expect("readable");
        assert_eq!(found, [commit(1), commit(2), commit(5)].into());
    }
}
