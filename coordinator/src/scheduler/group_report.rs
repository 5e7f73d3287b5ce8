//! What the members of a group report: where they listen, how far they are, that they cannot go on.

use std::time::Duration;

use distillery_common::group::{Addresses, GroupId, Phase, Progress};
use distillery_common::ids::Incarnation;
use distillery_common::task::{Failure, Remedy};

use super::action::{Action, ToWorker};
use super::decision::Decision;
use super::group::{Group, stepping};
use super::machine::Machine;
use super::stage;

impl Machine {
    /// Position of the stage whose live group is `id`, if `who` is its member of that rank. Nobody speaks for others.
    fn group_of(&self, (who, rank): (Incarnation, u32), id: &GroupId) -> Option<usize> {
        let at = self.live_group(id)?;
        let (_, members) = self.stages[at].group()?.formed()?;
        (members.get(rank as usize) == Some(&who)).then_some(at)
    }

    /// A member listens.
    pub(super) fn group_ready(
        &mut self,
        member: (Incarnation, u32),
        id: &GroupId,
        address: String,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let Some(at) = self.group_of(member, id) else {
            return;
        };
        match self.stages[at].group_mut() {
            Some(Group::Exchanging {
                members, addresses, ..
            }) => {
                addresses[member.1 as usize] = Some(address);
                // Looked at before anything is copied: this is asked once for each member.
                if addresses.iter().any(Option::is_none) {
                    return;
                }
                let all: Addresses = addresses.iter().flatten().cloned().collect();
                let members = members.clone();
                for &member in &members {
                    let peers = ToWorker::GroupPeers {
                        group: id.clone(),
                        addresses: all.clone(),
                    };
                    self.send(member, peers, out);
                }
                out.push(Action::Explain(Decision::Exchanged { group: id.clone() }));
                self.stages[at] =
                    stage::State::Training(stepping(id.clone(), members, Some(all), now));
            }
            Some(Group::Reattaching { .. }) => {
                let reason = "the coordinator restarted while addresses were exchanged";
                self.abort(at, reason, false, now, out);
            }
            Some(Group::Stepping { .. } | Group::Gathering { .. }) | None => {}
        }
    }

    /// A member of a live group said how far it is.
    pub(super) fn group_progress(
        &mut self,
        who: Incarnation,
        said: Progress,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let is_member =
            (self.fleet.get(who)).is_some_and(|w| w.group.as_ref() == Some(&said.group));
        let Some(at) = self.live_group(&said.group).filter(|_| is_member) else {
            return;
        };
        if said.phase == Phase::Exchanging {
            self.repeat_peers(at, who, now, out);
        }
        if let Some(Group::Stepping {
            progress,
            first_step,
            advanced,
            ..
        }) = self.stages[at].group_mut()
        {
            let further = match progress {
                Some(known) => (said.step, said.phase) > (known.step, known.phase),
                None => true,
            };
            if further {
                *advanced = now;
            }
            if said.phase == Phase::Stepping {
                let first = *first_step.get_or_insert(said.step);
                let known = progress.as_ref().map_or(0, |known| known.step);
                if known <= first && said.step > first {
                    out.push(Action::Explain(Decision::Trains {
                        group: said.group.clone(),
                        step: said.step,
                    }));
                }
            }
            if further || progress.as_ref().is_some_and(|p| p.step == said.step) {
                *progress = Some(said);
            }
        }
    }

    /// Tells a member of a group at work again where its peers listen, since it still waits for that: what it was told
    /// may have been lost with its stream. Where they listen is not known of a group that was formed before a restart.
    fn repeat_peers(
        &mut self,
        at: usize,
        member: Incarnation,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let Some(Group::Stepping { id, addresses, .. }) = self.stages[at].group() else {
            return;
        };
        match addresses {
            Some(addresses) => {
                let peers = ToWorker::GroupPeers {
                    group: id.clone(),
                    addresses: addresses.clone(),
                };
                self.send(member, peers, out);
            }
            None => {
                let reason = "the coordinator restarted while addresses were exchanged";
                self.abort(at, reason, false, now, out);
            }
        }
    }

    /// A member cannot go on.
    pub(super) fn group_failed(
        &mut self,
        member: (Incarnation, u32),
        id: &GroupId,
        failure: &Failure,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let Some(at) = self.group_of(member, id) else {
            return;
        };
        let reason = format!("rank {}: {failure}", member.1);
        match failure.class.remedy() {
            Remedy::RetryFree if self.is_stopping() => self.abort(at, &reason, false, now, out),
            Remedy::RetryFree => {
                use distillery_common::task::FailureClass::HostLost;
                let counts = failure.class == HostLost && self.loss_counts(at);
                self.abort(at, &reason, counts, now, out);
            }
            Remedy::RetryCounted => self.abort(at, &reason, true, now, out),
            Remedy::Quarantine | Remedy::FailRun => {
                let below = failure.below();
                self.fail(format!("stage {}: {reason}{below}", id.stage), out);
            }
        }
    }
}
