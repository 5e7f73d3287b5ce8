//! The journal: its order, and what must follow what in it (I2, I8, I11, seals, the outcome).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::finding::{Findings, Promise};
use super::plan::Plan;
use super::store::Tree;

/// A record with the segment that holds it.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) seq: u64,
    pub(crate) kind: String,
    pub(crate) value: Value,
}

/// A formation of a group.
#[derive(Debug, Clone)]
pub(crate) struct Formed {
    pub(crate) generation: u64,
    pub(crate) base_step: u64,
    pub(crate) members: u64,
}

/// A checkpoint that the journal knows.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    pub(crate) step: u64,
    pub(crate) generation: u64,
    pub(crate) key: String,
    pub(crate) digest: String,
    pub(crate) is_final: bool,
}

/// Everything in the journal, in order.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    /// (seq, term, writer) of each segment.
    segments: Vec<(u64, u64, String)>,
    pub(crate) records: Vec<Record>,
}

impl Journal {
    pub(crate) async fn read(tree: &Tree, findings: &mut Findings) -> anyhow::Result<Self> {
        // Snapshots are caches of what the segments say.
        let segments = tree.below("journal/");
        let segments = segments.filter(|(_, name)| !name.starts_with("snapshot-"));
        let keys: Vec<String> = segments.map(|(key, _)| key.into()).collect();
        let mut journal = Self::default();
        let found = tree.jsons(&keys).await;
        for (seq, (key, found)) in (0u64..).zip(keys.iter().zip(found)) {
            findings.expect(
                Promise::Journal,
                *key == format!("journal/{seq:020}"),
                || format!("{key} stands where segment {seq} must be"),
            );
            match found {
                Ok((value, _)) => journal.push(seq, &value, findings),
                Err(error) => findings.violated(Promise::Journal, format!("{error:#}")),
            }
        }
        findings.expect(Promise::Journal, !keys.is_empty(), || "no segment".into());
        Ok(journal)
    }

    fn push(&mut self, seq: u64, value: &Value, findings: &mut Findings) {
        let records = value["records"].as_array().filter(|list| !list.is_empty());
        let fields = (value["term"].as_u64(), value["writer"].as_str(), records);
        let (Some(term), Some(writer), Some(records)) = fields else {
            findings.violated(Promise::Journal, format!("segment {seq} is none: {value}"));
            return;
        };
        findings.expect(Promise::Journal, value["format_version"] == 1, || {
            format!("segment {seq} has another format version")
        });
        self.segments.push((seq, term, writer.into()));
        for record in records {
            self.records.push(Record {
                seq,
                kind: record["record"].as_str().unwrap_or_default().into(),
                value: record.clone(),
            });
        }
    }

    /// What holds at any time.
    pub(crate) fn check(&self, plan: &Plan, findings: &mut Findings) {
        self.check_terms(findings);
        self.check_generations(findings);
        self.check_order(plan, findings);
    }

    /// I2 and I11: each term is claimed once, by one writer, higher than all before it, and owns all until the next.
    fn check_terms(&self, findings: &mut Findings) {
        let mut highest = (0, String::new());
        let claims: BTreeMap<u64, u64> = self
            .of_kind("term_claimed")
            .map(|record| (record.seq, number(&record.value, "term")))
            .collect();
        for (seq, term, writer) in &self.segments {
            match claims.get(seq) {
                Some(claimed) => {
                    findings.expect(Promise::I2, *claimed > highest.0, || {
                        format!("segment {seq} claims term {claimed} after {}", highest.0)
                    });
                    findings.expect(Promise::I11, claimed == term, || {
                        format!("segment {seq} of term {term} claims term {claimed}")
                    });
                    if *claimed > highest.0 {
                        highest = (*claimed, writer.clone());
                    }
                }
                None => {
                    findings.expect(Promise::I11, *term == highest.0, || {
                        format!(
                            "segment {seq} of term {term} follows a claim of {}",
                            highest.0
                        )
                    });
                    findings.expect(Promise::I11, *writer == highest.1, || {
                        format!("segment {seq} is of another writer than term {term}'s claim")
                    });
                }
            }
        }
    }

    fn check_generations(&self, findings: &mut Findings) {
        let mut highest = 0;
        for record in self.of_kind("generation_formed") {
            let generation = number(&record.value, "generation");
            let seq = record.seq;
            findings.expect(Promise::I2, generation > highest, || {
                format!("segment {seq} forms generation {generation} after {highest}")
            });
            highest = highest.max(generation);
        }
    }

    /// I8: by the order of records.
    fn check_order(&self, plan: &Plan, findings: &mut Findings) {
        let stages = plan.by_name();
        let (mut started, mut sealed) = (BTreeSet::new(), BTreeSet::new());
        for Record { seq, kind, value } in &self.records {
            let Some(name) = value["stage"].as_str() else {
                continue;
            };
            let Some(stage) = stages.get(name) else {
                findings.violated(Promise::I8, format!("segment {seq}: no stage {name}"));
                continue;
            };
            if kind == "stage_started" {
                for read in stage.reads.iter().filter(|read| !sealed.contains(*read)) {
                    findings.violated(
                        Promise::I8,
                        format!("segment {seq} starts {name} before {read} was sealed"),
                    );
                }
                findings.expect(Promise::I8, started.insert(name.to_owned()), || {
                    format!("segment {seq} starts {name} again")
                });
                continue;
            }
            findings.expect(Promise::I8, started.contains(name), || {
                format!("segment {seq}: {kind} of {name}, which has not started")
            });
            let over = sealed.contains(name);
            if kind == "stage_sealed" {
                sealed.insert(name.to_owned());
                findings.expect(Promise::Sealed, !over, || {
                    format!("segment {seq} seals {name} again")
                });
            } else {
                findings.expect(Promise::Sealed, !over, || {
                    format!("segment {seq}: {kind} of {name}, which was sealed")
                });
            }
        }
    }

    /// What holds at the end.
    pub(crate) fn check_end(&self, plan: &Plan, findings: &mut Findings) {
        for stage in &plan.stages {
            let sealed = self.seal_of(&stage.name).is_some();
            findings.expect(Promise::Sealed, sealed, || {
                format!("stage {} is not sealed", stage.name)
            });
        }
        let ends: Vec<_> = self.of_kind("run_finished").collect();
        let last = ends.last().map(|record| &record.value["outcome"]);
        findings.expect(
            Promise::Outcome,
            last.is_some_and(|last| last == "succeeded"),
            || format!("the run ended with {last:?}"),
        );
        let succeeded = ends
            .iter()
            .filter(|end| end.value["outcome"] == "succeeded");
        let succeeded = succeeded.count();
        findings.expect(Promise::Outcome, succeeded <= 1, || {
            format!("the run succeeded {succeeded} times")
        });
    }

    pub(crate) fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Record> {
        self.records
            .iter()
            .filter(move |record| record.kind == kind)
    }

    fn of_stage(&self, kind: &str, stage: &str) -> impl Iterator<Item = &Record> {
        self.of_kind(kind)
            .filter(move |record| record.value["stage"] == stage)
    }

    /// The digest that a stage was sealed with.
    pub(crate) fn seal_of(&self, stage: &str) -> Option<&str> {
        let record = self.of_stage("stage_sealed", stage).next()?;
        record.value["digest"].as_str()
    }

    /// Tasks of a stage that were set aside.
    pub(crate) fn quarantined(&self, stage: &str) -> BTreeSet<u64> {
        let aside = self.of_stage("quarantined", stage);
        aside.map(|record| number(&record.value, "index")).collect()
    }

    /// The groups of a stage, oldest first.
    pub(crate) fn formed(&self, stage: &str) -> Vec<Formed> {
        let formed = self.of_stage("generation_formed", stage);
        formed
            .map(|record| Formed {
                generation: number(&record.value, "generation"),
                base_step: number(&record.value, "base_step"),
                members: record.value["members"].as_array().map_or(0, Vec::len) as u64,
            })
            .collect()
    }

    /// The checkpoints of a stage, oldest first.
    pub(crate) fn checkpoints(&self, stage: &str) -> Vec<Recorded> {
        let text = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
        self.of_stage("checkpoint_committed", stage)
            .map(|record| {
                let value = &record.value["checkpoint"];
                Recorded {
                    step: number(value, "step"),
                    generation: number(value, "generation"),
                    key: text(value, "key"),
                    digest: text(value, "digest"),
                    is_final: value["is_final"] == true,
                }
            })
            .collect()
    }
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or_default()
}
