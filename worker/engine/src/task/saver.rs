//! What happens after each training step: curves, progress, and checkpoints that training does not wait for.
//!
//! A checkpoint stalls training for one copy of the state; the rest (digests, upload, COMMIT) happens on the IO threads,
//! which read that copy a few MiB at a time. One is in flight at a time: when the next is due meanwhile it is left out and
//! counted, never queued.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use distillery_common::checkpoint::{self, Dtype, Kind, StateSource, TensorSpec, Training};
use distillery_common::curves::{StepRecord, finite, to_jsonl};
use distillery_common::group::{CheckpointCommitted, Membership, Phase, Progress};
use distillery_common::ids::Digest;
use distillery_common::storage::Store;
use distillery_common::task::{Failure, FailureClass};
use distillery_common::telemetry::{Stopwatch, peak_memory};
use tokio::task::JoinHandle;

use super::rows::StoredRows;
use crate::io::Io;
use crate::link::{CommitOutcome, CommitRequest, Committed, Event, Link};
use crate::train::snapshot::{Part, Position, Snapshot};
use crate::train::{self, Control, Sink, StepReport, Trainer};

/// Steps between two reports of progress to the worker.
const PROGRESS_EVERY: u64 = 5;
/// Steps that the shown loss is averaged over.
const SHOWN_STEPS: usize = 20;

/// What a saver needs to know of the stage.
pub struct Place {
    /// The member's part in the group.
    pub membership: Membership,
    /// Steps of the stage.
    pub steps: u64,
    /// Steps between checkpoints.
    pub every_steps: u64,
    /// Rows of a step over all members.
    pub global_batch: u64,
    /// What the state belongs to.
    pub training: Training,
}

/// How the device thread asks, between two steps, whether to go on.
pub trait Watch {
    /// Whether training must stop here.
    fn must_stop(&mut self) -> bool;

    /// Whether the engine is told to end, and if so, whether with a checkpoint.
    fn wanted_checkpoint(&mut self) -> Option<bool>;
}

/// Rank 0 saves; every rank keeps the curves and reports progress.
pub struct Saver<'a> {
    io: &'a Io,
    store: Store,
    link: Link,
    place: Place,
    watch: &'a mut dyn Watch,
    rows: Rc<RefCell<StoredRows>>,
    curves: Vec<StepRecord>,
    buffer: Option<Snapshot>,
    in_flight: Option<JoinHandle<Saved>>,
    /// The newest step whose upload was begun here.
    saved_step: Option<u64>,
    stopwatch: Stopwatch,
    /// How long the last checkpoint kept the step that follows it waiting.
    stall: Option<Duration>,
    /// Whether a step was taken here.
    stepped: bool,
    /// Checkpoints left out because one was in flight.
    pub left_out: u64,
}

/// What a finished upload gives back.
struct Saved {
    buffer: Snapshot,
    outcome: Result<(), Failure>,
}

impl<'a> Saver<'a> {
    /// A saver whose curves begin with `curves`, those of the state that training starts from.
    pub fn new(
        io: &'a Io,
        store: Store,
        link: Link,
        place: Place,
        watch: &'a mut dyn Watch,
        rows: Rc<RefCell<StoredRows>>,
        curves: Vec<StepRecord>,
    ) -> Self {
        Self {
            io,
            store,
            link,
            place,
            watch,
            rows,
            curves,
            buffer: None,
            in_flight: None,
            saved_step: None,
            stopwatch: Stopwatch::start(),
            stall: None,
            stepped: false,
            left_out: 0,
        }
    }

    /// Commits the trainer's state now and waits for it; on ranks other than 0 nothing.
    pub fn save_now(&mut self, trainer: &Trainer) -> Result<(), Failure> {
        self.settle(true)?;
        let step = trainer.position().step;
        if self.saved_step != Some(step) && step > 0 {
            self.begin(trainer);
        }
        self.settle(true)
    }

    /// Saves a state that a checkpoint was due of and that no checkpoint holds: the generation before this one was
    /// ended too early for it.
    pub fn catch_up(&mut self, trainer: &Trainer) {
        let step = trainer.position().step;
        let is_new = step > self.place.membership.base_step;
        if is_new && step.is_multiple_of(self.place.every_steps) && step < self.place.steps {
            self.begin(trainer);
        }
    }

    /// The curves of the whole stage so far.
    pub fn into_curves(self) -> Vec<StepRecord> {
        self.curves
    }

    /// As [`Watch::wanted_checkpoint`].
    pub fn wanted_checkpoint(&mut self) -> Option<bool> {
        self.watch.wanted_checkpoint()
    }

    fn begin(&mut self, trainer: &Trainer) {
        if self.place.membership.rank != 0 {
            return;
        }
        let recorded = self.curves.last().map_or(0, |record| record.step);
        assert_eq!(
            recorded,
            trainer.position().step,
            "every applied step is on record"
        );
        let stopwatch = Stopwatch::start();
        let mut buffer = self
            .buffer
            .take()
            .unwrap_or_else(|| trainer.empty_snapshot());
        trainer.snapshot(&mut buffer);
        let step = trainer.position().step;
        self.saved_step = Some(step);
        if let Some(last) = self.curves.last_mut() {
            last.peak_bytes = peak_memory();
        }
        let upload = upload(
            self.store.clone(),
            self.link.clone(),
            self.place.membership.clone(),
            self.place.training.clone(),
            buffer,
            to_jsonl(&self.curves).into(),
            step == self.place.steps,
        );
        self.in_flight = Some(self.io.spawn(upload));
        self.stall = Some(stopwatch.elapsed());
    }

    /// Takes in an upload that has ended; with `wait`, waits for it first.
    fn settle(&mut self, wait: bool) -> Result<(), Failure> {
        let Some(upload) = self
            .in_flight
            .take_if(|upload| wait || upload.is_finished())
        else {
            return Ok(());
        };
        let saved = self.io.wait(upload).map_err(|error| Failure {
            class: FailureClass::Unknown,
            message: format!("saving a checkpoint broke off: {error}"),
        })?;
        self.buffer = Some(saved.buffer);
        saved.outcome
    }

    fn record(&mut self, report: &StepReport) -> StepRecord {
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        StepRecord {
            step_ms: millis(self.stopwatch.lap()),
            wait_ms: millis(self.rows.borrow_mut().take_waited()),
            save_ms: self.stall.take().map(millis),
            ..untimed(&self.place.membership, report)
        }
    }

    fn report_progress(&self, step: u64) {
        let recent = &self.curves[self.curves.len().saturating_sub(SHOWN_STEPS)..];
        let mean = |of: &dyn Fn(&StepRecord) -> Option<f64>| {
            let values: Vec<f64> = recent.iter().filter_map(of).collect();
            // Not a number where none of them is: that is what is shown then.
            values.iter().sum::<f64>() / values.len() as f64
        };
        let step_ms = mean(&|r| Some(r.step_ms));
        let per_second = 1e3 / step_ms.max(1e-6);
        self.link.send(Event::GroupProgress(Progress {
            group: self.place.membership.group.clone(),
            phase: Phase::Stepping,
            step,
            total_steps: self.place.steps,
            loss: mean(&|r| r.loss),
            samples_per_second: per_second * self.place.global_batch as f64,
            step_ms,
        }));
    }
}

impl Sink for Saver<'_> {
    fn after_step(&mut self, trainer: &Trainer, report: &StepReport) -> anyhow::Result<Control> {
        let record = self.record(report);
        self.curves.push(record);
        let step = trainer.position().step;
        let is_first = !std::mem::replace(&mut self.stepped, true);
        if is_first || step.is_multiple_of(PROGRESS_EVERY) || step == self.place.steps {
            self.report_progress(step);
        }
        self.settle(false)?;
        if step.is_multiple_of(self.place.every_steps) && step < self.place.steps {
            if self.in_flight.is_some() {
                self.left_out += 1;
            } else {
                self.begin(trainer);
            }
        }
        Ok(if self.watch.must_stop() {
            Control::Stop
        } else {
            Control::Continue
        })
    }
}

/// The record of a step, without its times.
fn untimed(membership: &Membership, report: &StepReport) -> StepRecord {
    let bin = |&(mean, count): &(f64, u64)| (count > 0).then_some(mean).and_then(finite);
    StepRecord {
        step: report.step + 1,
        generation: membership.group.generation.0,
        world: membership.world,
        loss: finite(report.loss),
        loss_by_segment: report.loss_by_segment.iter().map(bin).collect(),
        loss_by_time: report.loss_by_time.iter().map(bin).collect(),
        grad_norm: finite(report.grad_norm),
        lr: report.rate,
        skipped: report.skipped,
        rows: Some(report.rows),
        step_ms: 0.0,
        wait_ms: 0.0,
        save_ms: None,
        peak_bytes: None,
    }
}

/// Where a trainer stood whose curves are `curves`: how often it applied and skipped follows from them.
pub fn position(curves: &[StepRecord]) -> Position {
    let skipped = curves.iter().filter(|r| r.skipped).count() as u64;
    let step = curves.last().map_or(0, |r| r.step);
    Position {
        step,
        applied: step - skipped,
        skipped,
        skipped_in_a_row: curves.iter().rev().take_while(|r| r.skipped).count() as u32,
    }
}

async fn upload(
    store: Store,
    link: Link,
    membership: Membership,
    training: Training,
    buffer: Snapshot,
    curves: Bytes,
    is_final: bool,
) -> Saved {
    let outcome = write_and_commit(
        &store,
        &link,
        &membership,
        training,
        &buffer,
        curves,
        is_final,
    )
    .await;
    Saved { buffer, outcome }
}

async fn write_and_commit(
    store: &Store,
    link: &Link,
    membership: &Membership,
    training: Training,
    buffer: &Snapshot,
    curves: Bytes,
    is_final: bool,
) -> Result<(), Failure> {
    let group = &membership.group;
    let step = buffer.position.step;
    let manifest = checkpoint::write(
        store,
        &group.stage,
        step,
        group.generation,
        training,
        &State::of(buffer),
        curves,
    )
    .await
    .map_err(|error| Failure {
        class: FailureClass::Io,
        message: format!("saving step {step} of {}: {error}", group.stage),
    })?;
    let body = manifest.to_bytes();
    let key = manifest.commit_key();
    let request = CommitRequest {
        what: Committed::Checkpoint(CheckpointCommitted {
            group: group.clone(),
            step,
            key: key.as_str().to_owned(),
            digest: Digest::of(&body),
            bytes: manifest.total_bytes(),
            is_final,
        }),
        key,
        body,
        rows: 0,
        bytes: manifest.total_bytes(),
    };
    match link.commit_async(request).await {
        CommitOutcome::Won => Ok(()),
        CommitOutcome::Lost | CommitOutcome::Expired => Err(Failure {
            class: FailureClass::Stale,
            message: format!("{group} had ended before step {step} was committed"),
        }),
        CommitOutcome::Failed(message) => Err(Failure {
            class: FailureClass::Io,
            message: format!("committing step {step} of {group}: {message}"),
        }),
    }
}

/// A trainer's snapshot as checkpoints see it: its tensors' parts, places and values.
struct State<'a>(Vec<(Part, &'a train::flat::Place, &'a [f32])>);

impl<'a> State<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        Self(snapshot.entries().collect())
    }
}

const PARTS: [(Part, Kind); 4] = [
    (Part::Student, Kind::Student),
    (Part::Ema, Kind::Ema),
    (Part::AdamM, Kind::AdamM),
    (Part::AdamV, Kind::AdamV),
];

/// The kind of state that a part of a snapshot is stored as.
pub fn kind_of_part(part: Part) -> Kind {
    let (_, kind) = PARTS
        .iter()
        .find(|(p, _)| *p == part)
        .expect("every part has a kind");
    *kind
}

/// The part of a trainer that state of `kind` belongs to.
pub fn part_of_kind(kind: Kind) -> Part {
    let (part, _) = PARTS
        .iter()
        .find(|(_, k)| *k == kind)
        .expect("every kind has a part");
    *part
}

impl StateSource for State<'_> {
    fn tensors(&self) -> Vec<TensorSpec> {
        self.0
            .iter()
            .map(|(part, place, _)| TensorSpec {
                kind: kind_of_part(*part),
                name: place.name.clone(),
                dtype: Dtype::F32,
                shape: place.shape.iter().map(|&n| n as u64).collect(),
            })
            .collect()
    }

    fn copy(&self, index: usize, start: usize, out: &mut [u8]) {
        let (_, _, values) = self.0[index];
        for (bytes, value) in out.chunks_exact_mut(4).zip(&values[start / 4..]) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use distillery_common::curves::from_jsonl;
    use distillery_common::group::GroupId;
    use distillery_common::ids::{Generation, Term};
    use distillery_common::ledger::Ledger;

    use super::*;

    fn membership() -> Membership {
        Membership {
            group: GroupId {
                stage: "seg8".to_owned(),
                generation: Generation(1),
            },
            rank: 0,
            world: 1,
            base_step: 0,
            base_checkpoint: None,
            parent_checkpoint: None,
            term: Term(1),
        }
    }

    /// A step of loss `loss`, skipped where that is not finite.
    fn report(step: u64, loss: f64) -> StepReport {
        StepReport {
            step,
            loss,
            loss_by_segment: vec![(loss, 4), (0.0, 0)],
            loss_by_time: vec![(0.5, 1), (loss, 3)],
            grad_norm: loss,
            rate: 1e-4,
            rows: Ledger::of(0..4),
            skipped: !loss.is_finite(),
        }
    }

    #[test]
    fn curves_with_skipped_steps_can_be_resumed_from() {
        let losses = [0.5, f64::NAN, 0.25, f64::INFINITY];
        let curves: Vec<StepRecord> = std::iter::zip(0.., losses)
            .map(|(step, loss)| untimed(&membership(), &report(step, loss)))
            .collect();
        let read = from_jsonl(&to_jsonl(&curves)).expect("a checkpoint reads its own curves");
        assert_eq!(read, curves);
        assert_eq!(read[0].loss_by_segment, [Some(0.5), None]);
        assert_eq!((read[1].loss, read[1].grad_norm), (None, None));
        assert_eq!(read[1].loss_by_time, [Some(0.5), None]);
        let expected = Position {
            step: 4,
            applied: 2,
            skipped: 2,
            skipped_in_a_row: 1,
        };
        assert_eq!(position(&read), expected);
    }
}
