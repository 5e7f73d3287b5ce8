//! The coordinator's memory: create-only numbered segments below `journal/`.
//!
//! Each segment holds records of one term. Taking over a run is creating the next number with a higher term; the
//! old coordinator's next append then meets a number that exists, sees the higher term, and ends. Nothing is ever
//! overwritten, so every store with atomic creation will do. Must never know what the records lead to.

mod spent;
mod stored;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use uuid::Uuid;

use distillery_common::ids::Term;
use distillery_common::storage::layout;
use distillery_common::storage::{self, Created, Store};

use crate::scheduler::Record;

pub use spent::{Account, Spent};
use stored::Segment;

/// Segments read at a time.
const READS_IN_FLIGHT: usize = 16;
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

/// What was read back.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// Every record that counts, oldest first.
    pub records: Vec<Record>,
    /// The highest term.
    pub term: Term,
    /// The number of the next segment.
    pub next: u64,
    /// What the coordinators had spent at each segment that counts, oldest first.
    pub account: Account,
}

/// The right to write to one run's journal.
#[derive(Debug)]
pub struct Journal {
    store: Store,
    term: Term,
    writer: String,
    next: u64,
}

/// Reads everything that was ever written.
pub async fn read(store: &Store) -> Result<History, Error> {
    let listed = store.list(&layout::journal()).await?;
    let count = listed.len() as u64;
    for (seq, entry) in (0..count).zip(&listed) {
        if entry.key != layout::journal_segment(seq) {
            return Err(Error::Gap { seq });
        }
    }
    let segments: Vec<_> = stream::iter(0..count)
        .map(|seq| read_segment(store, seq))
        .buffered(READS_IN_FLIGHT)
        .try_collect()
        .await?;
    let mut history = History {
        next: count,
        ..History::default()
    };
    for segment in segments {
        // A coordinator that has been fenced cannot append; this guards against foreign tools.
        if segment.term >= history.term {
            history.term = segment.term;
            let Segment { spent, records, .. } = &segment;
            history.account.add(segment.term, *spent, records);
            history.records.extend(segment.records);
        }
    }
    Ok(history)
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
    /// Takes the run: everybody with a lower term can no longer write. `writer` must be unique. Gives back all
    /// records, the new claim being the last. `spent` is what this process has spent so far.
    pub async fn claim(
        store: &Store,
        endpoint: &str,
        writer: Uuid,
        spent: Spent,
    ) -> Result<(Self, Vec<Record>), Error> {
        for _ in 0..CLAIMS {
            let history = read(store).await?;
            let term = Term(history.term.0 + 1);
            let claim = Record::TermClaimed {
                term,
                endpoint: endpoint.to_owned(),
            };
            let mut journal = Self {
                store: store.clone(),
                term,
                writer: writer.to_string(),
                next: history.next,
            };
            match journal.append(std::slice::from_ref(&claim), spent).await {
                Ok(()) => {
                    let mut records = history.records;
                    records.push(claim);
                    return Ok((journal, records));
                }
                Err(Error::Fenced { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Contended)
    }

    /// The term that was claimed.
    pub fn term(&self) -> Term {
        self.term
    }

    /// Makes `records` durable, all of them or none. After an error that is transient the same call may be
    /// made again, with the same records and the same `spent`.
    pub async fn append(&mut self, records: &[Record], spent: Spent) -> Result<(), Error> {
        if records.is_empty() {
            return Ok(());
        }
        let body = stored::write(self.term, &self.writer, spent, records);
        let key = layout::journal_segment(self.next);
        match self.store.create(&key, Bytes::from(body)).await? {
            Created::Won => {
                self.next += 1;
                Ok(())
            }
            Created::Exists(other) => {
                let seq = self.next;
                let other =
                    stored::parse(&other).map_err(|reason| Error::Malformed { seq, reason })?;
                Err(Error::Fenced { by: other.term })
            }
        }
    }
}

#[cfg(test)]
mod tests {
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

    #[tokio::test]
    async fn what_was_appended_is_read_back_in_order() {
        let store = Store::in_memory();
        let (mut journal, records) = Journal::claim(&store, "a:1", Uuid::from_u128(1), SPENT)
            .await
            .expect("an empty run can be claimed");
        assert_eq!(records.len(), 1);
        journal
            .append(&[started("x"), started("y")], SPENT)
            .await
            .expect("nobody else is there");
        journal.append(&[], SPENT).await.expect("nothing to do");
        let history = read(&store).await.expect("readable");
        assert_eq!(history.next, 2);
        assert_eq!(history.records[1..], [started("x"), started("y")]);
    }

    #[tokio::test]
    async fn only_the_higher_term_writes() {
        let store = Store::in_memory();
        let (mut old, _) = Journal::claim(&store, "a:1", Uuid::from_u128(1), SPENT)
            .await
            .expect("free");
        let (mut new, records) = Journal::claim(&store, "b:1", Uuid::from_u128(2), SPENT)
            .await
            .expect("a claim takes over");
        assert_eq!((old.term(), new.term()), (Term(1), Term(2)));
        assert_eq!(records.len(), 2);
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
        let history = read(&store).await.expect("readable");
        assert_eq!(history.records.last(), Some(&started("y")));
        assert!(!history.records.contains(&started("x")));
    }

    #[tokio::test]
    async fn claims_at_the_same_moment_get_different_terms() {
        let store = Store::in_memory();
        let claims = (1..=8).map(|n| {
            let store = store.clone();
            async move {
                let (journal, _) = Journal::claim(&store, "a:1", Uuid::from_u128(n), SPENT).await?;
                Ok::<_, Error>(journal.term())
            }
        });
        let mut terms: Vec<_> = futures::future::try_join_all(claims)
            .await
            .expect("each gets its turn");
        terms.sort();
        assert_eq!(terms, (1..=8).map(Term).collect::<Vec<_>>());
    }
}
