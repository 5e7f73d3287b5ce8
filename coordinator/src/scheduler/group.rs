//! The group of one training stage: gathering members, exchanging addresses, stepping, giving up, trying again.

use std::time::Duration;

use distillery_common::group::{Addresses, GroupId, Membership, Phase, Progress};
use distillery_common::ids::{Generation, Incarnation};

use super::action::{Action, ToWorker};
use super::decision::Decision;
use super::durable::{Checkpoint, Formed};
use super::machine::Machine;
use super::record::Record;
use super::stage;
use crate::plan::{Training, Work};

/// Where a training stage is.
#[derive(Debug, Clone)]
pub(super) enum Group {
    /// No members yet.
    Gathering {
        since: Duration,
        /// When there were first enough members.
        enough: Option<Duration>,
        /// Whether the store was looked at since the last group was given up.
        inspected: bool,
    },
    /// After a restart: the members of the last group may still be at work.
    Reattaching {
        id: GroupId,
        members: Vec<Incarnation>,
        deadline: Duration,
    },
    /// Members were told to join, and report where they listen.
    Exchanging {
        id: GroupId,
        members: Vec<Incarnation>,
        addresses: Vec<Option<String>>,
        deadline: Duration,
    },
    /// Members train, without us.
    Stepping {
        id: GroupId,
        members: Vec<Incarnation>,
        /// Where they listen; not known of a group that outlived the coordinator that formed it.
        addresses: Option<Addresses>,
        progress: Option<Progress>,
        /// First step seen in this generation.
        first_step: Option<u64>,
        /// When the group last got further.
        advanced: Duration,
        /// When it began.
        since: Duration,
    },
}

impl Group {
    pub(super) fn gathering(now: Duration, inspected: bool) -> Self {
        Self::Gathering {
            since: now,
            enough: None,
            inspected,
        }
    }

    /// Takes `late` from what the members are waited for: for so long nobody listened to them.
    pub(super) fn forgive(&mut self, late: Duration, now: Duration) {
        match self {
            Self::Gathering { .. } => {}
            Self::Reattaching { deadline, .. } | Self::Exchanging { deadline, .. } => {
                *deadline += late;
            }
            Self::Stepping { advanced, .. } => *advanced = now.min(*advanced + late),
        }
    }

    /// The formation and its members in rank order, if there is one.
    pub(super) fn formed(&self) -> Option<(&GroupId, &[Incarnation])> {
        match self {
            Self::Gathering { .. } => None,
            Self::Reattaching { id, members, .. }
            | Self::Exchanging { id, members, .. }
            | Self::Stepping { id, members, .. } => Some((id, members)),
        }
    }
}

impl Machine {
    /// Forms a group if enough workers are free. Gives back whether idle workers must be kept for it.
    pub(super) fn gather(
        &mut self,
        at: usize,
        training: &Training,
        now: Duration,
        out: &mut Vec<Action>,
    ) -> bool {
        let free: Vec<_> = self
            .fleet
            .free()
            .take(training.max_world as usize)
            .collect();
        let first_ever = self.durable.generation == Generation(0);
        let patience = if first_ever {
            self.timings.first_formation
        } else {
            self.timings.last_call
        };
        let Some(Group::Gathering {
            since,
            enough,
            inspected,
        }) = self.stages[at].group_mut()
        else {
            return false;
        };
        if free.len() < training.min_world as usize {
            *enough = None;
        } else {
            let enough = *enough.get_or_insert(now);
            // Nobody else can come soon; only at the very beginning others may still be starting.
            let all = free.len() == training.max_world as usize
                || (!first_ever && free.len() == self.fleet.eligible());
            if *inspected && (all || now >= enough + patience) {
                self.form(at, training, free, now, out);
                return false;
            }
        }
        let keep_until = *since + self.timings.keep_for_group;
        self.fleet.eligible() >= training.min_world as usize || now < keep_until
    }

    /// When `group` must be looked at again.
    pub(super) fn group_deadline(&self, group: &Group) -> Option<Duration> {
        match group {
            Group::Gathering { since, enough, .. } => {
                let patience = if self.durable.generation == Generation(0) {
                    self.timings.first_formation
                } else {
                    self.timings.last_call
                };
                let due = match enough {
                    Some(enough) => *enough + patience,
                    None => *since + self.timings.keep_for_group,
                };
                // Once it has passed, the group waits for workers or for what the driver finds, not for time.
                (due > self.ticked).then_some(due)
            }
            Group::Reattaching { deadline, .. } | Group::Exchanging { deadline, .. } => {
                Some(*deadline)
            }
            Group::Stepping { advanced, .. } => Some(*advanced + self.hang_limit(group)),
        }
    }

    fn form(
        &mut self,
        at: usize,
        training: &Training,
        members: Vec<Incarnation>,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let stage = self.plan.stages[at].name.clone();
        let generation = Generation(self.durable.generation.0 + 1);
        let base = self.durable.stage(&stage).newest(&[]).cloned();
        let base_step = base.as_ref().map_or(0, |base| base.step);
        let was = self.world_before(at, training);
        let base_key = base.map(|base| base.key);
        let parent = training.parent.and_then(|parent| self.final_key(parent));
        self.journal(
            Record::GenerationFormed {
                generation,
                stage: stage.clone(),
                members: members.clone(),
                base_step,
                base: base_key.clone(),
            },
            out,
        );
        let id = GroupId { stage, generation };
        let world = members.len() as u32;
        for (rank, &member) in (0..).zip(&members) {
            self.fleet
                .update(member, |worker| worker.group = Some(id.clone()));
            let membership = Membership {
                group: id.clone(),
                rank,
                world,
                base_step,
                base_checkpoint: base_key.clone(),
                parent_checkpoint: parent.clone(),
                term: self.term,
            };
            self.send(member, ToWorker::GroupJoin(membership), out);
        }
        out.push(Action::Explain(Decision::Formed {
            group: id.clone(),
            world,
            base_step,
        }));
        if let Some(was) = was.filter(|&was| was != world && !training.reproducible) {
            let group = id.clone();
            out.push(Action::Explain(Decision::Resized { group, world, was }));
        }
        self.stages[at] = stage::State::Training(Group::Exchanging {
            id,
            addresses: vec![None; members.len()],
            members,
            deadline: now + self.timings.exchange + self.timings.exchange_per_rank * world,
        });
    }

    /// Members of the group that made the state which a group starts from: the one before it, or that of the parent's
    /// student. The order of sums depends on their number, so bits do.
    fn world_before(&self, at: usize, training: &Training) -> Option<u32> {
        let log = self.durable.stage(&self.plan.stages[at].name);
        // Its members may hold a state that is in no checkpoint.
        if let Some(last) = log.generations.last() {
            return u32::try_from(last.members.len()).ok();
        }
        let parent = training.parent?;
        let checkpoint = self.final_checkpoint(parent)?;
        let log = self.durable.stage(&self.plan.stages[parent].name);
        let is_maker = |formed: &&Formed| formed.generation == checkpoint.generation;
        let maker = log.generations.iter().find(is_maker)?;
        u32::try_from(maker.members.len()).ok()
    }

    fn final_checkpoint(&self, at: usize) -> Option<Checkpoint> {
        let log = self.durable.stage(&self.plan.stages[at].name);
        log.checkpoints.iter().rev().find(|c| c.is_final).cloned()
    }

    fn final_key(&self, at: usize) -> Option<String> {
        self.final_checkpoint(at).map(|checkpoint| checkpoint.key)
    }

    /// Gives a group up: everybody in it is told at once, and is free for the next.
    pub(super) fn abort(
        &mut self,
        at: usize,
        reason: &str,
        counted: bool,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let Some((id, members)) = self.stages[at].group().and_then(Group::formed) else {
            return;
        };
        let (id, members) = (id.clone(), members.to_vec());
        let reached = self.reached(at);
        let further = self.went_further(at, reached);
        self.journal(
            Record::GenerationFailed {
                generation: id.generation,
                stage: id.stage.clone(),
                reason: reason.to_owned(),
                counted: counted && !further,
                further,
            },
            out,
        );
        self.release_members(&id, &members, reason, out);
        let fruitless = self.durable.stage(&id.stage).fruitless;
        out.push(Action::Explain(Decision::Aborted {
            group: id.clone(),
            reason: reason.to_owned(),
            reached,
            fruitless,
            with_run: !counted && !self.is_running(),
        }));
        self.stages[at] = stage::State::Training(Group::gathering(now, false));
        if fruitless >= self.timings.fruitless_generations {
            let message = format!(
                "stage {}: {fruitless} groups in a row ended without a new checkpoint; the last one: {reason}",
                id.stage
            );
            self.fail(message, out);
        } else {
            out.push(self.inspection(at, 0));
        }
    }

    /// Notes that a group loses a member that was killed or cut off from outside, and gives back whether that counts by
    /// now. Hosts come and go; but a group that is short of memory looks the same, and must not be tried for ever.
    pub(super) fn loss_counts(&mut self, at: usize) -> bool {
        self.losses[at] += 1;
        self.losses[at] > self.timings.free_failures
    }

    /// Steps that the group of a stage is known to have applied.
    fn reached(&self, at: usize) -> u64 {
        match self.stages[at].group() {
            Some(Group::Stepping {
                progress: Some(progress),
                ..
            }) if progress.phase == Phase::Stepping => progress.step,
            _ => 0,
        }
    }

    /// Whether the group of a stage, which is about to be given up, came further than all before it. What it did
    /// beyond them is in its members' memory, and the next one goes on from there; but a step that kills every group
    /// is not reached twice.
    fn went_further(&mut self, at: usize, reached: u64) -> bool {
        let log = self.durable.stage(&self.plan.stages[at].name);
        let base = log.generations.last().map_or(0, |formed| formed.base_step);
        let before = self.furthest[at].max(base);
        self.furthest[at] = before.max(reached);
        if reached > before {
            self.losses[at] = 0;
        }
        reached > before
    }

    /// At a checkpoint workers that came later join the group, unless it is young: forming anew costs its members a
    /// moment.
    pub(super) fn grow(&mut self, at: usize, now: Duration, out: &mut Vec<Action>) {
        let Work::Training(training) = &self.plan.stages[at].work else {
            return;
        };
        let Some(Group::Stepping { members, since, .. }) = self.stages[at].group() else {
            return;
        };
        let room = (training.max_world as usize).saturating_sub(members.len());
        let joining = self.fleet.free().take(room).count();
        if joining > 0 && now >= *since + self.timings.grow {
            let reason = format!("{joining} more can join");
            self.abort(at, &reason, false, now, out);
        }
    }

    /// Members of a finished group are free, and are told: some may not have seen the end yet. After a restart they
    /// may be back before there is a group again, so the workers are asked and not the group.
    pub(super) fn dissolve(&mut self, at: usize, out: &mut Vec<Action>) {
        let stage = &self.plan.stages[at].name;
        let members: Vec<_> = self
            .fleet
            .iter()
            .filter_map(|(member, worker)| Some((member, worker.group.clone()?)))
            .filter(|(_, id)| id.stage == *stage)
            .collect();
        for (member, id) in members {
            self.release_members(&id, &[member], "the stage is done", out);
        }
    }

    /// Tells every member that still belongs to `id` to leave it.
    pub(super) fn release_members(
        &mut self,
        id: &GroupId,
        members: &[Incarnation],
        reason: &str,
        out: &mut Vec<Action>,
    ) {
        for &member in members {
            let is_in = self
                .fleet
                .get(member)
                .is_some_and(|worker| worker.group.as_ref() == Some(id));
            if is_in {
                self.fleet.update(member, |worker| worker.group = None);
                let abort = ToWorker::GroupAbort {
                    group: id.clone(),
                    reason: reason.to_owned(),
                };
                self.send(member, abort, out);
            }
        }
    }

    /// Position of the stage whose live group is `id`.
    pub(super) fn live_group(&self, id: &GroupId) -> Option<usize> {
        let at = self.plan.position(&id.stage)?;
        let (live, _) = self.stages[at].group()?.formed()?;
        (live == id).then_some(at)
    }

    /// Looks at the deadlines of a group.
    pub(super) fn group_deadlines(&mut self, at: usize, now: Duration, out: &mut Vec<Action>) {
        let Some(group) = self.stages[at].group() else {
            return;
        };
        match group {
            Group::Gathering { .. } => {}
            Group::Reattaching { deadline, .. } if now >= *deadline => {
                self.abort(at, "not all members came back", false, now, out);
            }
            Group::Exchanging {
                deadline,
                members,
                addresses,
                ..
            } if now >= *deadline => {
                let late: Vec<_> = members
                    .iter()
                    .zip(addresses)
                    .filter(|(_, address)| address.is_none())
                    .filter_map(|(&member, _)| Some(self.fleet.get(member)?.name.clone()))
                    .collect();
                let reason = format!("not ready in time: {}", late.join(", "));
                self.abort(at, &reason, true, now, out);
            }
            Group::Stepping {
                advanced, progress, ..
            } if now >= *advanced + self.hang_limit(group) => {
                let step = progress.as_ref().map_or(0, |progress| progress.step);
                let limit = self.hang_limit(group).as_secs();
                let reason = format!("no progress for {limit} s at step {step}");
                self.abort(at, &reason, true, now, out);
            }
            Group::Reattaching { .. } | Group::Exchanging { .. } | Group::Stepping { .. } => {}
        }
    }

    /// How long a group may stand still.
    fn hang_limit(&self, group: &Group) -> Duration {
        let Group::Stepping {
            progress,
            first_step,
            ..
        } = group
        else {
            return Duration::ZERO;
        };
        let Some(progress) = progress else {
            return self.timings.hang * 10;
        };
        let step = Duration::from_secs_f64((progress.step_ms / 1000.0).clamp(0.0, 3600.0));
        let limit = self.timings.hang.max(step * 5);
        let warm = progress.phase == Phase::Stepping
            && first_step.is_some_and(|first| progress.step >= first + 5);
        if warm { limit } else { limit * 10 }
    }
}

/// A group whose members know each other.
pub(super) fn stepping(
    id: GroupId,
    members: Vec<Incarnation>,
    addresses: Option<Addresses>,
    now: Duration,
) -> Group {
    Group::Stepping {
        id,
        members,
        addresses,
        progress: None,
        first_step: None,
        advanced: now,
        since: now,
    }
}
