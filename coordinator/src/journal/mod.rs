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

    /// A folder that is listed while others create in it may show a segment without the one before.
    #[tokio::test]
    async fn a_listing_that_misses_a_segment_is_no_hole() {
        let store = Store::in_memory();
        let mut journal = claim(&store, 1).await;
        for stage in ["x", "y", "z"] {
            journal
                .append(&[started(stage)], SPENT)
                .await
                .expect("ours");
        }
        let seen = |listed: &[u64]| listed.iter().copied().collect::<BTreeSet<u64>>();
        for listed in [&[0, 1, 2, 3][..], &[0, 3], &[3]] {
            assert_eq!(count(&store, &seen(listed)).await.expect("no hole"), 4);
        }
        let hole = count(&store, &seen(&[0, u64::MAX])).await;
        assert!(matches!(hole, Err(Error::Gap { seq: 4 })), "{hole:?}");
    }

    #[tokio::test]
    async fn a_snapshot_of_segments_that_are_gone_is_not_passed_over() {
        let store = Store::in_memory();
        let mut journal = claim(&store, 1).await.with_snapshots_every(3);
        for stage in ["x", "y", "z"] {
            journal
                .append(&[started(stage)], SPENT)
                .await
                .expect("ours");
        }
        assert_eq!(read(&store).await.expect("whole"), journal.folded);
        for seq in [3, 2] {
            let segment = layout::journal_segment(seq);
            store.delete(&segment).await.expect("deleted");
        }
        let lost = read(&store).await.expect_err("two segments were lost");
        let expected = "3 journal segments come to, of which 2 are there";
        assert!(lost.to_string().contains(expected), "{lost}");
    }

    #[tokio::test]
    async fn a_segment_that_somebody_put_there_is_refused_with_what_to_do() {
        let claimed = |term| Record::TermClaimed {
            term: Term(term),
            endpoint: "b:1".into(),
        };
        let foreign = [
            (1, "other", vec![started("y")], "did not claim term 1"),
            (1, "other", vec![claimed(1)], "did not claim term 1"),
            (2, "other", vec![started("y")], "the claim of its term 2"),
            (2, "other", vec![claimed(3)], "the claim of its term 2"),
            (0, "other", vec![], "term 0 and comes after term 1"),
        ];
        for (term, writer, records, says) in foreign {
            let store = Store::in_memory();
            let mut journal = claim(&store, 1).await.with_snapshots_every(2);
            journal.append(&[started("x")], SPENT).await.expect("ours");
            let body = stored::write(Term(term), writer, SPENT, &records);
            let key = layout::journal_segment(2);
            store.create(&key, body.into()).await.expect("created");
            let refused = read(&store).await.expect_err("it is not ours").to_string();
            for part in ["segment 2", says, "move it away"] {
                assert!(refused.contains(part), "{part} is not in {refused}");
            }
        }
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
