//! One verified file, and the fastest way back into it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;

use super::Error;
use crate::storage::{FileEntry, Store, get_verified};

/// A file whose digest has been checked.
#[derive(Debug)]
pub(super) struct Source {
    entry: FileEntry,
    bytes: From,
}

#[derive(Debug)]
enum From {
    Memory(Bytes),
    Disk(File),
    Store,
}

/// Bytes to read: where they start, and where they go.
pub(super) type Want<'a> = (u64, &'a mut [u8]);

impl Source {
    /// Reads the file whole, checks its digest, and hands the bytes to `parse`.
    ///
    /// Afterwards the file is read from disk where it is one, kept in memory where `keep` allows, and else
    /// fetched again range by range; the hash of each row is checked then.
    pub(super) async fn open<T>(
        store: &Store,
        entry: &FileEntry,
        keep: impl FnOnce(u64) -> bool,
        parse: impl FnOnce(&Bytes) -> Result<T, String>,
    ) -> Result<(Self, T), Error> {
        let bytes = get_verified(store, entry).await?;
        let parsed = parse(&bytes).map_err(|reason| Error::Format {
            file: entry.key.to_string(),
            reason,
        })?;
        let bytes = match store.local_file(&entry.key) {
            Some(path) => From::Disk(File::open(path).map_err(|source| io(entry, source))?),
            None if keep(entry.len) => From::Memory(bytes),
            None => From::Store,
        };
        Ok((
            Self {
                entry: entry.clone(),
                bytes,
            },
            parsed,
        ))
    }

    pub(super) fn name(&self) -> &str {
        self.entry.key.as_str()
    }

    /// Fills every want. Ranges lie in the file, as the index has checked.
    ///
    /// A local file is read in place: a hop to another thread would cost more than the read.
    pub(super) async fn read(&self, store: &Store, wants: &mut [Want<'_>]) -> Result<(), Error> {
        match &self.bytes {
            From::Memory(bytes) => {
                for (at, into) in wants {
                    let start = usize::try_from(*at).expect("the file is in memory");
                    into.copy_from_slice(&bytes[start..start + into.len()]);
                }
            }
            From::Disk(file) => {
                for (at, into) in wants {
                    file.read_exact_at(into, *at)
                        .map_err(|source| io(&self.entry, source))?;
                }
            }
            From::Store => {
                let ranges: Vec<_> = wants
                    .iter()
                    .map(|(at, into)| *at..*at + into.len() as u64)
                    .collect();
                let parts = store.get_ranges(&self.entry.key, &ranges).await?;
                for ((_, into), part) in wants.iter_mut().zip(parts) {
                    into.copy_from_slice(&part);
                }
            }
        }
        Ok(())
    }
}

fn io(entry: &FileEntry, source: std::io::Error) -> Error {
    Error::Io {
        file: entry.key.to_string(),
        source,
    }
}
