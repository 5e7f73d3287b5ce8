//! What the machine wants read from or written to the store. Each errand runs on its own and reports back once.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::Semaphore;

use distillery_common::checkpoint;
use distillery_common::commit::TaskCommit;
use distillery_common::group::CheckpointCommitted;
use distillery_common::ids::{Digest, Generation, Term};
use distillery_common::latents;
use distillery_common::storage::layout::{self, Prefix};
use distillery_common::storage::{FileEntry, Store};
use distillery_common::task::{CommitSummary, TaskId};

use super::trouble::{checkpoint_trouble, commit_trouble, latents_trouble, trouble};
use super::{Handle, commit_index};
use crate::plan::{Kind, Plan, Work};
use crate::scheduler::{Checkpoint, Event, Finding, Trouble};

/// COMMITs that are looked for one by one; more of them are listed.
const PROBED: u64 = 4096;
/// Files of one COMMIT that are looked at, at a time.
const LOOKS: usize = 8;
/// Errands under way at a time. A store far away answers in a tenth of a second, and a thousand tasks may end in one.
const AT_A_TIME: usize = 128;

/// Does errands.
#[derive(Debug, Clone)]
pub struct Errands {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    plan: Plan,
    dataset: Dataset,
    permits: Semaphore,
}

/// Where trajectories are.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Names their content.
    pub digest: Digest,
    /// The store of another run that has them, if they are reused.
    pub reused_from: Option<Store>,
}

impl Errands {
    /// Errands for one run.
    pub fn new(store: Store, plan: Plan, dataset: Dataset) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                plan,
                dataset,
                permits: Semaphore::new(AT_A_TIME),
            }),
        }
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.shared.plan
    }

    pub(super) fn inspect(
        &self,
        stage: usize,
        granted_below: Option<u64>,
        after_ms: u64,
        handle: Handle,
    ) {
        let shared = Arc::clone(&self.shared);
        let errand = async move { shared.inspect(stage, granted_below).await };
        let event = move |finding| Event::Inspected { stage, finding };
        self.spawn(after_ms, handle, errand, event);
    }

    pub(super) fn verify_commit(&self, task: TaskId, after_ms: u64, handle: Handle) {
        let shared = Arc::clone(&self.shared);
        let name = task.clone();
        let errand = async move { shared.read_commit(&name).await };
        let event = move |commit| Event::CommitVerified { task, commit };
        self.spawn(after_ms, handle, errand, event);
    }

    pub(super) fn verify_checkpoint(
        &self,
        checkpoint: CheckpointCommitted,
        after_ms: u64,
        handle: Handle,
    ) {
        let shared = Arc::clone(&self.shared);
        let reported = checkpoint.clone();
        let errand = async move { shared.verify_checkpoint(&reported).await };
        let event = move |result| Event::CheckpointVerified { checkpoint, result };
        self.spawn(after_ms, handle, errand, event);
    }

    pub(super) fn seal(
        &self,
        stage: usize,
        commits: BTreeMap<u64, CommitSummary>,
        after_ms: u64,
        handle: Handle,
    ) {
        let shared = Arc::clone(&self.shared);
        let errand = async move { shared.seal(stage, &commits).await };
        let event = move |result| Event::Sealed { stage, result };
        self.spawn(after_ms, handle, errand, event);
    }

    /// Writes a part of a commit index; one that cannot be written is done without.
    pub(super) fn index(
        &self,
        stage: usize,
        term: Term,
        part: u64,
        commits: Vec<(u64, CommitSummary)>,
    ) {
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let folder = shared.tasks_folder(stage);
            let written = commit_index::write(&shared.store, &folder, term, part, &commits).await;
            if let Err(error) = written {
                tracing::warn!(%error, "a part of the commit index is not written");
            }
        });
    }

    /// Deletes checkpoints; one that cannot be deleted is tried again after the next checkpoint.
    pub(super) fn prune(
        &self,
        stage: usize,
        before: u64,
        pinned: BTreeSet<(u64, Generation)>,
        live: Option<Generation>,
    ) {
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let keep = checkpoint::Keep {
                newest: 0,
                pinned,
                live,
            };
            if let Err(error) = shared.prune(stage, before, &keep).await {
                tracing::warn!(%error, "old checkpoints cannot be deleted");
            }
        });
    }

    /// Errands end by themselves: each makes a bounded number of requests, then reports or finds the driver gone. One
    /// that panics reports that, since the machine waits for its event without a deadline.
    fn spawn<T: Send + 'static>(
        &self,
        after_ms: u64,
        handle: Handle,
        errand: impl Future<Output = Result<T, Trouble>> + Send + 'static,
        event: impl FnOnce(Result<T, Trouble>) -> Event + Send + 'static,
    ) {
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            if after_ms > 0 {
                tokio::time::sleep(Duration::from_millis(after_ms)).await;
            }
            let permit = shared.permits.acquire().await;
            // Nothing that an errand has in hand is looked at after a panic.
            let done = AssertUnwindSafe(errand).catch_unwind().await;
            let result = done.unwrap_or_else(|panic| Err(panicked(panic.as_ref())));
            drop(permit);
            // The driver may have ended meanwhile; then nobody needs the answer.
            let _ = handle.event(event(result)).await;
        });
    }
}

/// A panic as the trouble that it is: a bug, which another try would meet again.
fn panicked(panic: &(dyn Any + Send)) -> Trouble {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    Trouble::Permanent(format!(
        "the coordinator met a bug of its own: {}",
        text.unwrap_or("a panic without words")
    ))
}

impl Shared {
    async fn inspect(&self, at: usize, granted_below: Option<u64>) -> Result<Finding, Trouble> {
        let stage = &self.plan.stages[at];
        match &stage.work {
            Work::Tasks(_) if stage.kind == Kind::Trajectories => {
                self.find_trajectories(at, granted_below).await
            }
            Work::Tasks(_) => {
                let (commits, unindexed) = self.find_commits(at, granted_below).await?;
                Ok(Finding::Tasks {
                    commits,
                    unindexed,
                    sealed: None,
                })
            }
            Work::Training(training) => {
                let found = self.find_checkpoints(&stage.name, training.steps).await?;
                Ok(Finding::Checkpoints(found))
            }
        }
    }

    async fn find_trajectories(
        &self,
        at: usize,
        granted_below: Option<u64>,
    ) -> Result<Finding, Trouble> {
        let store = self.dataset.reused_from.as_ref().unwrap_or(&self.store);
        let manifest = latents::manifest::find(store, &self.dataset_folder())
            .await
            .map_err(latents_trouble)?;
        let sealed = manifest.map(|manifest| Digest::of(&manifest.to_bytes()));
        if self.dataset.reused_from.is_some() && sealed.is_none() {
            return Err(Trouble::Permanent(format!(
                "{} has no sealed trajectories {}, which this recipe needs; they depend on teacher, prompts, seed and the section trajectories",
                store.uri(),
                self.dataset.digest.short()
            )));
        }
        let (commits, unindexed) = match sealed {
            Some(_) => Default::default(),
            None => self.find_commits(at, granted_below).await?,
        };
        Ok(Finding::Tasks {
            commits,
            unindexed,
            sealed,
        })
    }

    fn dataset_folder(&self) -> Prefix {
        layout::dataset(&self.dataset.digest.short())
    }

    fn task_folder(&self, at: usize, index: u64) -> Prefix {
        let stage = &self.plan.stages[at];
        match stage.kind {
            Kind::Trajectories => layout::shard(&self.dataset_folder(), index),
            Kind::Distill | Kind::Reference | Kind::Evaluate | Kind::Export => {
                layout::task(&stage.name, index)
            }
        }
    }

    /// The folder of all tasks of a stage.
    fn tasks_folder(&self, at: usize) -> Prefix {
        let stage = &self.plan.stages[at];
        match stage.kind {
            Kind::Trajectories => self.dataset_folder(),
            Kind::Distill | Kind::Reference | Kind::Evaluate | Kind::Export => {
                layout::tasks(&stage.name)
            }
        }
    }

    /// Every COMMIT of a task stage: those that the index has, and those among the rest. From `granted_below` on
    /// there are none, so that a few of the others are looked for one by one; without that bound, or where the
    /// index lacks many, the store is listed. Also gives those that the index lacks.
    async fn find_commits(
        &self,
        at: usize,
        granted_below: Option<u64>,
    ) -> Result<(BTreeMap<u64, CommitSummary>, Vec<u64>), Trouble> {
        let stage = &self.plan.stages[at];
        let Work::Tasks(tasks) = &stage.work else {
            return Ok(Default::default());
        };
        let folder = self.tasks_folder(at);
        let key_of = |index| layout::commit(&self.task_folder(at, index)).to_string();
        let mut commits = commit_index::read(&self.store, &folder, key_of)
            .await
            .map_err(trouble)?;
        let missing = |below: u64| {
            let open = (0..below).filter(|index| !commits.contains_key(index));
            open.take(PROBED as usize + 1).collect::<Vec<u64>>()
        };
        let few = granted_below
            .map(|below| missing(below.min(tasks.count)))
            .filter(|missing| missing.len() as u64 <= PROBED);
        let rest = match few {
            Some(missing) => missing,
            None => self.list_commits(&folder, &commits).await?,
        };
        // Collected, because a closure over borrowed entries cannot cross an await in a spawned task.
        let rest: Vec<TaskId> = rest
            .into_iter()
            .map(|index| TaskId {
                stage: stage.name.clone(),
                index,
            })
            .collect();
        let found: Vec<_> = stream::iter(rest)
            .map(|task| async move {
                let commit = self.read_commit(&task).await?;
                Ok::<_, Trouble>(commit.map(|commit| (task.index, commit)))
            })
            .buffered(AT_A_TIME)
            .try_collect()
            .await?;
        let found: Vec<_> = found.into_iter().flatten().collect();
        let unindexed = found.iter().map(|(index, _)| *index).collect();
        commits.extend(found);
        Ok((commits, unindexed))
    }

    /// The indexes below `folder` that have a COMMIT and are not among `known`.
    async fn list_commits(
        &self,
        folder: &Prefix,
        known: &BTreeMap<u64, CommitSummary>,
    ) -> Result<Vec<u64>, Trouble> {
        let listed = self.store.list(folder).await.map_err(trouble)?;
        let indexes = listed
            .iter()
            .filter_map(|entry| layout::parse_task_commit(&entry.key))
            .filter(|index| !known.contains_key(index));
        Ok(indexes.collect())
    }

    /// What a task's COMMIT says, once everything it names was seen to be there.
    async fn read_commit(&self, task: &TaskId) -> Result<Option<CommitSummary>, Trouble> {
        let Some(at) = self.plan.position(&task.stage) else {
            return Err(Trouble::Permanent(format!(
                "there is no stage {}",
                task.stage
            )));
        };
        let folder = self.task_folder(at, task.index);
        let key = layout::commit(&folder);
        let Some(bytes) = self.store.find(&key).await.map_err(trouble)? else {
            return Ok(None);
        };
        let commit = TaskCommit::from_bytes(&folder, &bytes).map_err(commit_trouble)?;
        if commit.lease.task != *task {
            let found = &commit.lease.task;
            return Err(Trouble::Permanent(format!("{key} belongs to {found}")));
        }
        let is_rows = self.plan.stages[at].kind == Kind::Trajectories;
        if is_rows && commit.inputs != self.dataset.digest {
            return Err(Trouble::Permanent(format!(
                "{key} was made from other inputs than this run's"
            )));
        }
        self.see_all(&commit.files).await?;
        Ok(Some(CommitSummary {
            key: key.to_string(),
            rows: commit.rows,
            bytes: commit.total_bytes(),
            digest: Digest::of(&bytes),
        }))
    }

    /// Every checkpoint of a stage that is whole, by its lengths.
    async fn find_checkpoints(&self, stage: &str, steps: u64) -> Result<Vec<Checkpoint>, Trouble> {
        let folders = checkpoint::folders(&self.store, stage)
            .await
            .map_err(checkpoint_trouble)?;
        let mut found = Vec::new();
        for folder in folders.into_iter().filter(|folder| folder.committed) {
            let place = layout::checkpoint(stage, folder.step, folder.generation);
            let key = layout::commit(&place);
            match self.read_checkpoint(key.as_str()).await {
                Ok(digest) => found.push(Checkpoint {
                    step: folder.step,
                    generation: folder.generation,
                    key: key.to_string(),
                    digest,
                    is_final: folder.step == steps,
                }),
                Err(Trouble::Permanent(reason)) => {
                    tracing::warn!(%key, reason, "a checkpoint is not whole and is passed over");
                }
                Err(transient @ Trouble::Transient(_)) => return Err(transient),
            }
        }
        Ok(found)
    }

    async fn prune(
        &self,
        at: usize,
        before: u64,
        keep: &checkpoint::Keep,
    ) -> Result<(), checkpoint::Error> {
        let stage = &self.plan.stages[at].name;
        let folders = checkpoint::folders(&self.store, stage).await?;
        let behind: Vec<_> = folders.into_iter().filter(|f| f.step < before).collect();
        for folder in checkpoint::expired(&behind, keep) {
            checkpoint::delete(&self.store, stage, folder).await?;
        }
        Ok(())
    }

    async fn verify_checkpoint(&self, reported: &CheckpointCommitted) -> Result<(), Trouble> {
        let named = layout::parse_checkpoint_commit(&reported.key);
        let group = &reported.group;
        if named != Some((group.stage.as_str(), reported.step, group.generation)) {
            return Err(Trouble::Permanent(format!(
                "{} is not where step {} of {group} belongs",
                reported.key, reported.step
            )));
        }
        let digest = self.read_checkpoint(&reported.key).await?;
        if digest == reported.digest {
            Ok(())
        } else {
            Err(Trouble::Permanent(format!(
                "{} is not the COMMIT that was reported",
                reported.key
            )))
        }
    }

    async fn read_checkpoint(&self, key: &str) -> Result<Digest, Trouble> {
        let Some((stage, step, generation)) = layout::parse_checkpoint_commit(key) else {
            return Err(Trouble::Permanent(format!(
                "{key} is no key of a checkpoint"
            )));
        };
        let commit = layout::commit(&layout::checkpoint(stage, step, generation));
        let bytes = self.store.get(&commit).await.map_err(trouble)?;
        let manifest = checkpoint::Manifest::from_bytes(key, &bytes).map_err(checkpoint_trouble)?;
        self.see_all(&manifest.files).await?;
        Ok(Digest::of(&bytes))
    }

    /// Sees that every file is there in its whole length, a few at a time.
    async fn see_all(&self, files: &[FileEntry]) -> Result<(), Trouble> {
        // Collected, because a closure over borrowed entries cannot cross an await in a spawned task.
        let looks: Vec<_> = files.iter().map(|file| self.see(file)).collect();
        stream::iter(looks)
            .buffer_unordered(LOOKS)
            .try_collect()
            .await
    }

    /// Sees that a file is there in its whole length.
    async fn see(&self, file: &FileEntry) -> Result<(), Trouble> {
        let found = self.store.head(&file.key).await.map_err(trouble)?.len;
        if found == file.len {
            Ok(())
        } else {
            Err(Trouble::Permanent(format!(
                "{} has {found} bytes instead of {}",
                file.key, file.len
            )))
        }
    }

    async fn seal(
        &self,
        at: usize,
        commits: &BTreeMap<u64, CommitSummary>,
    ) -> Result<Digest, Trouble> {
        let stage = &self.plan.stages[at];
        match &stage.work {
            Work::Tasks(tasks) if stage.kind == Kind::Trajectories => {
                let quarantined = (0..tasks.count)
                    .filter(|index| !commits.contains_key(index))
                    .collect();
                let folder = self.dataset_folder();
                let digest = self.dataset.digest;
                let (_, bytes) = latents::manifest::seal(
                    &self.store,
                    &folder,
                    digest,
                    tasks.count,
                    &quarantined,
                )
                .await
                .map_err(latents_trouble)?;
                Ok(Digest::of(&bytes))
            }
            Work::Tasks(_) | Work::Training(_) => {
                let lines: String = commits
                    .iter()
                    .map(|(index, commit)| format!("{index} {}\n", commit.digest))
                    .collect();
                Ok(Digest::of(lines.as_bytes()))
            }
        }
    }
}

#[cfg(test)]
mod tests;
