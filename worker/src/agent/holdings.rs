//! What this agent may work on, and until when. Pure: time is an argument.
//!
//! All leases share one expiry, since one acknowledged beat renews them all: the time to live counted from when
//! that beat was *sent*, so that this side always stops before the coordinator grants a task again.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use distillery_common::group::{self, GroupId, Membership};
use distillery_common::ids::Incarnation;
use distillery_common::task::{self, Lease};
use tokio::time::Instant;

/// Beats that may wait for an acknowledgement; older ones say nothing that a newer one does not.
const BEATS: usize = 64;

/// Leases and group of one device.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    leases: BTreeMap<Lease, (u64, u64)>,
    member: Option<Member>,
    renewed: Option<Instant>,
    ttl: Duration,
    beats: VecDeque<(u64, Instant)>,
}

/// Part in a group.
#[derive(Debug, Clone)]
pub(super) struct Member {
    /// As the coordinator said.
    pub(super) membership: Membership,
    /// As the engine last said.
    pub(super) progress: Option<group::Progress>,
    /// Step at which its present phase began.
    began: Option<u64>,
    /// Whether the stage's last checkpoint was put by this member.
    pub(super) sealed: bool,
}

impl Member {
    /// Whether the engine has nothing more to do for the group: it has applied the stage's last step, and written the
    /// last checkpoint if it is the one who does.
    pub(super) fn is_finished(&self) -> bool {
        let progress = self.progress.as_ref();
        let stepped = progress.is_some_and(|progress| progress.step >= progress.total_steps);
        stepped && (self.sealed || self.membership.rank != 0)
    }
}

impl Holdings {
    /// A coordinator answered a greeting that was sent at `sent`; leases live for `ttl`.
    pub(super) fn welcomed(&mut self, sent: Instant, ttl: Duration) {
        self.ttl = ttl;
        self.beats.clear();
        self.renew(sent);
    }

    /// Beat `seq` was sent at `now`.
    pub(super) fn beat_sent(&mut self, seq: u64, now: Instant) {
        if self.beats.len() == BEATS {
            self.beats.pop_front();
        }
        self.beats.push_back((seq, now));
    }

    /// Beat `seq` was acknowledged: everything held is renewed from when it was sent.
    pub(super) fn beat_acknowledged(&mut self, seq: u64) {
        let sent = self
            .beats
            .iter()
            .find(|(beat, _)| *beat == seq)
            .map(|(_, sent)| *sent);
        self.beats.retain(|(beat, _)| *beat > seq);
        if let Some(sent) = sent {
            self.renew(sent);
        }
    }

    fn renew(&mut self, sent: Instant) {
        self.renewed = self.renewed.max(Some(sent));
    }

    /// When every lease ends unless it is renewed; none while there is none.
    pub(super) fn expiry(&self) -> Option<Instant> {
        let renewed = self.renewed.filter(|_| !self.leases.is_empty());
        renewed.map(|renewed| renewed + self.ttl)
    }

    /// Takes a lease.
    pub(super) fn grant(&mut self, lease: Lease) {
        self.leases.insert(lease, (0, 0));
    }

    /// Lets go of a lease; says whether it was held.
    pub(super) fn release(&mut self, lease: &Lease) -> bool {
        self.leases.remove(lease).is_some()
    }

    /// Whether `lease` is held and has not ended at `now`.
    pub(super) fn is_live(&self, lease: &Lease, now: Instant) -> bool {
        self.leases.contains_key(lease) && self.expiry().is_some_and(|expiry| now < expiry)
    }

    /// Leases that had ended at `now`, let go.
    pub(super) fn take_expired(&mut self, now: Instant) -> Vec<Lease> {
        match self.expiry() {
            Some(expiry) if now >= expiry => self.take_leases(|_| true),
            Some(_) | None => Vec::new(),
        }
    }

    /// Leases of registrations other than `incarnation`, let go.
    pub(super) fn take_foreign(&mut self, incarnation: Incarnation) -> Vec<Lease> {
        self.take_leases(|lease| lease.incarnation != incarnation)
    }

    /// All leases, let go.
    pub(super) fn take_all(&mut self) -> Vec<Lease> {
        self.take_leases(|_| true)
    }

    fn take_leases(&mut self, taken: impl Fn(&Lease) -> bool) -> Vec<Lease> {
        let leases: Vec<Lease> = self
            .leases
            .keys()
            .filter(|lease| taken(lease))
            .cloned()
            .collect();
        for lease in &leases {
            self.leases.remove(lease);
        }
        leases
    }

    /// What is held.
    pub(super) fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.leases.keys()
    }

    /// How far the engine is with `lease`.
    pub(super) fn progressed(&mut self, lease: &Lease, done: u64, total: u64) {
        if let Some(progress) = self.leases.get_mut(lease) {
            *progress = (done, total);
        }
    }

    /// What a beat says of the leases.
    pub(super) fn progress(&self) -> Vec<task::Progress> {
        let progress = |(lease, &(done, total)): (&Lease, &(u64, u64))| task::Progress {
            lease: lease.clone(),
            done,
            total,
        };
        self.leases.iter().map(progress).collect()
    }

    /// Takes part in a group.
    pub(super) fn join(&mut self, membership: Membership) {
        self.member = Some(Member {
            membership,
            progress: None,
            began: None,
            sealed: false,
        });
    }

    /// The part taken in a group.
    pub(super) fn member(&self) -> Option<&Member> {
        self.member.as_ref()
    }

    /// The part taken in `group`, if it is that group.
    pub(super) fn member_of(&mut self, group: &GroupId) -> Option<&mut Member> {
        let member = self.member.as_mut();
        member.filter(|member| member.membership.group == *group)
    }

    /// Notes how far the engine is in its group. Gives back whether that is worth saying at once: another phase, or the
    /// first step of one.
    pub(super) fn progressed_in_group(&mut self, progress: group::Progress) -> bool {
        let Some(member) = self.member_of(&progress.group) else {
            return false;
        };
        let is_news = match &member.progress {
            Some(known) if known.phase == progress.phase => {
                let began = member.began == Some(known.step);
                began && progress.step > known.step
            }
            Some(_) | None => {
                member.began = Some(progress.step);
                true
            }
        };
        member.progress = Some(progress);
        is_news
    }

    /// Leaves the group; says which part it was.
    pub(super) fn leave(&mut self) -> Option<Member> {
        self.member.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use distillery_common::ids::Term;
    use distillery_common::task::TaskId;

    const TTL: Duration = Duration::from_secs(30);

    fn lease(index: u64) -> Lease {
        Lease {
            term: Term(1),
            task: TaskId {
                stage: "trajectories".into(),
                index,
            },
            attempt: 1,
            incarnation: Incarnation::new(Term(1), 1),
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "any instant serves as the origin of a test"
    )]
    fn origin() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_lease_lives_from_when_the_acknowledged_beat_was_sent() {
        let start = origin();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut held = Holdings::default();
        held.welcomed(start, TTL);
        held.grant(lease(1));
        held.beat_sent(1, at(10));
        held.beat_sent(2, at(12));
        held.beat_acknowledged(1);
        assert!(held.is_live(&lease(1), at(39)));
        assert!(
            !held.is_live(&lease(1), at(40)),
            "10 s + 30 s, whenever the answer came"
        );
        assert!(!held.is_live(&lease(2), at(11)), "never held");
        held.beat_acknowledged(2);
        assert_eq!(held.expiry(), Some(at(42)));
        assert_eq!(held.take_expired(at(41)), []);
        assert_eq!(held.take_expired(at(42)), [lease(1)]);
        assert_eq!(held.expiry(), None);
    }

    #[test]
    fn an_old_answer_does_not_shorten_a_lease() {
        let start = origin();
        let mut held = Holdings::default();
        held.welcomed(start, TTL);
        held.grant(lease(1));
        held.beat_sent(1, start + Duration::from_secs(2));
        held.beat_sent(2, start + Duration::from_secs(4));
        held.beat_acknowledged(2);
        held.beat_acknowledged(1);
        assert_eq!(held.expiry(), Some(start + Duration::from_secs(34)));
    }

    #[test]
    fn a_new_registration_ends_the_leases_of_the_old() {
        let mut held = Holdings::default();
        held.welcomed(origin(), TTL);
        let mut newer = lease(2);
        newer.incarnation = Incarnation::new(Term(2), 1);
        held.grant(lease(1));
        held.grant(newer.clone());
        assert_eq!(held.take_foreign(newer.incarnation), [lease(1)]);
        assert_eq!(held.leases().collect::<Vec<_>>(), [&newer]);
    }
}
