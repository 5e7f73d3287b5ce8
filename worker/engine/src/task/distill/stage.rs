//! A training stage in an engine's memory: student, trainer, curves. It outlives the generations of its group.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use distillery_common::checkpoint::{Checkpoint, Kind, Lora, TensorSpec, Training};
use distillery_common::curves::{StepRecord, from_jsonl};
use distillery_common::group::{Held, Membership, Phase, Progress};
use distillery_common::ids::Digest;
use distillery_common::latents::loader::{Order, Spec};
use distillery_common::latents::manifest::DatasetManifest;
use distillery_common::latents::{Dataset, Options};
use distillery_common::recipe::{self, StudentKind, TeacherStep};
use distillery_common::run::dataset_store;
use distillery_common::storage::layout;
use distillery_common::task::FailureClass;

use super::timed::Timed;
use super::{Broken, Outcome, sync, train_fault};
use crate::collective::{Collective, Ended};
use crate::diffusion::guidance::Guided;
use crate::diffusion::segments::Segments;
use crate::distill;
use crate::inbox::Inbox;
use crate::link::Event;
use crate::task::rows::StoredRows;
use crate::task::saver::{Place, Saver, Watch, part_of_kind, position};
use crate::task::student::{Student, check_dtype, f32_tensor};
use crate::task::{Fault, OrFault as _};
use crate::train::{self, Restoring, Trainer};
use crate::workbench::{TeacherModel, Workbench};

/// Steps of rows read ahead.
const STEPS_AHEAD: usize = 8;

/// A training stage as one engine holds it.
pub struct StageWork {
    recipe: recipe::Stage,
    /// Position in the recipe.
    number: u64,
    teacher: Rc<TeacherModel>,
    student: Student,
    pub(super) trainer: Trainer,
    objective: Box<dyn distill::Objective>,
    dataset: Arc<Dataset>,
    pub(super) curves: Vec<StepRecord>,
    training: Training,
    /// The state in the trainer, once a group has agreed on it; none of a fresh or spoilt one.
    pub(super) held: Option<Held>,
    /// Whether the trainer is as it was made.
    is_fresh: bool,
}

impl StageWork {
    /// The stage without a state: a student that computes as the teacher does.
    pub(super) fn fresh(bench: &mut Workbench, membership: &Membership) -> Result<Self, Fault> {
        let name = &membership.group.stage;
        let stages = &bench.recipe.stages;
        let number = stages.iter().position(|stage| stage.name == *name);
        let number = number
            .ok_or_else(|| Fault::config(format!("the recipe has no training stage {name:?}")))?;
        let recipe = stages[number].clone();
        check_dtype(recipe.compute.dtype)?;
        let teacher = bench.teacher(bench.recipe.teacher.dtype)?;
        let student = Student::fresh(&teacher, &recipe, bench.recipe.seed, bench.device)?;
        let Membership { rank, world, .. } = *membership;
        let plan = train::Plan::from(&recipe);
        let trainer = Trainer::member(plan, student.parameters(), rank, world);
        let (dataset, digest) = open_dataset(bench)?;
        let objective = distill::objective(
            &recipe,
            teacher.schedule.to_device(bench.device),
            teacher.prediction,
        )
        .or_fault(FailureClass::Config)?;
        let training = training_of(bench, &recipe, &teacher, digest, membership)?;
        Ok(Self {
            recipe,
            number: number as u64,
            teacher,
            student,
            trainer,
            objective,
            dataset: Arc::new(dataset),
            curves: Vec::new(),
            training,
            held: None,
            is_fresh: true,
        })
    }

    /// Whether this is the stage that `membership` is about.
    pub(super) fn is_of(&self, membership: &Membership) -> bool {
        self.recipe.name == membership.group.stage
            && self.training.parent == membership.parent_checkpoint
    }

    /// The state is about to be written over.
    pub(super) fn spoil(&mut self) {
        self.held = None;
        self.is_fresh = false;
    }

    /// Loads the state that the group starts from when no member holds one: its newest checkpoint, or else the
    /// parent's student.
    ///
    /// Not to be spawned: it may be dropped between two files, and what is read so far is then not held.
    pub(super) async fn load(
        &mut self,
        bench: &Workbench,
        membership: &Membership,
    ) -> Result<(), Fault> {
        if !std::mem::take(&mut self.is_fresh) {
            let (teacher, recipe) = (&self.teacher, &self.recipe);
            self.student = Student::fresh(teacher, recipe, bench.recipe.seed, bench.device)?;
        }
        self.held = None;
        self.curves.clear();
        if let Some(parent) = open(bench, membership.parent_checkpoint.as_deref()).await? {
            self.student.load_published(&parent).await?;
        }
        let plan = train::Plan::from(&self.recipe);
        let Membership { rank, world, .. } = *membership;
        self.trainer = Trainer::member(plan, self.student.parameters(), rank, world);
        if let Some(base) = open(bench, membership.base_checkpoint.as_deref()).await? {
            let metrics = base.metrics().await?;
            self.curves = from_jsonl(&metrics).or_fault(FailureClass::Schema)?;
            restore(&mut self.trainer, &base, &self.curves).await?;
        }
        check_start(&self.trainer, membership)?;
        // Should the others lose patience while this is read, the next group need not wait for it.
        let start = Held {
            step: 0,
            generation: membership.group.generation,
        };
        self.hold(sync::base(membership)?.unwrap_or(start));
        Ok(())
    }

    /// Whether every member keeps a share of the moments alone.
    pub(super) fn shares_moments(&self) -> bool {
        self.recipe.optimizer.sharded
    }

    /// Loads this member's moments alone, where a group shares them out: the rest comes from rank 0. As [`Self::load`] it
    /// may be dropped.
    pub(super) async fn load_moments(
        &mut self,
        bench: &Workbench,
        membership: &Membership,
    ) -> Result<(), Fault> {
        self.spoil();
        self.trainer.reseat(membership.rank, membership.world);
        if let Some(base) = open(bench, membership.base_checkpoint.as_deref()).await? {
            let moments = [train::snapshot::Part::AdamM, train::snapshot::Part::AdamV];
            let mut restoring = Restoring::of(&mut self.trainer, &moments);
            read(&mut restoring, &base).await?;
            restoring.finish_parts().or_fault(FailureClass::Schema)?;
        }
        Ok(())
    }

    /// The trainer's state is `held`, which the next group may go on from. Not so where moments are shared out: those of a
    /// member that is lost are nowhere but in a checkpoint.
    pub(super) fn hold(&mut self, held: Held) {
        self.held = (!self.shares_moments()).then_some(held);
    }

    /// Whether nothing is left to train.
    pub fn is_finished(&self) -> bool {
        self.trainer.position().step == self.recipe.steps
    }

    /// Agrees on the state, steps until the last one, and commits what must be committed.
    pub(super) fn run(
        &mut self,
        bench: &mut Workbench,
        membership: &Membership,
        mut ring: Box<dyn Collective>,
        ended: Ended,
    ) -> Result<Outcome, Broken> {
        self.tell(bench, membership, Phase::Syncing, membership.base_step);
        let from_memory = sync::sync(bench, self, membership, ring.as_mut())?;
        let step = self.trainer.position().step;
        tracing::info!(group = %membership.group, step, from_memory, "the members hold one state");
        self.tell(bench, membership, Phase::Stepping, step);
        let rows = Rc::new(RefCell::new(self.read_rows(bench, membership)));
        let null = tch::no_grad(|| self.teacher.parts.null_conditioning(1));
        let guided = Guided {
            denoiser: &self.teacher.parts.unet,
            null: &null,
            scale: bench.recipe.teacher.guidance,
        };
        let online = (self.recipe.teacher_step == TeacherStep::Online).then_some(&guided);
        let place = Place {
            membership: membership.clone(),
            steps: self.recipe.steps,
            every_steps: bench.recipe.checkpoint.every_steps,
            global_batch: self.recipe.batch.global,
            training: self.training.clone(),
            sharded: bench.recipe.checkpoint.sharded,
            summed: Rc::default(),
        };
        let mut timed = Timed::new(ring.as_mut(), Rc::clone(&place.summed));
        let mut watch = InboxWatch {
            inbox: &mut bench.inbox,
            ended,
        };
        let mut saver = Saver::new(
            &bench.io,
            bench.store.clone(),
            bench.link.clone(),
            place,
            &mut watch,
            Rc::clone(&rows),
            std::mem::take(&mut self.curves),
        );
        saver.catch_up(&self.trainer);
        let result = self.trainer.run(
            self.objective.as_ref(),
            &self.student.unet,
            online,
            &mut timed,
            &mut SharedRows(rows),
            &mut saver,
        );
        // Before anything is saved: the others must not wait for a step that is not taken here any more.
        drop(ring);
        let ending = finish(&mut saver, &self.trainer, self.recipe.steps, result);
        self.curves = saver.into_curves();
        if let Some(held) = &mut self.held {
            held.step = self.trainer.position().step;
        }
        ending
    }

    /// The rows of this member's share of every step to come.
    fn read_rows(&self, bench: &Workbench, membership: &Membership) -> StoredRows {
        let order = Order {
            seed: bench.recipe.seed,
            stage: self.number,
            rows: self.dataset.rows(),
            global_batch: self.recipe.batch.global,
            virtual_ranks: self.recipe.batch.virtual_ranks,
        };
        let spec = Spec {
            order,
            rank: membership.rank,
            world: membership.world,
            steps: self.trainer.position().step..self.recipe.steps,
            ahead: STEPS_AHEAD,
        };
        let time_ids = tch::no_grad(|| self.teacher.parts.null_conditioning(1).time_ids);
        StoredRows::start(
            &bench.io.handle(),
            Arc::clone(&self.dataset),
            spec,
            time_ids,
            bench.device,
        )
    }

    pub(super) fn tell(&self, bench: &Workbench, membership: &Membership, phase: Phase, step: u64) {
        bench.link.send(Event::GroupProgress(Progress {
            group: membership.group.clone(),
            phase,
            step,
            total_steps: self.recipe.steps,
            loss: self.curves.iter().rev().find_map(|r| r.loss).unwrap_or(0.0),
            samples_per_second: 0.0,
            step_ms: 0.0,
        }));
    }
}

/// Commits what a member owes at the end of its part, and says how that ended.
fn finish(
    saver: &mut Saver<'_>,
    trainer: &Trainer,
    steps: u64,
    result: Result<(), train::Error>,
) -> Result<Outcome, Broken> {
    if trainer.position().step == steps && result.is_ok() {
        saver.save_now(trainer).map_err(Fault::from)?;
        return Ok(Outcome::Finished);
    }
    if let Err(error @ train::Error::Diverged { .. }) = result {
        return Err(train_fault(error));
    }
    if saver.take_leave(trainer).map_err(Fault::from)? {
        return Ok(Outcome::Drained);
    }
    Err(match result {
        Ok(()) => Fault::new(FailureClass::Stale, "a member was told to end").into(),
        Err(error) => train_fault(error),
    })
}

/// A source that the saver can ask how long it waited.
struct SharedRows(Rc<RefCell<StoredRows>>);

impl train::Source for SharedRows {
    fn rows(&mut self, positions: std::ops::Range<u64>) -> anyhow::Result<distill::Rows> {
        self.0.borrow_mut().rows(positions)
    }
}

/// Between two steps: has anybody asked for an end?
struct InboxWatch<'a> {
    inbox: &'a mut Inbox,
    ended: Ended,
}

impl Watch for InboxWatch<'_> {
    fn is_over(&mut self) -> bool {
        self.ended.is_set()
    }

    fn wanted_checkpoint(&mut self) -> Option<bool> {
        if self.ended.is_set() {
            None
        } else {
            self.inbox.draining()
        }
    }
}

/// The checkpoint that `commit` names, if it names one.
async fn open(bench: &Workbench, commit: Option<&str>) -> Result<Option<Checkpoint>, Fault> {
    Ok(match commit {
        Some(commit) => Some(Checkpoint::open(&bench.store, commit).await?),
        None => None,
    })
}

/// Fills the trainer from `state`, one file of it in memory at a time.
async fn restore(
    trainer: &mut Trainer,
    state: &Checkpoint,
    curves: &[StepRecord],
) -> Result<(), Fault> {
    let mut restoring = Restoring::new(trainer);
    read(&mut restoring, state).await?;
    restoring
        .finish(position(curves))
        .or_fault(FailureClass::Schema)
}

/// Reads what `restoring` awaits of `state`; files with nothing of it are not touched.
async fn read(restoring: &mut Restoring<'_>, state: &Checkpoint) -> Result<(), Fault> {
    let awaited: BTreeSet<(Kind, String)> = (state.manifest().tensors.iter())
        .map(|tensor| (tensor.spec.kind, tensor.spec.name.clone()))
        .filter(|(kind, name)| restoring.awaits(part_of_kind(*kind), name))
        .collect();
    let take = |spec: &TensorSpec, bytes: &[u8]| {
        let values = f32_tensor(spec, bytes)?;
        restoring
            .take(part_of_kind(spec.kind), &spec.name, &values)
            .or_fault(FailureClass::Schema)
    };
    let is_awaited = |spec: &TensorSpec| awaited.contains(&(spec.kind, spec.name.clone()));
    state.read(is_awaited, take).await
}

/// The state that was loaded is the one that the group agreed to start from.
fn check_start(trainer: &Trainer, membership: &Membership) -> Result<(), Fault> {
    let (held, wanted) = (trainer.position().step, membership.base_step);
    if held == wanted {
        return Ok(());
    }
    Err(Fault::new(
        FailureClass::Schema,
        format!(
            "the checkpoint to start from holds step {held}, the group starts at step {wanted}"
        ),
    ))
}

/// The sealed trajectories to train on, and the digest of their manifest.
fn open_dataset(bench: &Workbench) -> Result<(Dataset, Digest), Fault> {
    let digest = bench
        .record
        .dataset_digest
        .ok_or_else(|| Fault::config("the run's record names no dataset to train on"))?;
    let store = dataset_store(&bench.store, &bench.recipe).or_fault(FailureClass::Config)?;
    let folder = layout::dataset(&digest.short());
    let bytes = bench
        .io
        .wait(store.get(&layout::dataset_manifest(&folder)))?;
    let manifest = DatasetManifest::from_bytes(&folder, &bytes).or_fault(FailureClass::Schema)?;
    Ok((
        Dataset::new(store, manifest, Options::default()),
        Digest::of(&bytes),
    ))
}

fn training_of(
    bench: &Workbench,
    stage: &recipe::Stage,
    teacher: &TeacherModel,
    manifest: Digest,
    membership: &Membership,
) -> Result<Training, Fault> {
    let segments = Segments::new(stage.segments).or_fault(FailureClass::Config)?;
    let lora = match &stage.student.kind {
        StudentKind::Full => None,
        StudentKind::Lora {
            lora_rank,
            lora_alpha,
            targets,
        } => Some(Lora {
            lora_rank: *lora_rank,
            lora_alpha: *lora_alpha,
            targets: targets.clone(),
        }),
    };
    Ok(Training {
        run: bench.record.run_id.to_string(),
        recipe_digest: bench.record.recipe_digest.to_string(),
        dataset_digest: Some(manifest.to_string()),
        parent: membership.parent_checkpoint.clone(),
        milestones: segments.milestones().iter().map(|&t| t as u32).collect(),
        schedule: format!("{:?}", teacher.parts.schedule.beta_schedule),
        prediction_type: teacher.prediction.name().to_owned(),
        skip: stage.skip,
        seed: bench.recipe.seed,
        global_batch: stage.batch.global,
        lora,
        libtorch: bench.record.software.libtorch.clone(),
        cpu_capability: bench.record.software.cpu_capability.clone(),
    })
}
