//! A member's part in training one stage: join the group, start from the agreed state, step, save, leave.
//!
//! ```text
//! Join ─▶ listen, report GroupReady ─▶ load rows, student, state ─▶ Peers ─▶ ring ─▶ agree on the state ─▶ steps
//!                                                                                     └▶ final checkpoint
//! ```
//!
//! No message passes between this engine and the coordinator in a step. Whatever breaks a step leaves it
//! unapplied; the next generation starts from the last committed checkpoint.

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use distillery_common::checkpoint::{Checkpoint, Lora, Training};
use distillery_common::curves::{StepRecord, from_jsonl};
use distillery_common::group::{GroupId, Membership, Phase, Progress};
use distillery_common::ids::Digest;
use distillery_common::latents::loader::{Order, Spec};
use distillery_common::latents::manifest::DatasetManifest;
use distillery_common::latents::{Dataset, Options};
use distillery_common::recipe::{self, StudentKind, TeacherStep};
use distillery_common::run::dataset_store;
use distillery_common::storage::layout;
use distillery_common::task::FailureClass;

use super::current::Current;
use super::rows::StoredRows;
use super::saver::{Ended, Place, Saver, Watch, part_of_kind, position};
use super::student::{Student, check_dtype, f32_tensor};
use super::{Fault, OrFault as _};
use crate::collective::solo::Solo;
use crate::collective::tcp::{Invitation, Listener, TcpRing};
use crate::collective::{self, Collective};
use crate::diffusion::guidance::Guided;
use crate::diffusion::segments::Segments;
use crate::distill;
use crate::inbox::Inbox;
use crate::link::{Command, Event};
use crate::train::{self, Restoring, Trainer};
use crate::workbench::{TeacherModel, Workbench};

/// How long members wait for each other while a group forms, and for a neighbour in a step.
const DEADLINE: Duration = Duration::from_secs(60);
/// How often a member that waits for its peers looks whether it is still wanted.
const GLANCE: Duration = Duration::from_millis(100);
/// Steps of rows read ahead.
const STEPS_AHEAD: usize = 8;

/// How a member's part ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The stage's last step is applied; rank 0 has committed it.
    Finished,
    /// The engine is told to end, and did what was asked first.
    Drained,
    /// The generation was ended from outside.
    Aborted(String),
}

/// Trains as `membership` says. `advertise` is this host's address for its peers.
pub fn train(
    bench: &mut Workbench,
    membership: &Membership,
    advertise: IpAddr,
    current: &Current,
) -> Result<Outcome, Fault> {
    let group = &membership.group;
    let (listener, address) = TcpRing::listen(advertise).or_fault(FailureClass::Io)?;
    bench.link.send(Event::GroupReady {
        group: group.clone(),
        rank: membership.rank,
        address: address.to_string(),
    });
    let mut stage = StageWork::prepare(bench, membership)?;
    stage.tell(bench, membership, Phase::Exchanging);
    let peers = match wait_for_peers(&mut bench.inbox, membership) {
        Ok(peers) => peers,
        Err(outcome) => return Ok(outcome),
    };
    let mut ring = match join(bench, listener, membership, &peers) {
        Ok(ring) => ring,
        Err(error) => return ended_or(bench, group, collective_fault(error)),
    };
    let ended = current.enter(group, ring.aborter());
    let outcome = stage.run(bench, membership, ring.as_mut(), ended);
    current.leave();
    outcome
}

/// Everything of a stage that one generation needs.
struct StageWork {
    recipe: recipe::Stage,
    teacher: Rc<TeacherModel>,
    student: Student,
    trainer: Trainer,
    objective: Box<dyn distill::Objective>,
    rows: Rc<RefCell<StoredRows>>,
    curves: Vec<StepRecord>,
    training: Training,
}

impl StageWork {
    fn prepare(bench: &mut Workbench, membership: &Membership) -> Result<Self, Fault> {
        let name = &membership.group.stage;
        let number = bench
            .recipe
            .stages
            .iter()
            .position(|stage| stage.name == *name);
        let number = number
            .ok_or_else(|| Fault::config(format!("the recipe has no training stage {name:?}")))?;
        let recipe = bench.recipe.stages[number].clone();
        check_dtype(recipe.compute.dtype)?;
        let teacher = bench.teacher(bench.recipe.teacher.dtype)?;
        let student = Student::fresh(&teacher, &recipe, bench.recipe.seed, bench.device)?;
        let parent = open(bench, membership.parent_checkpoint.as_deref())?;
        if let Some(parent) = &parent {
            student.load_published(&bench.io, parent)?;
        }
        let mut trainer = Trainer::new(train::Plan::from(&recipe), student.parameters());
        let base = open(bench, membership.base_checkpoint.as_deref())?;
        let mut curves = Vec::new();
        if let Some(base) = &base {
            let metrics = bench.io.wait(base.metrics())?;
            curves = from_jsonl(&metrics).or_fault(FailureClass::Schema)?;
            restore(bench, &mut trainer, base, &curves)?;
        }
        check_start(&trainer, membership)?;
        let (dataset, digest) = open_dataset(bench)?;
        let objective = distill::objective(
            &recipe,
            teacher.schedule.to_device(bench.device),
            teacher.prediction,
        )
        .or_fault(FailureClass::Config)?;
        let order = Order {
            seed: bench.recipe.seed,
            stage: number as u64,
            rows: dataset.rows(),
            global_batch: recipe.batch.global,
        };
        let spec = Spec {
            order,
            rank: membership.rank,
            world: membership.world,
            steps: membership.base_step..recipe.steps,
            ahead: STEPS_AHEAD,
        };
        let time_ids = tch::no_grad(|| teacher.parts.null_conditioning(1).time_ids);
        let rows = StoredRows::start(
            &bench.io.handle(),
            Arc::new(dataset),
            spec,
            time_ids,
            bench.device,
        );
        let training = training_of(bench, &recipe, &teacher, digest, membership)?;
        let rows = Rc::new(RefCell::new(rows));
        Ok(Self {
            recipe,
            teacher,
            student,
            trainer,
            objective,
            rows,
            curves,
            training,
        })
    }

    /// Steps until the last one, and commits what must be committed.
    fn run(
        &mut self,
        bench: &mut Workbench,
        membership: &Membership,
        ring: &mut dyn Collective,
        ended: Ended,
    ) -> Result<Outcome, Fault> {
        let group = &membership.group;
        self.tell(bench, membership, Phase::Syncing);
        let agreed = ring.agree(&self.state_digest().0).map_err(collective_fault);
        if let Err(fault) = agreed {
            return ended_or(bench, group, fault);
        }
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
        };
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
            Rc::clone(&self.rows),
            std::mem::take(&mut self.curves),
        );
        let source = Rc::clone(&self.rows);
        let result = self.trainer.run(
            self.objective.as_ref(),
            &self.student.unet,
            online,
            ring,
            &mut SharedRows(source),
            &mut saver,
        );
        let finished = self.trainer.position().step == self.recipe.steps;
        if finished && result.is_ok() {
            return saver
                .save_now(&self.trainer)
                .map(|()| Outcome::Finished)
                .map_err(Fault::from);
        }
        let wanted = saver.wanted_checkpoint();
        if let Some(checkpoint) = wanted {
            // The last applied step is whole, whatever a leaving neighbour did to the one after it.
            if checkpoint {
                saver.save_now(&self.trainer)?;
            }
            return Ok(Outcome::Drained);
        }
        drop(saver);
        match result {
            Ok(()) => ended_or(
                bench,
                group,
                Fault::new(FailureClass::Stale, "training stopped early"),
            ),
            Err(error) => ended_or(bench, group, train_fault(error)),
        }
    }

    /// Names the state that all members must hold before the first step.
    fn state_digest(&self) -> Digest {
        self.trainer.digest()
    }

    fn tell(&self, bench: &Workbench, membership: &Membership, phase: Phase) {
        bench.link.send(Event::GroupProgress(Progress {
            group: membership.group.clone(),
            phase,
            step: membership.base_step,
            total_steps: self.recipe.steps,
            loss: self.curves.iter().rev().find_map(|r| r.loss).unwrap_or(0.0),
            samples_per_second: 0.0,
            step_ms: 0.0,
        }));
    }
}

/// A source that the saver can ask how long it waited.
struct SharedRows(Rc<RefCell<StoredRows>>);

impl train::Source for SharedRows {
    fn rows(&mut self, positions: std::ops::Range<u64>) -> anyhow::Result<distill::Rows> {
        self.0.borrow_mut().rows(positions)
    }
}

/// Between two steps: has the worker asked for an end?
struct InboxWatch<'a> {
    inbox: &'a mut Inbox,
    ended: Ended,
}

impl Watch for InboxWatch<'_> {
    fn must_stop(&mut self) -> bool {
        self.ended.is_set() || self.inbox.draining().is_some()
    }

    fn wanted_checkpoint(&mut self) -> Option<bool> {
        if self.ended.is_set() {
            None
        } else {
            self.inbox.draining()
        }
    }
}

/// Waits until every member listens; an abort or a drain ends the wait.
fn wait_for_peers(inbox: &mut Inbox, membership: &Membership) -> Result<Vec<String>, Outcome> {
    let group = &membership.group;
    let ours = |c: &Command| matches!(c, Command::Peers { group: g, .. } if g == group);
    loop {
        if let Some(Command::Peers { addresses, .. }) = inbox.next_matching(GLANCE, ours) {
            return Ok(addresses);
        }
        if let Some(reason) = inbox.aborted(group) {
            return Err(Outcome::Aborted(reason));
        }
        if inbox.draining().is_some() {
            return Err(Outcome::Drained);
        }
    }
}

fn join(
    bench: &Workbench,
    listener: Listener,
    membership: &Membership,
    peers: &[String],
) -> Result<Box<dyn Collective>, collective::Error> {
    if membership.world == 1 {
        return Ok(Box::new(Solo::default()));
    }
    let ring = listener.connect(&Invitation {
        group: &membership.group,
        rank: membership.rank,
        peers,
        token: bench.setup.group_secret.0,
        deadline: DEADLINE,
    })?;
    Ok(Box::new(ring))
}

/// A fault that an abort from outside explains is no fault.
fn ended_or(bench: &mut Workbench, group: &GroupId, fault: Fault) -> Result<Outcome, Fault> {
    // The abort may still be on its way: the coordinator hears of a lost member when we do.
    let ours = |c: &Command| matches!(c, Command::Abort { group: g, .. } if g == group);
    match bench.inbox.next_matching(GLANCE, ours) {
        Some(Command::Abort { reason, .. }) => Ok(Outcome::Aborted(reason)),
        _ => Err(fault),
    }
}

fn collective_fault(error: collective::Error) -> Fault {
    let class = match &error {
        collective::Error::Disagree { .. } => FailureClass::Diverged,
        collective::Error::NcclNotFound { .. } => FailureClass::Config,
        collective::Error::PeerLost { .. }
        | collective::Error::Timeout { .. }
        | collective::Error::Aborted
        | collective::Error::OutOfStep { .. }
        | collective::Error::Setup { .. }
        | collective::Error::Nccl { .. } => FailureClass::Collective,
    };
    Err::<(), _>(error)
        .or_fault(class)
        .expect_err("it is an error")
}

fn train_fault(error: train::Error) -> Fault {
    match error {
        train::Error::Group { source, .. } => collective_fault(source),
        train::Error::Diverged { .. } => Err::<(), _>(error)
            .or_fault(FailureClass::Diverged)
            .expect_err("it is an error"),
        train::Error::Handover { .. } => Err::<(), _>(error)
            .or_fault(FailureClass::Io)
            .expect_err("it is an error"),
    }
}

/// The checkpoint that `commit` names, if it names one.
fn open(bench: &Workbench, commit: Option<&str>) -> Result<Option<Checkpoint>, Fault> {
    let opened = commit.map(|commit| bench.io.wait(Checkpoint::open(&bench.store, commit)));
    Ok(opened.transpose()?)
}

/// Fills the trainer from `state`, one file of it in memory at a time.
fn restore(
    bench: &Workbench,
    trainer: &mut Trainer,
    state: &Checkpoint,
    curves: &[StepRecord],
) -> Result<(), Fault> {
    let mut restoring = Restoring::new(trainer);
    bench.io.wait(state.read(
        |_| true,
        |spec, bytes| {
            let values = f32_tensor(spec, bytes)?;
            restoring
                .take(part_of_kind(spec.kind), &spec.name, &values)
                .or_fault(FailureClass::Schema)
        },
    ))?;
    restoring
        .finish(position(curves))
        .or_fault(FailureClass::Schema)
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
