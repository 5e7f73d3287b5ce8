//! Reports, kept until the coordinator says that their effect is durable.

use std::collections::VecDeque;

use distillery_common::group::{CheckpointCommitted, GroupId};
use distillery_common::task::{CommitSummary, Failure, Lease};

/// What the coordinator must come to know.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Report {
    /// A COMMIT of a task is in the store.
    TaskCommitted {
        /// The attempt.
        lease: Lease,
        /// The COMMIT that counts.
        commit: CommitSummary,
        /// Whether it is this attempt's.
        won: bool,
    },
    /// A task ended without a COMMIT.
    TaskFailed {
        /// The attempt.
        lease: Lease,
        /// Why.
        failure: Failure,
    },
    /// This member listens.
    GroupReady {
        /// Which formation.
        group: GroupId,
        /// Its position.
        rank: u32,
        /// For its peers.
        address: String,
    },
    /// A COMMIT of a checkpoint is in the store.
    CheckpointCommitted(CheckpointCommitted),
    /// This member has left its group.
    GroupFailed {
        /// Which formation.
        group: GroupId,
        /// Its position.
        rank: u32,
        /// Why.
        failure: Failure,
    },
}

/// Reports in the order in which they happened, numbered from 1 over the life of the process. Bounded by the work
/// in hand: a device has one task or one group at a time.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    last: u64,
    waiting: VecDeque<(u64, Report)>,
}

impl Outbox {
    /// Keeps `report` and numbers it.
    pub(super) fn push(&mut self, report: Report) -> u64 {
        self.last += 1;
        self.waiting.push_back((self.last, report));
        self.last
    }

    /// Forgets report `seq`: its effect is durable.
    pub(super) fn acknowledge(&mut self, seq: u64) {
        self.waiting.retain(|(waiting, _)| *waiting != seq);
    }

    /// What has not been acknowledged, oldest first.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &(u64, Report)> {
        self.waiting.iter()
    }

    /// Whether everything has been acknowledged.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use distillery_common::ids::Generation;

    fn ready(rank: u32) -> Report {
        Report::GroupReady {
            group: GroupId {
                stage: "seg4".into(),
                generation: Generation(1),
            },
            rank,
            address: "127.0.0.1:1".into(),
        }
    }

    #[test]
    fn a_report_waits_for_its_own_acknowledgement() {
        let mut outbox = Outbox::default();
        assert_eq!((outbox.push(ready(0)), outbox.push(ready(1))), (1, 2));
        outbox.acknowledge(2);
        outbox.acknowledge(7);
        let waiting: Vec<_> = outbox.waiting().map(|(seq, _)| *seq).collect();
        assert_eq!(waiting, [1]);
        outbox.acknowledge(1);
        assert!(outbox.is_empty());
        assert_eq!(outbox.push(ready(2)), 3, "numbers are never used again");
    }
}
