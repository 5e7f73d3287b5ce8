//! What the lives of a run's coordinators cost: wall time, by stage too, and memory. For people; nothing follows from it.
//!
//! Each life counts from the start of its process to the last segment that it wrote, and a resumed run adds its lives.
//! So what a killed life did after its last segment is not counted, nor is the time between two lives.

use std::collections::BTreeMap;
use std::time::Duration;

use distillery_common::ids::Term;

use crate::scheduler::Record;

/// What a coordinator had spent when it wrote a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spent {
    /// Since its process began.
    pub elapsed: Duration,
    /// The most memory that it had at a time, where that is known.
    pub peak_bytes: Option<u64>,
}

/// The sums over all lives of a run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Account {
    /// Coordinators that have had the run.
    pub lives: u32,
    /// The most memory that one of them had at a time, where that is known.
    pub peak_bytes: Option<u64>,
    /// Whether a segment does not say what was spent, so that no sum over time is known.
    pub(super) has_gaps: bool,
    pub(super) term: Term,
    /// Of earlier lives, and of the newest.
    pub(super) earlier: Duration,
    pub(super) elapsed: Duration,
    pub(super) stages: BTreeMap<String, StageCost>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct StageCost {
    /// Of lives that are over, and of work that is.
    pub(super) counted: Duration,
    /// When work began in this life, while it lasts.
    pub(super) since: Option<Duration>,
}

impl Account {
    /// Takes in a segment; they come in order.
    pub fn add(&mut self, term: Term, spent: Option<Spent>, records: &[Record]) {
        let Some(spent) = spent else {
            self.has_gaps = true;
            return;
        };
        if self.lives == 0 || term != self.term {
            self.begin_life(term, spent);
        }
        self.elapsed = spent.elapsed;
        self.peak_bytes = self.peak_bytes.max(spent.peak_bytes);
        for record in records {
            match record {
                Record::StageStarted { stage } => {
                    self.stages.entry(stage.clone()).or_default().since = Some(spent.elapsed);
                }
                Record::StageSealed { stage, .. } => {
                    self.stages
                        .entry(stage.clone())
                        .or_default()
                        .end(spent.elapsed);
                }
                Record::TermClaimed { .. }
                | Record::GrantsReached { .. }
                | Record::Paused { .. }
                | Record::Resumed
                | Record::GenerationFormed { .. }
                | Record::GenerationFailed { .. }
                | Record::CheckpointCommitted { .. }
                | Record::TaskFailedCounted { .. }
                | Record::Quarantined { .. }
                | Record::RunFinished(_) => {}
            }
        }
    }

    /// Ends the life before; what was under way goes on from here.
    fn begin_life(&mut self, term: Term, spent: Spent) {
        for stage in self.stages.values_mut() {
            if stage.since.is_some() {
                stage.end(self.elapsed);
                stage.since = Some(spent.elapsed);
            }
        }
        self.earlier += self.elapsed;
        self.lives += 1;
        self.term = term;
    }

    /// Wall time of all lives, where it is known.
    pub fn wall(&self) -> Option<Duration> {
        (!self.has_gaps && self.lives > 0).then_some(self.earlier + self.elapsed)
    }

    /// Wall time of one stage over all lives, where it is known. Stages that ran at the same time each count it.
    pub fn stage(&self, name: &str) -> Option<Duration> {
        let stage = self.stages.get(name).filter(|_| !self.has_gaps)?;
        let under_way = stage.since.map(|since| self.elapsed.saturating_sub(since));
        Some(stage.counted + under_way.unwrap_or_default())
    }
}

impl StageCost {
    fn end(&mut self, now: Duration) {
        if let Some(since) = self.since.take() {
            self.counted += now.saturating_sub(since);
        }
    }
}

#[cfg(test)]
mod tests {
    use distillery_common::ids::Digest;

    use super::*;

    fn spent(seconds: u64, peak_bytes: u64) -> Option<Spent> {
        Some(Spent {
            elapsed: Duration::from_secs(seconds),
            peak_bytes: Some(peak_bytes),
        })
    }

    fn started(stage: &str) -> Record {
        Record::StageStarted {
            stage: stage.into(),
        }
    }

    fn sealed(stage: &str) -> Record {
        Record::StageSealed {
            stage: stage.into(),
            digest: Digest::of(b""),
        }
    }

    #[test]
    fn the_times_of_lives_add_up_and_the_time_between_them_does_not() {
        let mut account = Account::default();
        account.add(Term(1), spent(1, 10), &[]);
        account.add(Term(1), spent(2, 10), &[started("a")]);
        account.add(
            Term(1),
            spent(12, 30),
            &[sealed("a"), started("b"), started("c")],
        );
        account.add(Term(1), spent(20, 30), &[]);
        // The first life is killed; the second one's clock starts anew.
        account.add(Term(2), spent(3, 20), &[]);
        account.add(Term(2), spent(8, 20), &[sealed("b")]);
        account.add(Term(2), spent(9, 20), &[]);
        let seconds = Duration::from_secs;
        assert_eq!((account.lives, account.peak_bytes), (2, Some(30)));
        assert_eq!(account.wall(), Some(seconds(20 + 9)));
        assert_eq!(account.stage("a"), Some(seconds(10)));
        assert_eq!(account.stage("b"), Some(seconds(8 + 5)));
        assert_eq!(account.stage("c"), Some(seconds(8 + 6)), "not sealed yet");
        assert_eq!(account.stage("d"), None);
    }

    #[test]
    fn a_segment_without_its_time_leaves_no_sum_that_could_be_wrong() {
        let mut account = Account::default();
        account.add(Term(1), None, &[started("a")]);
        account.add(Term(2), spent(5, 10), &[sealed("a")]);
        assert_eq!((account.wall(), account.stage("a")), (None, None));
        assert_eq!(account.peak_bytes, Some(10));
    }
}
