//! The tasks of one active stage.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use distillery_common::ids::Incarnation;
use distillery_common::task::{CommitSummary, Lease};

/// Where each task of a stage is. Every index is in exactly one of `pending`, `waiting`, `leased` without
/// `verifying`, `verifying`, `committed` and `quarantined`; a task that is verified may be leased besides.
#[derive(Debug, Clone, Default)]
pub(super) struct Board {
    pub(super) count: u64,
    pub(super) pending: BTreeSet<u64>,
    /// Not before this time.
    pub(super) waiting: BTreeSet<(Duration, u64)>,
    pub(super) leased: BTreeMap<u64, Lease>,
    pub(super) verifying: BTreeMap<u64, Verification>,
    pub(super) committed: BTreeMap<u64, CommitSummary>,
    pub(super) quarantined: BTreeSet<u64>,
    /// Number of the last attempt.
    attempts: BTreeMap<u64, u32>,
    /// Failures that did not count.
    pub(super) free_failures: BTreeMap<u64, u32>,
}

/// A COMMIT that was reported and is being read.
#[derive(Debug, Clone, Default)]
pub(super) struct Verification {
    /// Reports to acknowledge afterwards.
    pub(super) reports: BTreeSet<(Incarnation, u64)>,
    /// Reads that failed so far.
    pub(super) tries: u32,
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

    /// The number that the next attempt at `index` has.
    pub(super) fn next_attempt(&self, index: u64) -> u32 {
        self.attempts.get(&index).map_or(1, |last| last + 1)
    }

    /// Notes that `lease` is held.
    pub(super) fn lease(&mut self, lease: Lease) {
        let index = lease.task.index;
        self.unqueue(index);
        let last = self.attempts.entry(index).or_default();
        *last = (*last).max(lease.attempt);
        self.leased.insert(index, lease);
    }

    /// Whether `lease` is the one that counts.
    pub(super) fn holds(&self, lease: &Lease) -> bool {
        self.leased.get(&lease.task.index) == Some(lease)
    }

    /// Whether `index` waits for somebody to take it.
    pub(super) fn is_open(&self, index: u64) -> bool {
        self.pending.contains(&index) || self.waiting.iter().any(|&(_, waiting)| waiting == index)
    }

    /// Ends `lease`, if it counts; its task is open again unless its COMMIT is being read.
    pub(super) fn release(&mut self, lease: &Lease) -> bool {
        let index = lease.task.index;
        if !self.holds(lease) {
            return false;
        }
        self.leased.remove(&index);
        if !self.verifying.contains_key(&index) {
            self.pending.insert(index);
        }
        true
    }

    /// Keeps `index` from being taken before `until`.
    pub(super) fn postpone(&mut self, index: u64, until: Duration) {
        if self.pending.remove(&index) {
            self.waiting.insert((until, index));
        }
    }

    /// Opens the tasks whose pause has ended.
    pub(super) fn wake(&mut self, now: Duration) {
        while let Some(&(until, index)) = self.waiting.first() {
            if until > now {
                return;
            }
            self.waiting.pop_first();
            self.pending.insert(index);
        }
    }

    /// Notes that the COMMIT of `index` is about to be read; false when that is under way already.
    pub(super) fn verify(&mut self, index: u64, reporter: Incarnation, seq: u64) -> bool {
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
                self.committed.insert(index, commit);
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

    fn unqueue(&mut self, index: u64) {
        if !self.pending.remove(&index) {
            self.waiting.retain(|&(_, waiting)| waiting != index);
        }
    }
}
