//! The tasks of one active stage.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use distillery_common::ids::Incarnation;
use distillery_common::task::{CommitSummary, Lease};

/// Lives of attempts that are remembered, for their median.
const REMEMBERED: usize = 255;

/// Where each task of a stage is. Every index is in exactly one of `pending`, `waiting`, `leased` without
/// `verifying`, `verifying`, `committed` and `quarantined`; a task that is verified may be leased besides.
#[derive(Debug, Clone, Default)]
pub(super) struct Board {
    pub(super) count: u64,
    pub(super) pending: BTreeSet<u64>,
    pub(super) waiting: Waiting,
    /// The attempts at each task that is leased: one, or two where the first is a straggler.
    pub(super) leased: BTreeMap<u64, Vec<Attempt>>,
    pub(super) verifying: BTreeMap<u64, Verification>,
    pub(super) committed: BTreeMap<u64, CommitSummary>,
    pub(super) quarantined: BTreeSet<u64>,
    /// Committed tasks that the commit index does not have yet.
    pub(super) unindexed: Vec<u64>,
    /// Parts of the commit index written in this life.
    pub(super) index_parts: u64,
    /// Number of the last attempt at each task without a COMMIT.
    attempts: BTreeMap<u64, u32>,
    /// Failures that did not count.
    pub(super) free_failures: BTreeMap<u64, u32>,
    /// How long the last attempts took that ended in a COMMIT.
    lives: VecDeque<Duration>,
}

/// One lease and when it was granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attempt {
    pub(super) lease: Lease,
    pub(super) since: Duration,
}

/// A COMMIT that was reported and is being read.
#[derive(Debug, Clone, Default)]
pub(super) struct Verification {
    /// Reports to acknowledge afterwards.
    pub(super) reports: BTreeSet<(Incarnation, u64)>,
    /// Reads that failed so far.
    pub(super) tries: u32,
}

/// Tasks that may not be leased before some time, by index and by time.
#[derive(Debug, Clone, Default)]
pub(super) struct Waiting {
    until: BTreeMap<u64, Duration>,
    queue: BTreeSet<(Duration, u64)>,
}

impl Waiting {
    fn insert(&mut self, index: u64, until: Duration) {
        self.remove(index);
        self.until.insert(index, until);
        self.queue.insert((until, index));
    }

    fn remove(&mut self, index: u64) {
        if let Some(until) = self.until.remove(&index) {
            self.queue.remove(&(until, index));
        }
    }

    fn pop_due(&mut self, now: Duration) -> Option<u64> {
        let &(until, index) = self.queue.first()?;
        if until > now {
            return None;
        }
        self.remove(index);
        Some(index)
    }

    pub(super) fn contains(&self, index: u64) -> bool {
        self.until.contains_key(&index)
    }

    /// When the first one may be leased.
    pub(super) fn first(&self) -> Option<Duration> {
        self.queue.first().map(|&(until, _)| until)
    }
}

impl Board {
    pub(super) fn new(
        count: u64,
        committed: BTreeMap<u64, CommitSummary>,
        quarantined: BTreeSet<u64>,
    ) -> Self {
        let pending = (0..count)
            .filter(|index| !committed.contains_key(index) && !quarantined.contains(index))
            .collect();
        Self {
            count,
            pending,
            committed,
            quarantined,
            ..Self::default()
        }
    }

    /// Tasks that nobody has to look at again.
    pub(super) fn done(&self) -> u64 {
        (self.committed.len() + self.quarantined.len()) as u64
    }

    /// The number that the next attempt at `index` has. The last one may be what a worker of an earlier life says.
    pub(super) fn next_attempt(&self, index: u64) -> u32 {
        self.attempts
            .get(&index)
            .map_or(1, |last| last.saturating_add(1))
    }

    /// Notes that `lease` is held since `now`.
    pub(super) fn lease(&mut self, lease: Lease, now: Duration) {
        let index = lease.task.index;
        self.unqueue(index);
        let last = self.attempts.entry(index).or_default();
        *last = (*last).max(lease.attempt);
        let attempts = self.leased.entry(index).or_default();
        attempts.push(Attempt { lease, since: now });
    }

    /// The attempt that `lease` is, if it counts.
    pub(super) fn attempt(&self, lease: &Lease) -> Option<&Attempt> {
        let attempts = self.leased.get(&lease.task.index)?;
        attempts.iter().find(|attempt| attempt.lease == *lease)
    }

    /// Whether `index` waits for somebody to take it.
    pub(super) fn is_open(&self, index: u64) -> bool {
        self.pending.contains(&index) || self.waiting.contains(index)
    }

    /// Ends `lease`, if it counts; its task is open again unless another attempt at it goes on or its COMMIT is
    /// being read.
    pub(super) fn release(&mut self, lease: &Lease) -> bool {
        if !self.drop_lease(lease) {
            return false;
        }
        let index = lease.task.index;
        if !self.leased.contains_key(&index) && !self.verifying.contains_key(&index) {
            self.pending.insert(index);
        }
        true
    }

    /// Ends `lease`, if it counts, and nothing else.
    fn drop_lease(&mut self, lease: &Lease) -> bool {
        let Some(attempts) = self.leased.get_mut(&lease.task.index) else {
            return false;
        };
        let before = attempts.len();
        attempts.retain(|attempt| attempt.lease != *lease);
        let dropped = attempts.len() < before;
        if attempts.is_empty() {
            self.leased.remove(&lease.task.index);
        }
        dropped
    }

    /// Keeps `index` from being taken before `until`.
    pub(super) fn postpone(&mut self, index: u64, until: Duration) {
        if self.pending.remove(&index) {
            self.waiting.insert(index, until);
        }
    }

    /// Opens the tasks whose pause has ended.
    pub(super) fn wake(&mut self, now: Duration) {
        while let Some(index) = self.waiting.pop_due(now) {
            self.pending.insert(index);
        }
    }

    /// Notes that somebody reported a COMMIT by `lease`, which ends if it was its holder, and that it is about to be
    /// read; false when that is under way already.
    pub(super) fn verify(&mut self, lease: &Lease, reporter: Incarnation, seq: u64) -> bool {
        let index = lease.task.index;
        if lease.incarnation == reporter {
            self.drop_lease(lease);
        }
        self.unqueue(index);
        let first = !self.verifying.contains_key(&index);
        let verification = self.verifying.entry(index).or_default();
        verification.reports.insert((reporter, seq));
        first
    }

    /// The COMMIT of `index` was read, and is there or not.
    pub(super) fn verified(&mut self, index: u64, commit: Option<CommitSummary>) -> Verification {
        let verification = self.verifying.remove(&index).unwrap_or_default();
        match commit {
            Some(commit) => {
                self.unqueue(index);
                self.attempts.remove(&index);
                self.free_failures.remove(&index);
                if self.committed.insert(index, commit).is_none() {
                    self.unindexed.push(index);
                }
            }
            None if !self.leased.contains_key(&index) && !self.committed.contains_key(&index) => {
                self.pending.insert(index);
            }
            None => {}
        }
        verification
    }

    /// Sets `index` aside.
    pub(super) fn quarantine(&mut self, index: u64) {
        self.unqueue(index);
        self.quarantined.insert(index);
    }

    /// An attempt that took `life` ended in a COMMIT.
    pub(super) fn lived(&mut self, life: Duration) {
        if self.lives.len() == REMEMBERED {
            self.lives.pop_front();
        }
        self.lives.push_back(life);
    }

    /// The middle of how long the last attempts took.
    pub(super) fn median_life(&self) -> Option<Duration> {
        let mut lives: Vec<_> = self.lives.iter().copied().collect();
        let middle = lives.len() / 2;
        (!lives.is_empty()).then(|| *lives.select_nth_unstable(middle).1)
    }

    fn unqueue(&mut self, index: u64) {
        if !self.pending.remove(&index) {
            self.waiting.remove(index);
        }
    }
}
