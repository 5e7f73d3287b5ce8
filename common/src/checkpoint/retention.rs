//! Which checkpoints may be deleted, and deleting them.

use std::collections::BTreeSet;

use super::Error;
use crate::ids::Generation;
use crate::storage::{Store, layout};

/// A checkpoint's folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Folder {
    /// Steps applied.
    pub step: u64,
    /// Who wrote it.
    pub generation: Generation,
    /// Whether its COMMIT is there.
    pub committed: bool,
}

/// What a stage keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keep {
    /// Newest committed checkpoints that stay.
    pub newest: usize,
    /// Checkpoints that stay because something starts from them: the stage's last, a parent, a base.
    pub pinned: BTreeSet<(u64, Generation)>,
    /// The generation that trains now: its unfinished folders are being written. None once the stage has ended.
    pub live: Option<Generation>,
}

/// The folders that nothing needs any more, oldest first.
///
/// A folder without a COMMIT is an orphan once its generation has ended, since nobody may commit it.
pub fn expired(folders: &[Folder], keep: &Keep) -> Vec<Folder> {
    let mut committed: Vec<_> = folders.iter().filter(|folder| folder.committed).collect();
    committed.sort();
    let newest: BTreeSet<_> = committed.iter().rev().take(keep.newest).collect();
    let mut expired: Vec<Folder> = folders
        .iter()
        .filter(|folder| !keep.pinned.contains(&(folder.step, folder.generation)))
        .filter(|folder| match folder.committed {
            true => !newest.contains(folder),
            false => keep.live.is_none_or(|live| folder.generation < live),
        })
        .copied()
        .collect();
    expired.sort();
    expired
}

/// All checkpoint folders of `stage`, sorted.
pub async fn folders(store: &Store, stage: &str) -> Result<Vec<Folder>, Error> {
    let entries = store.list(&layout::checkpoints(stage)).await?;
    let committed: BTreeSet<_> = entries
        .iter()
        .filter_map(|entry| layout::parse_checkpoint_commit(entry.key.as_str()))
        .map(|(_, step, generation)| (step, generation))
        .collect();
    let all: BTreeSet<_> = entries
        .iter()
        .filter_map(|entry| entry.key.as_str().rsplit('/').nth(1))
        .filter_map(layout::parse_checkpoint_folder)
        .collect();
    Ok(all
        .into_iter()
        .map(|(step, generation)| Folder {
            step,
            generation,
            committed: committed.contains(&(step, generation)),
        })
        .collect())
}

/// Deletes a checkpoint, its COMMIT first: whoever looks meanwhile sees none rather than a broken one.
pub async fn delete(store: &Store, stage: &str, folder: Folder) -> Result<(), Error> {
    let place = layout::checkpoint(stage, folder.step, folder.generation);
    store.delete(&layout::commit(&place)).await?;
    for entry in store.list(&place).await? {
        store.delete(&entry.key).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(step: u64, generation: u64, committed: bool) -> Folder {
        Folder {
            step,
            generation: Generation(generation),
            committed,
        }
    }

    #[test]
    fn the_newest_the_pinned_and_the_unfinished_stay() {
        let folders = [
            folder(100, 1, true),
            folder(200, 1, true),
            folder(200, 2, false),
            folder(300, 2, true),
            folder(400, 2, true),
            folder(500, 3, false),
        ];
        let keep = Keep {
            newest: 2,
            pinned: [(100, Generation(1))].into(),
            live: Some(Generation(3)),
        };
        assert_eq!(
            expired(&folders, &keep),
            [folder(200, 1, true), folder(200, 2, false)]
        );
        let ended = Keep {
            live: None,
            newest: 0,
            ..keep
        };
        assert_eq!(expired(&folders, &ended), folders[1..]);
    }
}
