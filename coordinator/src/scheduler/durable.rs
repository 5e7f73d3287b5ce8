//! The fold of all records: what a coordinator knows after a restart.

use std::collections::{BTreeMap, BTreeSet};

use distillery_common::ids::{Digest, Generation, Incarnation, Term};

use super::record::Record;
use super::run::Outcome;

/// Everything durable.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Durable {
    /// Of the coordinator that wrote last.
    pub term: Term,
    /// Where its service answered.
    pub endpoint: String,
    /// The highest generation ever formed.
    pub generation: Generation,
    /// By stage name.
    pub stages: BTreeMap<String, StageLog>,
    /// Why nothing new is begun, if so.
    pub paused: Option<String>,
    /// How the run last ended, if it did since the last term claim; an end for good outlives claims.
    pub outcome: Option<Outcome>,
}

/// Everything durable about one stage.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StageLog {
    /// Whether work on it began.
    pub started: bool,
    /// Digest of its sealed result.
    pub sealed: Option<Digest>,
    /// Tasks from this index on have never been leased.
    pub granted_below: u64,
    /// Its groups, oldest first.
    pub generations: Vec<Formed>,
    /// Generation of the last group if that was given up.
    pub ended: Option<Generation>,
    /// Verified checkpoints, oldest first.
    pub checkpoints: Vec<Checkpoint>,
    /// Counted generations since the last checkpoint.
    pub fruitless: u32,
    /// Counted failures of tasks.
    pub failures: BTreeMap<u64, u32>,
    /// Tasks set aside.
    pub quarantined: BTreeSet<u64>,
}

/// A group that was formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Formed {
    /// Its fencing number.
    pub generation: Generation,
    /// Step it started from.
    pub base_step: u64,
    /// COMMIT it started from.
    pub base: Option<String>,
    /// Its members in rank order.
    pub members: Vec<Incarnation>,
}

/// A checkpoint whose COMMIT was read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Checkpoint {
    /// Steps applied in it.
    pub step: u64,
    /// Who wrote it.
    pub generation: Generation,
    /// Key of its COMMIT.
    pub key: String,
    /// SHA-256 of its COMMIT.
    pub digest: Digest,
    /// Whether it follows the last step.
    pub is_final: bool,
}

/// Of a stage of which nothing is known.
static NEW: StageLog = StageLog {
    started: false,
    sealed: None,
    granted_below: 0,
    generations: Vec::new(),
    ended: None,
    checkpoints: Vec::new(),
    fruitless: 0,
    failures: BTreeMap::new(),
    quarantined: BTreeSet::new(),
};

impl Durable {
    /// The fold of `records`.
    pub fn replay<'a>(records: impl IntoIterator<Item = &'a Record>) -> Self {
        let mut durable = Self::default();
        for record in records {
            durable.apply(record);
        }
        durable
    }

    /// Takes one more record in.
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::TermClaimed { term, endpoint } => {
                self.term = *term;
                self.endpoint.clone_from(endpoint);
                self.reopen();
            }
            Record::StageStarted { stage } => self.stage_mut(stage).started = true,
            Record::StageSealed { stage, digest } => {
                self.stage_mut(stage).sealed = Some(*digest);
            }
            Record::GrantsReached { stage, below } => {
                let log = self.stage_mut(stage);
                log.granted_below = log.granted_below.max(*below);
            }
            Record::GenerationFormed {
                generation,
                stage,
                members,
                base_step,
                base,
            } => {
                self.generation = self.generation.max(*generation);
                self.stage_mut(stage).generations.push(Formed {
                    generation: *generation,
                    base_step: *base_step,
                    base: base.clone(),
                    members: members.clone(),
                });
            }
            Record::GenerationFailed {
                generation,
                stage,
                counted,
                further,
                ..
            } => {
                let log = self.stage_mut(stage);
                log.fruitless = match further {
                    true => 0,
                    false => log.fruitless + u32::from(*counted),
                };
                log.ended = Some(*generation);
            }
            Record::CheckpointCommitted { stage, checkpoint } => {
                let log = self.stage_mut(stage);
                log.fruitless = 0;
                log.checkpoints.push(checkpoint.clone());
            }
            Record::TaskFailedCounted { stage, index, .. } => {
                *self.stage_mut(stage).failures.entry(*index).or_default() += 1;
            }
            Record::Quarantined { stage, index, .. } => {
                self.stage_mut(stage).quarantined.insert(*index);
            }
            Record::Paused { reason } => self.paused = Some(reason.clone()),
            Record::Resumed => self.paused = None,
            Record::RunFinished(outcome) => self.outcome = Some(outcome.clone()),
        }
    }

    /// What is known of `stage`; nothing yet is the default.
    pub fn stage(&self, stage: &str) -> &StageLog {
        self.stages.get(stage).unwrap_or(&NEW)
    }

    /// A new life opens a run that has ended, unless it ended for good. After a failure it starts counting anew: a
    /// person looked at it and asked for another try.
    fn reopen(&mut self) {
        if self.outcome.as_ref().is_some_and(Outcome::is_for_good) {
            return;
        }
        if let Some(Outcome::Failed { .. }) = self.outcome.take() {
            for log in self.stages.values_mut() {
                log.fruitless = 0;
                log.failures.clear();
                log.quarantined.clear();
            }
        }
    }

    fn stage_mut(&mut self, stage: &str) -> &mut StageLog {
        self.stages.entry(stage.to_owned()).or_default()
    }
}

impl StageLog {
    /// Whether `checkpoint` lies on the line that led to the newest generation.
    ///
    /// It does when its generation was formed here, it is beyond that generation's base, and no younger
    /// generation went on from an earlier step.
    pub fn on_lineage(&self, checkpoint: &Checkpoint) -> bool {
        let Some(at) = self
            .generations
            .iter()
            .position(|formed| formed.generation == checkpoint.generation)
        else {
            return false;
        };
        checkpoint.step > self.generations[at].base_step
            && self.generations[at + 1..]
                .iter()
                .all(|younger| younger.base_step >= checkpoint.step)
    }

    /// The newest checkpoint on the lineage, among those known and those found.
    pub fn newest<'a>(&'a self, found: &'a [Checkpoint]) -> Option<&'a Checkpoint> {
        self.checkpoints
            .iter()
            .chain(found)
            .filter(|checkpoint| self.on_lineage(checkpoint))
            .max_by_key(|checkpoint| (checkpoint.step, checkpoint.generation))
    }

    /// Whether `checkpoint` was recorded.
    pub fn has(&self, step: u64, generation: Generation) -> bool {
        self.checkpoints
            .iter()
            .any(|known| known.step == step && known.generation == generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formed(generation: u64, base_step: u64) -> Formed {
        Formed {
            generation: Generation(generation),
            base_step,
            base: None,
            members: vec![],
        }
    }

    fn checkpoint(step: u64, generation: u64) -> Checkpoint {
        Checkpoint {
            step,
            generation: Generation(generation),
            key: String::new(),
            digest: Digest::of(b""),
            is_final: false,
        }
    }

    #[test]
    fn a_zombie_groups_checkpoint_does_not_count() {
        let log = StageLog {
            generations: vec![formed(1, 0), formed(2, 100), formed(5, 200)],
            ..StageLog::default()
        };
        assert!(log.on_lineage(&checkpoint(100, 1)));
        assert!(!log.on_lineage(&checkpoint(150, 1)), "2 went on from 100");
        assert!(log.on_lineage(&checkpoint(200, 2)));
        assert!(
            !log.on_lineage(&checkpoint(250, 3)),
            "3 was never formed here"
        );
        assert!(log.on_lineage(&checkpoint(300, 5)));
        let found = [checkpoint(250, 2), checkpoint(300, 5), checkpoint(150, 1)];
        assert_eq!(log.newest(&found), Some(&found[1]));
    }

    #[test]
    fn another_try_after_a_failure_counts_anew() {
        let claim = |term| Record::TermClaimed {
            term: Term(term),
            endpoint: String::new(),
        };
        let failed = Record::TaskFailedCounted {
            stage: "a".into(),
            index: 3,
            class: distillery_common::task::FailureClass::Io,
            message: String::new(),
        };
        let crashed = Durable::replay([&claim(1), &failed, &claim(2)]);
        assert_eq!(crashed.stage("a").failures[&3], 1);
        let end = Record::RunFinished(Outcome::Failed {
            message: String::new(),
        });
        let asked_again = Durable::replay([&claim(1), &failed, &end, &claim(2)]);
        assert!(asked_again.stage("a").failures.is_empty());
    }
}
