//! The object tree of a run (data-plane.md §7): the only place where storage keys are spelled.
//!
//! ```text
//! <run URI>/
//!   run.json                                                   create-only, once
//!   prompts/{train,holdout,preview}.parquet
//!   journal/<seq:020>    journal/snapshot-<seq:020>
//!   trajectories/<dataset>/shard-<index:08>/a<attempt>-<incarnation>.parquet  …-embeddings.parquet  COMMIT
//!   trajectories/<dataset>/MANIFEST    commit-index/t<term:06>-<part:06>
//!   checkpoints/<stage>/<step:010>-g<generation>/[r<rank:04>-]s<part:04>.safetensors  metrics.jsonl  COMMIT
//!   tasks/<stage>/<index:08>/a<attempt>-<incarnation>/…  COMMIT                evaluation and export parts
//!   tasks/<stage>/commit-index/t<term:06>-<part:06>
//!   export/<stage>/…    report/…    logs/<worker>/<incarnation:020>-e<engine:06>/<seq:08>.jsonl
//! ```

use std::fmt;

use object_store::path::Path;

use crate::ids::{Generation, Incarnation, Term};
use crate::task::Lease;

const SNAPSHOT: &str = "snapshot-";

/// A key below the run URI. Only this module makes one, from validated parts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// The key as text, relative to the run URI.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key as object_store wants it.
    pub fn to_path(&self) -> Path {
        Path::from(self.0.as_str())
    }

    /// Reads a key that a stored manifest or a peer names: it must have the form of our keys and lie below
    /// `prefix`, so that no file can point outside its own folder.
    pub fn parse_below(prefix: &Prefix, text: &str) -> Result<Self, ForeignKey> {
        let rest = text
            .strip_prefix(prefix.0.as_str())
            .and_then(|r| r.strip_prefix('/'));
        match rest {
            Some(rest) if rest.split('/').all(is_segment) => Ok(Self(text.to_owned())),
            _ => Err(ForeignKey {
                key: text.to_owned(),
                prefix: prefix.0.clone(),
            }),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A folder of keys below the run URI.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix(String);

impl Prefix {
    /// The folder as text, relative to the run URI, without a slash at the end.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The folder as object_store wants it.
    pub fn to_path(&self) -> Path {
        Path::from(self.0.as_str())
    }

    fn key(&self, name: &str) -> Key {
        assert!(
            is_segment(name),
            "the name {name:?} of an object is not a plain segment"
        );
        Key(format!("{}/{name}", self.0))
    }

    fn folder(&self, name: &str) -> Self {
        assert!(
            is_segment(name),
            "the name {name:?} of a folder is not a plain segment"
        );
        Self(format!("{}/{name}", self.0))
    }
}

/// A key that does not belong where it was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("key {key:?} does not lie below {prefix:?}")]
pub struct ForeignKey {
    /// What was found.
    pub key: String,
    /// Where it should lie.
    pub prefix: String,
}

/// Whether `text` is one plain path segment: `[A-Za-z0-9._=-]+`, not `.` or `..`.
pub fn is_segment(text: &str) -> bool {
    !text.is_empty()
        && text != "."
        && text != ".."
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._=-".contains(&b))
}

/// The record of what this run is.
pub fn run_record() -> Key {
    Key("run.json".into())
}

/// The three lists of prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptList {
    /// What trajectories are drawn for.
    Train,
    /// What students are judged by.
    Holdout,
    /// What grids show.
    Preview,
}

/// A list of prompts.
pub fn prompts(list: PromptList) -> Key {
    let name = match list {
        PromptList::Train => "train",
        PromptList::Holdout => "holdout",
        PromptList::Preview => "preview",
    };
    Prefix("prompts".into()).key(&format!("{name}.parquet"))
}

/// All journal segments.
pub fn journal() -> Prefix {
    Prefix("journal".into())
}

/// Journal segment `seq`.
pub fn journal_segment(seq: u64) -> Key {
    journal().key(&format!("{seq:020}"))
}

/// Reads the number back from the key of a segment.
pub fn parse_journal_segment(key: &Key) -> Option<u64> {
    let seq = key.as_str().strip_prefix("journal/")?.parse().ok()?;
    (journal_segment(seq) == *key).then_some(seq)
}

/// What all segments before `seq` come to.
pub fn journal_snapshot(seq: u64) -> Key {
    journal().key(&format!("{SNAPSHOT}{seq:020}"))
}

/// Reads the number back from the key of a snapshot.
pub fn parse_journal_snapshot(key: &Key) -> Option<u64> {
    let name = key.as_str().strip_prefix("journal/")?;
    name.strip_prefix(SNAPSHOT)?.parse().ok()
}

/// The parts of the commit index of a dataset or of a task stage.
pub fn commit_index(folder: &Prefix) -> Prefix {
    folder.folder("commit-index")
}

/// One part of a commit index, written by the coordinator of `term`.
pub fn commit_index_part(folder: &Prefix, term: Term, part: u64) -> Key {
    commit_index(folder).key(&format!("t{:06}-{part:06}", term.0))
}

/// Reads the folder whose commit index lies in `folder`, if it is one.
pub fn parse_commit_index(folder: &str) -> Option<&str> {
    folder.strip_suffix("/commit-index")
}

/// Reads a folder that one COMMIT decides about: a shard, a unit of another task stage, or a checkpoint.
pub fn parse_committed_folder(folder: &str) -> Option<Prefix> {
    let segments: Vec<_> = folder.split('/').collect();
    if !segments.iter().all(|segment| is_segment(segment)) {
        return None;
    }
    match segments[..] {
        ["trajectories", set, name] => {
            let index = name.strip_prefix("shard-")?.parse().ok()?;
            Some(shard(&dataset(set), index))
        }
        ["tasks", stage, index] => Some(task(stage, index.parse().ok()?)),
        ["checkpoints", stage, name] => {
            let (step, generation) = parse_checkpoint_folder(name)?;
            Some(checkpoint(stage, step, generation))
        }
        _ => None,
    }
}

/// One set of trajectories; `dataset` is the short digest that names it.
pub fn dataset(dataset: &str) -> Prefix {
    Prefix("trajectories".into()).folder(dataset)
}

/// The sealed list of everything in a dataset.
pub fn dataset_manifest(dataset: &Prefix) -> Key {
    dataset.key("MANIFEST")
}

/// The folder of shard `index`.
pub fn shard(dataset: &Prefix, index: u64) -> Prefix {
    dataset.folder(&format!("shard-{index:08}"))
}

/// The rows that one attempt wrote.
pub fn shard_rows(shard: &Prefix, lease: &Lease) -> Key {
    shard.key(&format!("{}.parquet", attempt(lease)))
}

/// The text embeddings that one attempt wrote.
pub fn shard_embeddings(shard: &Prefix, lease: &Lease) -> Key {
    shard.key(&format!("{}-embeddings.parquet", attempt(lease)))
}

/// The create-only object that makes an attempt's or a checkpoint's files count.
pub fn commit(folder: &Prefix) -> Key {
    folder.key("COMMIT")
}

/// All checkpoints of `stage`.
pub fn checkpoints(stage: &str) -> Prefix {
    Prefix("checkpoints".into()).folder(stage)
}

/// The checkpoint of `stage` after `step` steps, written by `generation`.
pub fn checkpoint(stage: &str, step: u64, generation: Generation) -> Prefix {
    checkpoints(stage).folder(&format!("{step:010}-g{generation}"))
}

/// Reads (step, generation) back from the last segment of a checkpoint's folder.
pub fn parse_checkpoint_folder(segment: &str) -> Option<(u64, Generation)> {
    let (step, generation) = segment.split_once("-g")?;
    Some((step.parse().ok()?, Generation(generation.parse().ok()?)))
}

/// Part `part` of a checkpoint's tensors.
pub fn checkpoint_part(checkpoint: &Prefix, part: u32) -> Key {
    checkpoint.key(&format!("s{part:04}.safetensors"))
}

/// File `part` of the share of a checkpoint's tensors that `rank` writes, where several ranks do.
pub fn checkpoint_share(checkpoint: &Prefix, rank: u32, part: u32) -> Key {
    checkpoint.key(&format!("r{rank:04}-s{part:04}.safetensors"))
}

/// What `rank` says of its share of a checkpoint, for the rank that puts the COMMIT.
pub fn checkpoint_account(checkpoint: &Prefix, rank: u32) -> Key {
    checkpoint.key(&format!("r{rank:04}.json"))
}

/// The training curves up to a checkpoint.
pub fn checkpoint_metrics(checkpoint: &Prefix) -> Key {
    checkpoint.key("metrics.jsonl")
}

/// All units of a task stage other than trajectories.
pub fn tasks(stage: &str) -> Prefix {
    Prefix("tasks".into()).folder(stage)
}

/// The folder of unit `index` of a task stage other than trajectories.
pub fn task(stage: &str, index: u64) -> Prefix {
    tasks(stage).folder(&format!("{index:08}"))
}

/// Reads the index back from the key of a task's COMMIT.
pub fn parse_task_commit(key: &Key) -> Option<u64> {
    let folder = parse_commit(key.as_str()).ok()?.0;
    let name = folder.split('/').nth(2)?;
    name.strip_prefix("shard-").unwrap_or(name).parse().ok()
}

/// A file that one attempt wrote for a task.
pub fn task_file(task: &Prefix, lease: &Lease, name: &str) -> Key {
    task.folder(&attempt(lease)).key(name)
}

/// The exported forms of the student of `stage`.
pub fn export(stage: &str) -> Prefix {
    Prefix("export".into()).folder(stage)
}

/// A file of an export; `path` is made of plain segments divided by `/`.
pub fn export_file(export: &Prefix, path: &str) -> Key {
    assert!(
        path.split('/').all(is_segment),
        "the path {path:?} in an export is not plain"
    );
    Key(format!("{}/{path}", export.0))
}

/// A file of the report.
pub fn report(name: &str) -> Key {
    Prefix("report".into()).key(name)
}

/// What engines have printed.
pub fn logs() -> Prefix {
    Prefix("logs".into())
}

/// What one engine has printed: the `engine`-th that a worker has started, which was registered as `incarnation`.
pub fn engine_log(worker: &str, incarnation: Incarnation, engine: u64) -> Prefix {
    let engine = format!("{:020}-e{engine:06}", incarnation.0);
    logs().folder(worker).folder(&engine)
}

/// Part `seq` of what an engine has printed.
pub fn log_part(engine_log: &Prefix, seq: u64) -> Key {
    engine_log.key(&format!("{seq:08}.jsonl"))
}

/// Reads (worker, registration, engine, part) back from the key of a part.
pub fn parse_log_part(key: &Key) -> Option<(&str, Incarnation, u64, u64)> {
    let (worker, rest) = key.as_str().strip_prefix("logs/")?.split_once('/')?;
    let (engine, part) = rest.split_once('/')?;
    let (incarnation, engine) = engine.split_once("-e")?;
    let incarnation = Incarnation(incarnation.parse().ok()?);
    let engine = engine.parse().ok()?;
    let seq = part.strip_suffix(".jsonl")?.parse().ok()?;
    Some((worker, incarnation, engine, seq))
}

/// What a check of the store writes and removes; `nonce` keeps checks apart.
pub fn probe(nonce: &str) -> Key {
    Prefix("probe".into()).key(nonce)
}

/// The folder of one check of all that a run relies on.
pub fn trial(nonce: &str) -> Prefix {
    Prefix("probe".into()).folder(nonce)
}

/// A folder within a check.
pub fn trial_folder(trial: &Prefix, name: &str) -> Prefix {
    trial.folder(name)
}

/// An object of a check.
pub fn trial_object(folder: &Prefix, name: &str) -> Key {
    folder.key(name)
}

/// The folder of all trajectories.
pub fn trajectories() -> Prefix {
    Prefix("trajectories".into())
}

/// The folder of all checkpoints.
pub fn all_checkpoints() -> Prefix {
    Prefix("checkpoints".into())
}

/// The folder of all task stages other than trajectories.
pub fn all_tasks() -> Prefix {
    Prefix("tasks".into())
}

/// The folder of all checks of the store.
pub fn probes() -> Prefix {
    Prefix("probe".into())
}

/// Reads the key of a task's COMMIT: a shard of trajectories, or a unit of another task stage.
pub fn parse_commit(key: &str) -> Result<Key, ForeignKey> {
    let parts: Vec<&str> = key.split('/').collect();
    let is_commit = parts.len() == 4
        && ["trajectories", "tasks"].contains(&parts[0])
        && parts[3] == "COMMIT"
        && parts.iter().all(|part| is_segment(part));
    if is_commit {
        Ok(Key(key.to_owned()))
    } else {
        Err(ForeignKey {
            key: key.to_owned(),
            prefix: "trajectories/<dataset>/<shard> or tasks/<stage>/<index>".into(),
        })
    }
}

/// Reads (stage, step, generation) back from the key of a checkpoint's COMMIT.
pub fn parse_checkpoint_commit(key: &str) -> Option<(&str, u64, Generation)> {
    let rest = key.strip_prefix("checkpoints/")?.strip_suffix("/COMMIT")?;
    let (stage, folder) = rest.split_once('/')?;
    let (step, generation) = parse_checkpoint_folder(folder)?;
    let spelled = is_segment(stage) && commit(&checkpoint(stage, step, generation)).as_str() == key;
    spelled.then_some((stage, step, generation))
}

fn attempt(lease: &Lease) -> String {
    format!("a{}-{}", lease.attempt, lease.incarnation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::TaskId;

    #[test]
    fn keys_are_spelled_as_the_design_says() {
        let lease = Lease {
            term: Term(1),
            task: TaskId {
                stage: "trajectories".into(),
                index: 42,
            },
            attempt: 1,
            incarnation: Incarnation(4_294_967_297),
        };
        let shard = shard(&dataset("0123abcd"), 42);
        assert_eq!(
            shard_rows(&shard, &lease).as_str(),
            "trajectories/0123abcd/shard-00000042/a1-4294967297.parquet"
        );
        assert_eq!(
            commit(&shard).as_str(),
            "trajectories/0123abcd/shard-00000042/COMMIT"
        );
        let checkpoint = checkpoint("seg4", 250, Generation(3));
        assert_eq!(
            checkpoint_part(&checkpoint, 0).as_str(),
            "checkpoints/seg4/0000000250-g3/s0000.safetensors"
        );
        assert_eq!(
            checkpoint_share(&checkpoint, 3, 1).as_str(),
            "checkpoints/seg4/0000000250-g3/r0003-s0001.safetensors"
        );
        assert_eq!(
            parse_checkpoint_folder("0000000250-g3"),
            Some((250, Generation(3)))
        );
        assert_eq!(
            parse_checkpoint_commit(commit(&checkpoint).as_str()),
            Some(("seg4", 250, Generation(3)))
        );
        for foreign in [
            "checkpoints/seg4/250-g3/COMMIT",
            "checkpoints/../0000000250-g3/COMMIT",
            "checkpoints/seg4/0000000250-g3/s0000.safetensors",
        ] {
            assert_eq!(parse_checkpoint_commit(foreign), None, "{foreign}");
        }
        assert_eq!(journal_segment(7).as_str(), "journal/00000000000000000007");
        assert_eq!(parse_journal_snapshot(&journal_snapshot(7)), Some(7));
        assert_eq!(parse_journal_snapshot(&journal_segment(7)), None);
        assert_eq!(parse_journal_segment(&journal_segment(7)), Some(7));
        assert_eq!(parse_journal_segment(&journal_snapshot(7)), None);
        for folder in [shard.clone(), task("evaluate", 7), checkpoint.clone()] {
            assert_eq!(parse_committed_folder(folder.as_str()), Some(folder));
        }
        let index = commit_index(&dataset("d"));
        assert_eq!(parse_committed_folder(index.as_str()), None);
        assert_eq!(parse_commit_index(index.as_str()), Some("trajectories/d"));
        assert_eq!(parse_task_commit(&commit(&shard)), Some(42));
        assert_eq!(parse_task_commit(&commit(&task("evaluate", 7))), Some(7));
        assert_eq!(parse_task_commit(&shard_rows(&shard, &lease)), None);
        let log = engine_log("gpu-0.1", lease.incarnation, 3);
        let part = log_part(&log, 7);
        assert_eq!(
            part.as_str(),
            "logs/gpu-0.1/00000000004294967297-e000003/00000007.jsonl"
        );
        assert_eq!(
            parse_log_part(&part),
            Some(("gpu-0.1", lease.incarnation, 3, 7))
        );
        assert_eq!(parse_log_part(&logs().key("local-0.log")), None);
    }

    #[test]
    fn a_stored_key_cannot_leave_its_folder() {
        let shard = shard(&dataset("d"), 0);
        let inside = "trajectories/d/shard-00000000/a1-1.parquet";
        assert!(Key::parse_below(&shard, inside).is_ok());
        for outside in [
            "trajectories/d/shard-00000000/../../../run.json",
            "trajectories/d/shard-00000001/a1-1.parquet",
            "/etc/passwd",
            "trajectories/d/shard-00000000/",
            "trajectories/d/shard-00000000/a b",
            "trajectories/d/shard-00000000x/a",
        ] {
            assert!(Key::parse_below(&shard, outside).is_err(), "{outside}");
        }
    }
}
