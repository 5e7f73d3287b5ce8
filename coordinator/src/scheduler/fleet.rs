//! The workers: who is here, who can take work, who has gone silent.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use distillery_common::group::GroupId;
use distillery_common::ids::Incarnation;
use distillery_common::task::Lease;

use super::event::ConnectionId;

/// One registration.
#[derive(Debug, Clone)]
pub(super) struct Worker {
    pub(super) name: String,
    pub(super) host: String,
    pub(super) device: String,
    /// When it registered, or came back after a restart of this side.
    pub(super) since: Duration,
    pub(super) link: Link,
    /// When it was last heard.
    pub(super) heard: Duration,
    /// It has been silent for so long that it is given nothing new.
    pub(super) suspect: bool,
    /// Tasks it can hold at a time.
    pub(super) slots: u32,
    pub(super) leases: BTreeSet<Lease>,
    pub(super) group: Option<GroupId>,
    /// It was told to leave.
    pub(super) draining: bool,
    /// It has no engine yet that could begin at once: no group waits for it.
    pub(super) starting: bool,
    pub(super) rss_bytes: u64,
    /// Units done and to do of what it works on, for people.
    pub(super) progress: Option<(u64, u64)>,
}

/// Whether a worker can be told something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    /// On this stream.
    Up(ConnectionId),
    /// Its stream ended then; it may come back.
    Down(Duration),
}

/// All registrations that count.
#[derive(Debug, Clone, Default)]
pub(super) struct Fleet {
    workers: BTreeMap<Incarnation, Worker>,
    connections: BTreeMap<ConnectionId, Incarnation>,
    /// Those whose stream has ended, by the time it did.
    down: BTreeSet<(Duration, Incarnation)>,
    /// Those that can take one more task.
    idle: BTreeSet<Incarnation>,
    /// Those that could be members of a group, at once or after what they hold.
    eligible: BTreeSet<Incarnation>,
    /// Registrations of earlier lives that were lost in this one; they must not come back.
    fenced: BTreeSet<Incarnation>,
}

impl Fleet {
    /// The worker of a stream; none for streams that no longer count.
    pub(super) fn at(&self, connection: ConnectionId) -> Option<Incarnation> {
        self.connections.get(&connection).copied()
    }

    pub(super) fn get(&self, incarnation: Incarnation) -> Option<&Worker> {
        self.workers.get(&incarnation)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Incarnation, &Worker)> {
        self.workers.iter().map(|(&i, worker)| (i, worker))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    pub(super) fn is_fenced(&self, incarnation: Incarnation) -> bool {
        self.fenced.contains(&incarnation)
    }

    /// The stream on which `incarnation` can be told something.
    pub(super) fn connection(&self, incarnation: Incarnation) -> Option<ConnectionId> {
        match self.workers.get(&incarnation)?.link {
            Link::Up(connection) => Some(connection),
            Link::Down(_) => None,
        }
    }

    /// Adds a registration.
    pub(super) fn insert(&mut self, incarnation: Incarnation, worker: Worker) {
        if let Link::Up(connection) = worker.link {
            self.connections.insert(connection, incarnation);
        }
        self.workers.insert(incarnation, worker);
        self.refresh(incarnation);
    }

    /// Notes that a worker was heard at `now`; gives back whether it had been suspect.
    pub(super) fn heard(&mut self, incarnation: Incarnation, now: Duration) -> bool {
        let Some(worker) = self.workers.get_mut(&incarnation) else {
            return false;
        };
        worker.heard = now;
        let was_suspect = std::mem::take(&mut worker.suspect);
        if was_suspect {
            self.refresh(incarnation);
        }
        was_suspect
    }

    /// Notes what a worker said of itself, which no index depends on; gives back whether it can take part in a group
    /// now and could not before, or the other way round.
    pub(super) fn note(
        &mut self,
        incarnation: Incarnation,
        rss_bytes: u64,
        progress: Option<(u64, u64)>,
        starting: bool,
    ) -> bool {
        let Some(worker) = self.workers.get_mut(&incarnation) else {
            return false;
        };
        worker.rss_bytes = rss_bytes;
        worker.progress = progress;
        std::mem::replace(&mut worker.starting, starting) != starting
    }

    /// Changes a worker and keeps the indexes true.
    pub(super) fn update(&mut self, incarnation: Incarnation, change: impl FnOnce(&mut Worker)) {
        if let Some(worker) = self.workers.get_mut(&incarnation) {
            change(worker);
            self.refresh(incarnation);
        }
    }

    /// Binds `incarnation` to another stream; gives back the one it had.
    pub(super) fn connect(
        &mut self,
        incarnation: Incarnation,
        connection: ConnectionId,
        now: Duration,
    ) -> Option<ConnectionId> {
        let old = self.connection(incarnation);
        if let Some(old) = old {
            self.connections.remove(&old);
        }
        self.connections.insert(connection, incarnation);
        if let Some(Link::Down(at)) = self.workers.get(&incarnation).map(|w| w.link) {
            self.down.remove(&(at, incarnation));
        }
        self.update(incarnation, |worker| {
            worker.link = Link::Up(connection);
            worker.heard = now;
            worker.suspect = false;
        });
        old
    }

    /// The stream of `incarnation` ended.
    pub(super) fn disconnect(&mut self, connection: ConnectionId, now: Duration) {
        if let Some(incarnation) = self.connections.remove(&connection) {
            self.down.insert((now, incarnation));
            self.update(incarnation, |worker| worker.link = Link::Down(now));
        }
    }

    /// Counts the time without a stream of `incarnation` from `now` on.
    pub(super) fn disconnect_again(&mut self, incarnation: Incarnation, now: Duration) {
        if let Some(worker) = self.workers.get_mut(&incarnation)
            && let Link::Down(at) = worker.link
        {
            worker.link = Link::Down(now);
            self.down.remove(&(at, incarnation));
            self.down.insert((now, incarnation));
        }
    }

    /// Takes `late` from everybody's silence: for so long we did not listen, because this process stood still or its
    /// store did. Whoever is silent is lost later for it, which does no harm.
    pub(super) fn forgive(&mut self, late: Duration, now: Duration) {
        if late.is_zero() {
            return;
        }
        for worker in self.workers.values_mut() {
            worker.heard = now.min(worker.heard + late);
        }
    }

    /// Removes a registration for good.
    pub(super) fn remove(&mut self, incarnation: Incarnation) -> Option<Worker> {
        let worker = self.workers.remove(&incarnation)?;
        match worker.link {
            Link::Up(connection) => {
                self.connections.remove(&connection);
            }
            Link::Down(at) => {
                self.down.remove(&(at, incarnation));
            }
        }
        self.idle.remove(&incarnation);
        self.eligible.remove(&incarnation);
        self.fenced.insert(incarnation);
        Some(worker)
    }

    /// When the first broken stream was broken, and whose it was.
    pub(super) fn first_down(&self) -> Option<(Duration, Incarnation)> {
        self.down.first().copied()
    }

    /// Workers that can take one more task, oldest registration first.
    pub(super) fn idle(&self) -> impl Iterator<Item = Incarnation> + '_ {
        self.idle.iter().copied()
    }

    /// Workers that could be members of a group at once.
    pub(super) fn free(&self) -> impl Iterator<Item = Incarnation> + '_ {
        self.idle.iter().copied().filter(|i| {
            let worker = &self.workers[i];
            worker.leases.is_empty() && !worker.starting
        })
    }

    /// Workers that could be members of a group at once or after what they hold.
    pub(super) fn eligible(&self) -> usize {
        self.eligible.len()
    }

    /// Tasks that all workers together can hold.
    pub(super) fn slots(&self) -> u64 {
        self.workers.values().map(|w| u64::from(w.slots)).sum()
    }

    fn refresh(&mut self, incarnation: Incarnation) {
        let worker = self.workers.get(&incarnation);
        let is_eligible = worker.is_some_and(|worker| !worker.draining && worker.group.is_none());
        let is_idle = worker.is_some_and(|worker| {
            is_eligible
                && matches!(worker.link, Link::Up(_))
                && !worker.suspect
                && (worker.leases.len() as u64) < u64::from(worker.slots)
        });
        for (is_in, index) in [(is_eligible, &mut self.eligible), (is_idle, &mut self.idle)] {
            if is_in {
                index.insert(incarnation);
            } else {
                index.remove(&incarnation);
            }
        }
    }
}
