//! One verified file, and the fastest way back into it.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::Error;
use super::index::Place;
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

/// A value to read: which it is, and where its bytes go.
#[derive(Debug)]
pub(super) struct Want<'a> {
    pub(super) place: Place,
    /// Row within the file, for messages.
    pub(super) row: usize,
    /// Column, for messages.
    pub(super) part: &'static str,
    pub(super) into: &'a mut [u8],
}

impl Want<'_> {
    fn range(&self) -> Range<u64> {
        self.place.at..self.place.at + self.into.len() as u64
    }
}

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

    /// Fills every want, and checks the hash of each value while it is in the processor's cache. Ranges lie
    /// in the file, as the index has checked.
    ///
    /// A local file is read in place: a hop to another thread would cost more than the read.
    pub(super) async fn read(&self, store: &Store, wants: &mut [Want<'_>]) -> Result<(), Error> {
        match &self.bytes {
            From::Memory(bytes) => {
                for want in wants {
                    let start = usize::try_from(want.place.at).expect("the file is in memory");
                    let end = start + want.into.len();
                    want.into.copy_from_slice(&bytes[start..end]);
                    self.check(want)?;
                }
            }
            From::Disk(file) => {
                for want in wants {
                    file.read_exact_at(want.into, want.place.at)
                        .map_err(|source| io(&self.entry, source))?;
                    self.check(want)?;
                }
            }
            From::Store => {
                let ranges: Vec<_> = wants.iter().map(Want::range).collect();
                let parts = store.get_ranges(&self.entry.key, &ranges).await?;
                for (want, part) in wants.iter_mut().zip(parts) {
                    want.into.copy_from_slice(&part);
                    self.check(want)?;
                }
            }
        }
        Ok(())
    }

    fn check(&self, want: &Want<'_>) -> Result<(), Error> {
        let found = xxh3_64(want.into);
        if found == want.place.xxh3 {
            return Ok(());
        }
        Err(Error::DamagedRow {
            file: self.entry.key.to_string(),
            row: want.row as u64,
            part: want.part,
            expected: want.place.xxh3,
            found,
        })
    }
}

fn io(entry: &FileEntry, source: std::io::Error) -> Error {
    Error::Io {
        file: entry.key.to_string(),
        source,
    }
}
