//! What the engines of a group say to each other, without a coordinator: first what state each holds, then each adds
//! its share of a step, and a step comes about when everybody's share has reached everybody.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::time::Instant;

use distillery_common::group::Held;

use super::world::Pid;

/// The share of one rank in one step.
#[derive(Debug, Clone)]
pub(super) struct Share {
    pub(super) rows: Range<u64>,
    pub(super) sum: u64,
    /// State before the step: all ranks must agree.
    pub(super) state: u64,
    /// When it has reached everybody.
    pub(super) arrives: Instant,
}

/// The state that a rank has in memory when the group forms.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hold {
    /// Which; none where it has none that the group may go on from.
    pub(super) held: Option<Held>,
    pub(super) state: u64,
    /// When everybody knows of it.
    pub(super) arrives: Instant,
}

/// One formation of a group.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// Engines by rank.
    pub(super) members: BTreeMap<u32, Pid>,
    holds: BTreeMap<u32, Hold>,
    /// What rank 0 read from the store, since nobody held a state: the step, the state, and when everybody has it.
    pub(super) loaded: Option<(u64, u64, Instant)>,
    shares: BTreeMap<u64, BTreeMap<u32, Share>>,
    stirred: Arc<Notify>,
}

impl Ring {
    /// Something has changed: whoever waits should look again.
    pub(super) fn stir(&self) {
        self.stirred.notify_waiters();
    }

    /// Tells of every change from now on.
    pub(super) fn stirred(&self) -> Arc<Notify> {
        Arc::clone(&self.stirred)
    }

    pub(super) fn hold(&mut self, rank: u32, hold: Hold) {
        self.holds.insert(rank, hold);
        self.stir();
    }

    /// What everybody of `world` holds, in rank order, once everybody has said so.
    pub(super) fn holds(&self, world: u32) -> Option<Vec<Hold>> {
        (self.holds.len() == world as usize).then(|| self.holds.values().copied().collect())
    }

    pub(super) fn add(&mut self, step: u64, rank: u32, share: Share) {
        self.shares.entry(step).or_default().insert(rank, share);
        self.stir();
    }

    /// All shares of a step, once everybody of `world` has given one.
    pub(super) fn complete(&self, step: u64, world: u32) -> Option<&BTreeMap<u32, Share>> {
        let shares = self.shares.get(&step)?;
        (shares.len() == world as usize).then_some(shares)
    }
}
