//! What has been promised to whom, seen from outside: leases, acknowledgements, and the fold of the journal.
//!
//! Kept from what passes on the wire and lands in the store, never from what a part of the fleet believes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use distillery_common::group::GroupId;
use distillery_common::ids::{Digest, Generation, Term};
use distillery_common::proto::{from_wire, wire};
use distillery_coordinator::plan::{Plan, Work};
use distillery_coordinator::scheduler::{Checkpoint, Durable, Outcome, Record};
use tokio::time::Instant;

use super::world::Pid;

/// A broken promise: its number, and what was seen.
pub(super) type Broken = (&'static str, String);

/// The account of promises.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// The fold of every segment in the store.
    pub(super) fold: Durable,
    pub(super) segments: u64,
    /// Of the last claim that is durable.
    pub(super) highest: Term,
    /// Generations and their base steps by stage, oldest first.
    formed: BTreeMap<String, Vec<(Generation, u64)>>,
    /// Who formed each generation.
    formed_by: BTreeMap<Generation, Term>,
    /// Tasks that were set aside when their stage was sealed.
    pub(super) aside: BTreeMap<String, BTreeSet<u64>>,
    /// COMMITs of tasks by key.
    pub(super) commits: BTreeMap<String, Digest>,
    /// COMMITs of checkpoints that have ever been there, by key.
    pub(super) checkpoints: BTreeMap<String, Digest>,
    agents: BTreeMap<Pid, Agent>,
}

/// What passed between one worker process and coordinators.
#[derive(Debug, Default)]
struct Agent {
    greeted: Option<Instant>,
    /// The highest term of a coordinator that has welcomed it.
    term: u64,
    /// The last welcome was of a lower one: whoever sent it was replaced.
    misled: bool,
    beats: BTreeMap<u64, Instant>,
    renewed: Option<Instant>,
    reports: BTreeMap<u64, wire::report::Report>,
    left: BTreeSet<GroupId>,
    sent: BTreeSet<String>,
}

fn ensure(
    invariant: &'static str,
    holds: bool,
    seen: impl FnOnce() -> String,
) -> Result<(), Broken> {
    if holds {
        Ok(())
    } else {
        Err((invariant, seen()))
    }
}

impl Ledger {
    // ---- workers ------------------------------------------------------------------------------------------

    fn agent(&mut self, pid: Pid) -> &mut Agent {
        self.agents.entry(pid).or_default()
    }

    /// The agent opened a stream at that time.
    pub(super) fn greeted(&mut self, pid: Pid, at: Instant) {
        let agent = self.agent(pid);
        agent.greeted = Some(at);
        agent.misled = false;
    }

    /// The agent said something.
    pub(super) fn said(
        &mut self,
        pid: Pid,
        message: &wire::WorkerMessage,
        now: Instant,
    ) -> Result<(), Broken> {
        use wire::worker_message::Message;
        let agent = self.agent(pid);
        let is_work = matches!(message.message, Some(Message::Beat(_) | Message::Report(_)));
        ensure("I11", !(agent.misled && is_work), || {
            format!(
                "{pid:?} works for a coordinator of a lower term than {}",
                agent.term
            )
        })?;
        match &message.message {
            Some(Message::Beat(beat)) => {
                agent.beats.insert(beat.seq, now);
            }
            Some(Message::Report(report)) => {
                let said = report.report.clone();
                agent.reports.extend(said.map(|said| (report.seq, said)));
            }
            Some(Message::Hello(_) | Message::Goodbye(_)) | None => {}
        }
        Ok(())
    }

    /// A coordinator is about to say something: what it says must be true already.
    pub(super) fn told(
        &mut self,
        pid: Pid,
        message: &wire::CoordinatorMessage,
    ) -> Result<(), Broken> {
        use wire::coordinator_message::Message;
        match &message.message {
            Some(Message::GroupJoin(join)) => {
                let group = from_wire::group_id(join.group.clone()).expect("our own messages");
                let log = self.fold.stage(&group.stage);
                let is_there = |formed: &distillery_coordinator::scheduler::Formed| {
                    formed.generation == group.generation
                };
                ensure("I2", log.generations.iter().any(is_there), || {
                    format!("{pid:?} is told of {group} before it is durable")
                })
            }
            Some(Message::ReportAck(ack)) => {
                let report = self.agent(pid).reports.get(&ack.seq).cloned();
                match report {
                    Some(report) => self.acknowledged(&report),
                    None => Err(("ack", format!("{pid:?} never sent report {}", ack.seq))),
                }
            }
            Some(_) | None => Ok(()),
        }
    }

    /// A report is forgotten by its worker once it is acknowledged, so its effect must be durable.
    fn acknowledged(&self, report: &wire::report::Report) -> Result<(), Broken> {
        use wire::report::Report;
        match report {
            Report::TaskCommitted(said) => {
                let key = said.commit.as_ref().map(|commit| commit.key.clone());
                let is_there = key.is_some_and(|key| self.commits.contains_key(&key));
                ensure("ack", is_there, || format!("{said:?} has no COMMIT"))
            }
            Report::Checkpoint(said) => {
                let said = from_wire::checkpoint_committed(said.clone()).expect("our own messages");
                let group = &said.group;
                let log = self.fold.stage(&group.stage);
                let newer = |known: &Checkpoint| {
                    known.step >= said.step
                        && self.on_lineage(&group.stage, known.step, known.generation)
                };
                let counts = log.checkpoints.iter().any(newer)
                    || log.sealed.is_some()
                    || !self.on_lineage(&group.stage, said.step, group.generation);
                ensure("ack", counts, || {
                    format!("{} is acknowledged, but not durable", said.key)
                })
            }
            Report::GroupFailed(said) => {
                let group = from_wire::group_id(said.group.clone()).expect("our own messages");
                let log = self.fold.stage(&group.stage);
                let last = log.generations.last().map(|formed| formed.generation);
                // After a restart nothing need be recorded: a member that comes back without its group ends it.
                let outlived = self.formed_by.get(&group.generation) < Some(&self.highest);
                let ended = outlived
                    || log.sealed.is_some()
                    || self.fold.outcome.is_some()
                    || last != Some(group.generation)
                    || log.ended == last;
                ensure("ack", ended, || {
                    format!("the end of {group} is acknowledged, but not durable")
                })
            }
            Report::TaskFailed(_) | Report::GroupReady(_) => Ok(()),
        }
    }

    /// A message has reached the agent.
    pub(super) fn heard(&mut self, pid: Pid, message: &wire::CoordinatorMessage) {
        use wire::coordinator_message::Message;
        let agent = self.agent(pid);
        if let Some(Message::Welcome(welcome)) = &message.message {
            agent.misled = welcome.term < agent.term;
            agent.term = agent.term.max(welcome.term);
        }
        let sent = match &message.message {
            Some(Message::BeatAck(ack)) => agent.beats.get(&ack.seq).copied(),
            Some(Message::Welcome(_)) => agent.greeted,
            Some(_) | None => None,
        };
        agent.renewed = agent.renewed.max(sent);
    }

    /// When the leases of the agent end, at the latest that its acknowledged beats allow.
    pub(super) fn expiry(&mut self, pid: Pid, ttl: Duration) -> Option<Instant> {
        self.agent(pid).renewed.map(|renewed| renewed + ttl)
    }

    /// The agent told its engine to leave the group: from now on nothing of it may count by this agent's hand.
    pub(super) fn left(&mut self, pid: Pid, group: GroupId) {
        self.agent(pid).left.insert(group);
    }

    /// The process sends a write of `key`, perhaps again; says whether it is the first time.
    pub(super) fn first_time(&mut self, pid: Pid, key: &str) -> bool {
        self.agent(pid).sent.insert(key.to_owned())
    }

    /// Whether the agent has left the group of that generation.
    pub(super) fn has_left(&mut self, pid: Pid, stage: &str, generation: Generation) -> bool {
        let group = GroupId {
            stage: stage.to_owned(),
            generation,
        };
        self.agent(pid).left.contains(&group)
    }

    // ---- the journal --------------------------------------------------------------------------------------

    /// Whether a checkpoint lies on the line that leads to the newest generation of its stage.
    pub(super) fn on_lineage(&self, stage: &str, step: u64, generation: Generation) -> bool {
        let formed = self.formed.get(stage).map_or(&[][..], Vec::as_slice);
        let Some(at) = formed.iter().position(|&(known, _)| known == generation) else {
            return false;
        };
        step > formed[at].1 && formed[at + 1..].iter().all(|&(_, base)| base >= step)
    }

    /// A segment has landed in the store.
    pub(super) fn segment(
        &mut self,
        plan: &Plan,
        seq: u64,
        term: Term,
        records: &[Record],
    ) -> Result<(), Broken> {
        ensure("I7", seq == self.segments, || {
            format!("segment {seq} follows {} others", self.segments)
        })?;
        self.segments += 1;
        let claims = matches!(records.first(), Some(Record::TermClaimed { .. }));
        ensure(
            "I11",
            term == self.highest || (claims && term > self.highest),
            || {
                format!(
                    "term {term} wrote segment {seq} after term {} had claimed the run",
                    self.highest
                )
            },
        )?;
        self.highest = term;
        for record in records {
            self.record(plan, term, record)?;
            self.fold.apply(record);
        }
        Ok(())
    }

    /// A record is about to be folded in. New kinds of records belong here.
    fn record(&mut self, plan: &Plan, term: Term, record: &Record) -> Result<(), Broken> {
        match record {
            Record::TermClaimed { term: claimed, .. } => ensure("I11", *claimed == term, || {
                format!("term {term} claims {claimed}")
            }),
            Record::GenerationFormed {
                generation,
                stage,
                base_step,
                base,
                ..
            } => self.generation_formed(plan, *generation, stage, *base_step, base.as_deref()),
            Record::CheckpointCommitted { stage, checkpoint } => {
                self.checkpoint_counts(stage, checkpoint)
            }
            Record::StageSealed { stage, digest } => {
                let aside = self.fold.stage(stage).quarantined.clone();
                self.aside.insert(stage.clone(), aside);
                self.sealed(plan, stage, *digest)
            }
            Record::RunFinished(Outcome::Succeeded) => {
                let open = plan
                    .stages
                    .iter()
                    .find(|s| self.fold.stage(&s.name).sealed.is_none());
                ensure("I8", open.is_none(), || {
                    format!("succeeded without {open:?}")
                })
            }
            // Nothing here damages what was written, so no group may be given up for it.
            Record::GenerationFailed { reason, .. } => {
                let damaged = reason.contains("does not hold what it says");
                ensure("I9", !damaged, || reason.clone())
            }
            Record::TaskFailedCounted { .. }
            | Record::Quarantined { .. }
            | Record::StageStarted { .. }
            | Record::GrantsReached { .. }
            | Record::Paused { .. }
            | Record::Resumed
            | Record::RunFinished(_) => Ok(()),
        }
    }

    fn generation_formed(
        &mut self,
        plan: &Plan,
        generation: Generation,
        stage: &str,
        base_step: u64,
        base: Option<&str>,
    ) -> Result<(), Broken> {
        ensure("I2", generation > self.fold.generation, || {
            format!(
                "generation {generation} of {stage} follows {}",
                self.fold.generation
            )
        })?;
        let at = plan.position(stage).expect("a stage of the plan");
        for &input in &plan.stages[at].after {
            let name = &plan.stages[input].name;
            ensure("I8", self.fold.stage(name).sealed.is_some(), || {
                format!("{stage} trains before {name} is sealed")
            })?;
        }
        let log = self.fold.stage(stage);
        let newest = log
            .checkpoints
            .iter()
            .filter(|c| self.on_lineage(stage, c.step, c.generation))
            .max_by_key(|c| (c.step, c.generation));
        let known = (newest.map_or(0, |c| c.step), newest.map(|c| c.key.as_str()));
        ensure("I12", (base_step, base) == known, || {
            format!(
                "generation {generation} of {stage} starts from {base_step} {base:?}, the newest is {known:?}"
            )
        })?;
        self.formed_by.insert(generation, self.highest);
        let formed = self.formed.entry(stage.to_owned()).or_default();
        formed.push((generation, base_step));
        Ok(())
    }

    fn checkpoint_counts(&self, stage: &str, checkpoint: &Checkpoint) -> Result<(), Broken> {
        let key = &checkpoint.key;
        ensure(
            "I9",
            self.checkpoints.get(key) == Some(&checkpoint.digest),
            || format!("{key} counts, but has no such COMMIT"),
        )?;
        ensure(
            "I12",
            self.on_lineage(stage, checkpoint.step, checkpoint.generation),
            || format!("{key} counts, but is on no line to the newest generation"),
        )
    }

    fn sealed(&self, plan: &Plan, stage: &str, digest: Digest) -> Result<(), Broken> {
        let at = plan.position(stage).expect("a stage of the plan");
        let log = self.fold.stage(stage);
        match &plan.stages[at].work {
            Work::Training(_) => {
                let last = log
                    .checkpoints
                    .iter()
                    .find(|c| c.is_final && c.digest == digest);
                ensure("I8", last.is_some(), || {
                    format!("{stage} is sealed without a last checkpoint")
                })
            }
            Work::Tasks(tasks) => {
                let done = self
                    .commits
                    .keys()
                    .filter(|key| {
                        super::objects::task_of(key, plan).is_some_and(|(of, _)| of == at)
                    })
                    .count() as u64;
                let all = done + log.quarantined.len() as u64 >= tasks.count;
                ensure("I1", all, || {
                    format!("{stage} is sealed with {done} of {} COMMITs", tasks.count)
                })
            }
        }
    }
}
