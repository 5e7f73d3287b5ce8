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
            Self::Fenced { .. } | Self::Malformed { .. } | Self::Gap { .. } | Self::Contended => {
                false
            }
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
    /// The number of the next segment; zero when nothing was ever written.
    pub next: u64,
}

impl Folded {
    /// Takes one more segment in.
    fn add(&mut self, term: Term, spent: Option<Spent>, records: &[Record]) {
        self.next += 1;
        // A coordinator that has been fenced cannot append; this guards against foreign tools.
        if term >= self.durable.term {
            self.account.add(term, spent, records);
            for record in records {
                self.durable.apply(record);
            }
        }
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
    for Segment {
        term,
        spent,
        records,
    } in segments
    {
        folded.add(term, spent, &records);
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
    let mut term = Term(0);
    let mut records = Vec::new();
    for segment in segments {
        if segment.term >= term {
            term = segment.term;
            records.extend(segment.records);
        }
    }
    Ok(records)
}

/// How many segments there are, and which snapshots.
async fn listed(store: &Store) -> Result<(u64, Vec<u64>), Error> {
    let listed = store.list(&layout::journal()).await?;
    let snapshot = |entry: &storage::Entry| layout::parse_journal_snapshot(&entry.key);
    let snapshots: Vec<_> = listed.iter().filter_map(snapshot).collect();
    let count = (listed.len() - snapshots.len()) as u64;
    let segments = listed.iter().filter(|entry| snapshot(entry).is_none());
    for (seq, entry) in (0..count).zip(segments) {
        if entry.key != layout::journal_segment(seq) {
            return Err(Error::Gap { seq });
        }
    }
    Ok((count, snapshots))
}

/// The newest snapshot that is whole and not ahead of the segments; nothing where there is none.
async fn newest_snapshot(store: &Store, snapshots: &[u64], count: u64) -> Result<Folded, Error> {
    for &seq in snapshots.iter().rev().filter(|&&seq| seq <= count) {
        let key = layout::journal_snapshot(seq);
        match snapshot::parse(&store.get(&key).await?) {
            Ok(folded) if folded.next == seq => return Ok(folded),
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

async fn read_segment(store: &Store, seq: u64) -> Result<stored::Segment, Error> {
    let bytes = store.get(&layout::journal_segment(seq)).await?;
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
                self.folded.add(self.term, Some(spent), records);
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
mod tests {
    use distillery_common::ids::{Generation, Incarnation};
    use distillery_common::task::FailureClass;

    use super::*;

    const SPENT: Spent = Spent {
        elapsed: std::time::Duration::from_millis(1500),
        peak_bytes: Some(20 << 20),
    };

    fn started(stage: &str) -> Record {
        Record::StageStarted {
            stage: stage.into(),
        }
    }

    async fn claim(store: &Store, writer: u128) -> Journal {
        Journal::claim(store, "a:1", Uuid::from_u128(writer), SPENT)
            .await
            .expect("a run can always be claimed")
    }

    #[tokio::test]
    async fn what_was_appended_is_read_back_in_order() {
        let store = Store::in_memory();
        let mut journal = claim(&store, 1).await;
        assert_eq!(journal.durable().term, Term(1));
        journal
            .append(&[started("x"), started("y")], SPENT)
            .await
            .expect("nobody else is there");
        journal.append(&[], SPENT).await.expect("nothing to do");
        let read = read(&store).await.expect("readable");
        assert_eq!(read, journal.folded);
        assert_eq!(read.next, 2);
        let records = records(&store).await.expect("readable");
        assert_eq!(records[1..], [started("x"), started("y")]);
    }

    #[tokio::test]
    async fn only_the_higher_term_writes() {
        let store = Store::in_memory();
        let mut old = claim(&store, 1).await;
        let mut new = claim(&store, 2).await;
        assert_eq!((old.term(), new.term()), (Term(1), Term(2)));
        let fenced = old
            .append(&[started("x")], SPENT)
            .await
            .expect_err("fenced");
        assert!(matches!(fenced, Error::Fenced { by: Term(2) }), "{fenced}");
        new.append(&[started("y")], SPENT)
            .await
            .expect("it has the run");
        let again = old
            .append(&[started("x")], SPENT)
            .await
            .expect_err("still fenced");
        assert!(matches!(again, Error::Fenced { .. }), "{again}");
        let records = records(&store).await.expect("readable");
        assert_eq!(records.last(), Some(&started("y")));
        assert!(!records.contains(&started("x")));
    }

    #[tokio::test]
    async fn whoever_was_replaced_can_see_it_without_writing() {
        let store = Store::in_memory();
        let mut old = claim(&store, 1).await;
        let look = old.lookout();
        assert_eq!(look.successor().await.expect("readable"), None);
        old.append(&[started("x")], SPENT).await.expect("it has it");
        let own = look.successor().await.expect("readable");
        assert_eq!(own, None, "what it wrote itself meanwhile is no successor");
        let look = old.lookout();
        let new = claim(&store, 2).await;
        assert_eq!(look.successor().await.expect("readable"), Some(new.term()));
        assert_eq!(new.lookout().successor().await.expect("readable"), None);
    }

    #[tokio::test]
    async fn claims_at_the_same_moment_get_different_terms() {
        let store = Store::in_memory();
        let claims = (1..=8).map(|n| {
            let store = store.clone();
            async move { claim(&store, n).await.term() }
        });
        let mut terms = futures::future::join_all(claims).await;
        terms.sort();
        assert_eq!(terms, (1..=8).map(Term).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_snapshot_spares_reading_from_the_beginning_and_changes_nothing() {
        let store = Store::in_memory();
        let mut journal = claim(&store, 1).await;
        for n in 1..SNAPSHOT_EVERY + 10 {
            let stage = format!("s{}", n % 7);
            let records = match n % 3 {
                0 => vec![started(&stage)],
                1 => vec![Record::GenerationFormed {
                    generation: Generation(n),
                    stage,
                    members: vec![Incarnation(n), Incarnation(n + 1)],
                    base_step: n,
                    base: Some(format!("base-{n}")),
                }],
                _ => vec![Record::TaskFailedCounted {
                    stage,
                    index: n,
                    class: FailureClass::Io,
                    message: "slow disk".into(),
                }],
            };
            journal.append(&records, SPENT).await.expect("ours");
        }
        let from_snapshot = read(&store).await.expect("readable");
        assert_eq!(from_snapshot, journal.folded);
        let from_the_beginning = records(&store).await.expect("readable");
        let replayed = Durable::replay(&from_the_beginning);
        assert_eq!(from_snapshot.durable, replayed, "I7");
        let key = layout::journal_snapshot(SNAPSHOT_EVERY);
        let bytes = store.get(&key).await.expect("it is there");
        let parsed = snapshot::parse(&bytes).expect("whole");
        assert_eq!(snapshot::write(&parsed), bytes, "the bytes are canonical");

        let segment = layout::journal_segment(3);
        store.delete(&segment).await.expect("deleted");
        let gap = read(&store).await.expect_err("a hole is a hole");
        assert!(matches!(gap, Error::Gap { seq: 3 }), "{gap}");
    }

    #[tokio::test]
    async fn a_damaged_snapshot_is_passed_over() {
        let store = Store::in_memory();
        let mut journal = claim(&store, 1).await;
        journal.append(&[started("x")], SPENT).await.expect("ours");
        let mut ahead = journal.folded.clone();
        ahead.durable.endpoint = "a lie".into();
        for (seq, bytes) in [
            (0, Bytes::from_static(b"{}")),
            (1, snapshot::write(&ahead)),
            (9, snapshot::write(&ahead)),
        ] {
            let key = layout::journal_snapshot(seq);
            store.create(&key, bytes).await.expect("created");
        }
        let read = read(&store).await.expect("readable");
        assert_eq!(read, journal.folded);
    }
}
