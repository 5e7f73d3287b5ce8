//! The coordinator's memory: create-only numbered segments below `journal/`.
//!
//! Each segment holds records of one term. Taking over a run is creating the next number with a higher term; the
//! old coordinator's next append then meets a number that exists, sees the higher term, and ends. Nothing is ever
//! overwritten, so every store with atomic creation will do. Every thousandth segment is followed by a snapshot of
//! what all of them come to, a cache for the next reader. Must never know what follows from it.

pub(crate) mod checked;
mod snapshot;
mod spent;
mod stored;

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use uuid::Uuid;

use distillery_common::ids::Term;
use distillery_common::storage::layout;
use distillery_common::storage::{self, Created, Store};

use crate::scheduler::{Durable, Record};

pub use spent::{Account, Spent};
use stored::Segment;

/// Segments read at a time.
const READS_IN_FLIGHT: usize = 16;
/// Segments between two snapshots.
const SNAPSHOT_EVERY: u64 = 1000;
/// Times that a claim may be overtaken by another one.
const CLAIMS: u32 = 100;

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another coordinator took the run.
    #[error("another coordinator has taken over this run with term {by}")]
    Fenced {
        /// Its term.
        by: Term,
    },
    /// A segment is not what this program writes.
    #[error("journal segment {seq} is not readable: {reason}")]
    Malformed {
        /// Which.
        seq: u64,
        /// What is wrong.
        reason: String,
    },
    /// A segment is missing before others.
    #[error(
        "journal segment {seq} is missing although later ones exist; it must be restored, or the run started elsewhere"
    )]
    Gap {
        /// Which.
        seq: u64,
    },
    /// There was more than there is.
    #[error(
        "a snapshot says what {snapshot} journal segments come to, of which {found} are there: the last ones are lost; restore them, or start the run elsewhere"
    )]
    LostTail {
        /// How many there were at least.
        snapshot: u64,
        /// How many there are.
        found: u64,
    },
    /// Something else lies among the segments.
    #[error("{key} is no segment of a journal; move it away")]
    Stray {
        /// Where.
        key: String,
    },
    /// Others claimed the run over and over.
    #[error("{CLAIMS} other coordinators claimed this run at the same time")]
    Contended,
    /// The store failed.
    #[error(transparent)]
    Storage(#[from] storage::Error),
}

impl Error {
    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Storage(error) => error.is_transient(),
            Self::Fenced { .. }
            | Self::Malformed { .. }
            | Self::Gap { .. }
            | Self::LostTail { .. }
            | Self::Stray { .. }
            | Self::Contended => false,
        }
    }
}

/// What all segments come to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Folded {
    /// What a coordinator knows after a restart.
    pub durable: Durable,
    /// What the coordinators had spent.
    pub account: Account,
    /// Who claimed the last term; unknown where a snapshot of before it was recorded begins.
    pub writer: Option<String>,
    /// The number of the next segment; zero when nothing was ever written.
    pub next: u64,
}

impl Folded {
    /// Takes one more segment in, if it is the next one of this journal.
    fn add(&mut self, segment: &Segment) -> Result<(), Error> {
        let seq = self.next;
        self.belongs(segment).map_err(|what| Error::Malformed {
            seq,
            reason: format!(
                "{what}; it is of another run or was copied here: move it away and restore the one that belongs there"
            ),
        })?;
        if segment.term > self.durable.term {
            self.writer = Some(segment.writer.clone());
        }
        self.next += 1;
        self.account
            .add(segment.term, segment.spent, &segment.records);
        for record in &segment.records {
            self.durable.apply(record);
        }
        Ok(())
    }

    /// A term begins with its claim and has one writer, and a coordinator that has been fenced cannot append: what is
    /// otherwise was put there by hand.
    fn belongs(&self, segment: &Segment) -> Result<(), String> {
        let (term, last) = (segment.term, self.durable.term);
        if term < last {
            return Err(format!("it has term {term} and comes after term {last}"));
        }
        let claims = matches!(
            segment.records.first(),
            Some(Record::TermClaimed { term: claimed, .. }) if *claimed == term
        );
        if term > last && !claims {
            return Err(format!(
                "it does not begin with the claim of its term {term}"
            ));
        }
        let is_anothers = |writer: &String| *writer != segment.writer;
        if term == last && self.writer.as_ref().is_some_and(is_anothers) {
            let writer = &segment.writer;
            return Err(format!("its writer {writer} did not claim term {term}"));
        }
        Ok(())
    }
}

/// The right to write to one run's journal.
#[derive(Debug)]
pub struct Journal {
    store: Store,
    term: Term,
    writer: String,
    folded: Folded,
    snapshot_every: u64,
}

/// Where the next segment of a journal would be, for whoever wants to know whether another coordinator wrote it.
#[derive(Debug, Clone)]
pub struct Lookout {
    store: Store,
    term: Term,
    next: u64,
}

impl Lookout {
    /// The term of the coordinator that has taken over the run, if one has.
    pub async fn successor(&self) -> Result<Option<Term>, Error> {
        let seq = self.next;
        let Some(bytes) = self.store.find(&layout::journal_segment(seq)).await? else {
            return Ok(None);
        };
        let found = stored::parse(&bytes).map_err(|reason| Error::Malformed { seq, reason })?;
        // One of our own was written since this look began.
        Ok((found.term > self.term).then_some(found.term))
    }
}

/// Reads what was ever written, from the newest snapshot on that is whole.
pub async fn read(store: &Store) -> Result<Folded, Error> {
    let (count, snapshots) = listed(store).await?;
    let mut folded = newest_snapshot(store, &snapshots, count).await?;
    let segments: Vec<_> = stream::iter(folded.next..count)
        .map(|seq| read_segment(store, seq))
        .buffered(READS_IN_FLIGHT)
        .try_collect()
        .await?;
    for segment in segments {
        folded.add(&segment)?;
    }
    Ok(folded)
}

/// Every record from the beginning that counts, oldest first, whatever the snapshots say.
pub async fn records(store: &Store) -> Result<Vec<Record>, Error> {
    let (count, _) = listed(store).await?;
    let segments: Vec<_> = stream::iter(0..count)
        .map(|seq| read_segment(store, seq))
        .buffered(READS_IN_FLIGHT)
        .try_collect()
        .await?;
    let mut folded = Folded::default();
    let mut records = Vec::new();
    for segment in segments {
        folded.add(&segment)?;
        records.extend(segment.records);
    }
    Ok(records)
}

/// How many segments there are, and which snapshots.
async fn listed(store: &Store) -> Result<(u64, Vec<u64>), Error> {
    let listed = store.list(&layout::journal()).await?;
    let (mut segments, mut snapshots) = (BTreeSet::new(), Vec::new());
    for entry in listed {
        if let Some(seq) = layout::parse_journal_segment(&entry.key) {
            segments.insert(seq);
        } else if let Some(seq) = layout::parse_journal_snapshot(&entry.key) {
            snapshots.push(seq);
        } else {
            let key = entry.key.to_string();
            return Err(Error::Stray { key });
        }
    }
    snapshots.sort_unstable();
    Ok((count(store, &segments).await?, snapshots))
}

/// How many segments there are, of which `listed` were seen. Whoever lists a folder while segments are created may see
/// one and miss the one before it: only one that cannot be read either is missing.
async fn count(store: &Store, listed: &BTreeSet<u64>) -> Result<u64, Error> {
    let mut next = 0;
    for &seen in listed {
        while next < seen {
            // The first hole ends this, however far away `seen` is.
            read_segment(store, next).await?;
            next += 1;
        }
        next = seen.saturating_add(1);
    }
    Ok(next)
}

/// The newest snapshot that is whole; nothing where there is none. One that is ahead of the segments was written after
/// they were listed, or they are lost.
async fn newest_snapshot(store: &Store, snapshots: &[u64], count: u64) -> Result<Folded, Error> {
    for &seq in snapshots.iter().rev() {
        let key = layout::journal_snapshot(seq);
        match snapshot::parse(&store.get(&key).await?) {
            Ok(folded) if folded.next == seq => {
                let last = layout::journal_segment(seq.saturating_sub(1));
                if seq > count && store.find(&last).await?.is_none() {
                    return Err(Error::LostTail {
                        snapshot: seq,
                        found: count,
                    });
                }
                return Ok(folded);
            }
            Ok(_) => tracing::warn!(%key, "a snapshot of another place is passed over"),
            Err(reason) => tracing::warn!(%key, reason, "a damaged snapshot is passed over"),
        }
    }
    Ok(Folded::default())
}

/// The term and the records of a segment's bytes, or why they are not readable.
pub fn parse(segment: &[u8]) -> Result<(Term, Vec<Record>), String> {
    let Segment { term, records, .. } = stored::parse(segment)?;
    Ok((term, records))
}

/// How many segments stand before what a snapshot's bytes hold, or why it is passed over.
pub fn parse_snapshot(bytes: &[u8]) -> Result<u64, String> {
    snapshot::parse(bytes).map(|folded| folded.next)
}

async fn read_segment(store: &Store, seq: u64) -> Result<stored::Segment, Error> {
    let found = store.find(&layout::journal_segment(seq)).await?;
    let bytes = found.ok_or(Error::Gap { seq })?;
    stored::parse(&bytes).map_err(|reason| Error::Malformed { seq, reason })
}

impl Journal {
    /// Takes the run: everybody with a lower term can no longer write. `writer` must be unique. `spent` is what
    /// this process has spent so far.
    pub async fn claim(
        store: &Store,
        endpoint: &str,
        writer: Uuid,
        spent: Spent,
    ) -> Result<Self, Error> {
        for _ in 0..CLAIMS {
            let folded = read(store).await?;
            let term = Term(folded.durable.term.0 + 1);
            let claim = Record::TermClaimed {
                term,
                endpoint: endpoint.to_owned(),
            };
            let mut journal = Self {
                store: store.clone(),
                term,
                writer: writer.to_string(),
                folded,
                snapshot_every: SNAPSHOT_EVERY,
            };
            match journal.append(std::slice::from_ref(&claim), spent).await {
                Ok(()) => return Ok(journal),
                Err(Error::Fenced { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Contended)
    }

    /// The same journal, with a snapshot after every `segments` segments, at least one.
    pub fn with_snapshots_every(mut self, segments: u64) -> Self {
        self.snapshot_every = segments.max(1);
        self
    }

    /// What everything durable comes to.
    pub fn durable(&self) -> &Durable {
        &self.folded.durable
    }

    /// Writes a snapshot when it is time. A cache: one that cannot be written is done without.
    async fn take_snapshot(&self) {
        let seq = self.folded.next;
        if !seq.is_multiple_of(self.snapshot_every) {
            return;
        }
        let key = layout::journal_snapshot(seq);
        if let Err(error) = self.store.create(&key, snapshot::write(&self.folded)).await {
            tracing::warn!(%error, "no snapshot of the journal");
        }
    }

    /// The term that was claimed.
    pub fn term(&self) -> Term {
        self.term
    }

    /// A look for a successor that needs nothing of this journal any more.
    pub fn lookout(&self) -> Lookout {
        Lookout {
            store: self.store.clone(),
            term: self.term,
            next: self.folded.next,
        }
    }

    /// Makes `records` durable, all of them or none. After an error that is transient the same call may be
    /// made again, with the same records and the same `spent`.
    pub async fn append(&mut self, records: &[Record], spent: Spent) -> Result<(), Error> {
        if records.is_empty() {
            return Ok(());
        }
        let body = stored::write(self.term, &self.writer, spent, records);
        let seq = self.folded.next;
        let key = layout::journal_segment(seq);
        match self.store.create(&key, Bytes::from(body)).await? {
            Created::Won => {
                self.folded.add(&Segment {
                    term: self.term,
                    writer: self.writer.clone(),
                    spent: Some(spent),
                    records: records.to_vec(),
                })?;
                self.take_snapshot().await;
                Ok(())
            }
            Created::Exists(other) => {
                let other =
                    stored::parse(&other).map_err(|reason| Error::Malformed { seq, reason })?;
                Err(Error::Fenced { by: other.term })
            }
        }
    }
}

#[cfg(test)]
mod tests;
