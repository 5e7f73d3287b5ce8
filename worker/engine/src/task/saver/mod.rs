//! What happens after each training step: curves, progress, and checkpoints that training does not wait for.
//!
//! A checkpoint stalls training for one copy of the state; the rest (digests, upload, COMMIT) happens on the IO threads,
//! which read that copy a few MiB at a time. One is in flight at a time: when the next is due meanwhile it is left out and
//! counted, never queued.

mod upload;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use distillery_common::backoff::Backoff;
use distillery_common::checkpoint::{Share, Training};
use distillery_common::curves::{StepRecord, finite, to_jsonl};
use distillery_common::group::{Membership, Phase, Progress};
use distillery_common::storage::{self, Store, layout};
use distillery_common::task::{Failure, FailureClass};
use distillery_common::telemetry::{Stopwatch, peak_memory};
use tokio::task::JoinHandle;

use self::upload::{Saved, Upload, places_of};
pub use self::upload::{kind_of_part, part_of_kind};
use super::rows::StoredRows;
use crate::io::Io;
use crate::link::{Event, Link};
use crate::train::snapshot::{Position, Snapshot};
use crate::train::{Control, Notice, Sink, StepReport, Trainer};

/// Steps between two reports of progress to the worker.
const PROGRESS_EVERY: u64 = 5;
/// Steps that the shown loss is averaged over.
const SHOWN_STEPS: usize = 20;

/// How long rank 0 waits for the other shares of a checkpoint, and the others, when they leave, for it to be committed.
const SHARES: Duration = Duration::from_secs(300);
/// As [`SHARES`], of an engine that is told to end when its group is broken: the others may write none.
const LAST_SHARES: Duration = Duration::from_secs(10);
/// How often, and after which pause, a rank that lost its group looks whether it was told to end as well.
const GLANCES: u32 = 10;
const GLANCE: Duration = Duration::from_millis(100);

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
    /// Whether every rank writes a share of each checkpoint.
    pub sharded: bool,
    /// Where the time of the group's operations adds up.
    pub summed: Rc<Cell<Duration>>,
}

/// How the device thread asks, between two steps, whether to go on.
pub trait Watch {
    /// Whether the group was ended from outside.
    fn is_over(&mut self) -> bool;

    /// Whether the engine is told to end, and if so, whether with a checkpoint.
    fn wanted_checkpoint(&mut self) -> Option<bool>;
}

/// Rank 0 saves, or every rank its share; every rank keeps the curves and reports progress.
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
    /// What the members agreed on in their last step: to leave after it, and whether with a checkpoint.
    agreed: Option<bool>,
    /// Checkpoints left out because one was in flight.
    pub left_out: u64,
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
            agreed: None,
            left_out: 0,
        }
    }

    /// Saves the trainer's state now, or this rank's share of it, and waits for that.
    pub fn save_now(&mut self, trainer: &Trainer) -> Result<(), Failure> {
        self.save_within(SHARES, trainer)
    }

    /// What a member owes that leaves before the stage's last step. True if this engine was told to end.
    ///
    /// Where all agreed on a checkpoint, those who were not told to end do their part too: they may be told a moment later, and
    /// of a state in shares those who go have the rest. Nobody is gone before the COMMIT is there, since whoever goes ends the
    /// group, also for those who are still writing.
    pub fn take_leave(&mut self, trainer: &Trainer) -> Result<bool, Failure> {
        let (wants, patience) = match self.agreed {
            Some(checkpoint) => (checkpoint, SHARES),
            None => (self.wanted_checkpoint() == Some(true), LAST_SHARES),
        };
        // The last applied step is whole, whatever became of the one after it, but for shared moments.
        if wants && !trainer.is_torn() && !self.watch.is_over() {
            self.save_within(patience, trainer)?;
            let writes = self.share().is_some() || self.agreed.is_some();
            if writes && self.place.membership.rank != 0 {
                self.await_commit(trainer.position().step, patience);
            }
        }
        Ok(self.watch.wanted_checkpoint().is_some())
    }

    fn save_within(&mut self, patience: Duration, trainer: &Trainer) -> Result<(), Failure> {
        let step = trainer.position().step;
        if step == 0 {
            return Ok(());
        }
        // It may take longer than steps do.
        self.report_progress(Phase::Sealing, step);
        if let Err(failure) = self.settle(true) {
            tracing::warn!(%failure, "an earlier checkpoint came to nothing");
        }
        if self.saved_step != Some(step) {
            self.begin(trainer, patience);
        }
        self.settle(true)
    }

    /// Waits until rank 0 has committed `step`, or nothing can come of it any more.
    fn await_commit(&mut self, step: u64, patience: Duration) {
        let group = &self.place.membership.group;
        let folder = layout::checkpoint(&group.stage, step, group.generation);
        let commit = layout::commit(&folder);
        let mut pause = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
        let mut waited = Duration::ZERO;
        while waited < patience && !self.watch.is_over() {
            match self.io.wait(self.store.get(&commit)) {
                Ok(_) => return,
                Err(storage::Error::NotFound { .. }) => {}
                Err(error) => tracing::warn!(%error, "looking for a COMMIT"),
            }
            let delay = pause.next_delay(0.5);
            std::thread::sleep(delay);
            waited += delay;
        }
    }

    /// Saves a state that a checkpoint was due of and that no checkpoint holds: the generation before this one was
    /// ended too early for it.
    pub fn catch_up(&mut self, trainer: &Trainer) {
        let step = trainer.position().step;
        let is_new = step > self.place.membership.base_step;
        if is_new && step.is_multiple_of(self.place.every_steps) && step < self.place.steps {
            self.begin(trainer, SHARES);
        }
    }

    /// The curves of the whole stage so far.
    pub fn into_curves(self) -> Vec<StepRecord> {
        self.curves
    }

    /// As [`Watch::wanted_checkpoint`], of a group that broke. Where every rank has to write its share, one whose neighbour
    /// has left may have been told to leave with it, and hears of it a moment later.
    fn wanted_checkpoint(&mut self) -> Option<bool> {
        if self.place.sharded && self.place.membership.world > 1 {
            for _ in 0..GLANCES {
                if self.watch.is_over() || self.watch.wanted_checkpoint().is_some() {
                    break;
                }
                std::thread::sleep(GLANCE);
            }
        }
        self.watch.wanted_checkpoint()
    }

    /// This rank's share of a checkpoint: all of it on rank 0, or as much as everybody's.
    fn share(&self) -> Option<Share> {
        let Membership { rank, world, .. } = self.place.membership;
        match (self.place.sharded, rank) {
            (true, _) => Some(Share { rank, world }),
            (false, 0) => Some(Share::WHOLE),
            (false, _) => None,
        }
    }

    fn begin(&mut self, trainer: &Trainer, patience: Duration) {
        let Some(share) = self.share() else {
            return;
        };
        let recorded = self.curves.last().map_or(0, |record| record.step);
        assert_eq!(
            recorded,
            trainer.position().step,
            "every applied step is on record"
        );
        let stopwatch = Stopwatch::start();
        let mut buffer = self.buffer.take().unwrap_or_else(|| {
            let own = places_of(trainer, share);
            trainer.empty_share(&|_| own.clone())
        });
        trainer.snapshot(&mut buffer);
        let step = trainer.position().step;
        self.saved_step = Some(step);
        if let Some(last) = self.curves.last_mut() {
            last.peak_bytes = peak_memory();
        }
        let upload = Upload {
            store: self.store.clone(),
            link: self.link.clone(),
            membership: self.place.membership.clone(),
            training: self.place.training.clone(),
            share,
            buffer,
            curves: to_jsonl(&self.curves).into(),
            is_final: step == self.place.steps,
            patience,
        };
        self.in_flight = Some(self.io.spawn(upload.run()));
        self.stall = Some(stopwatch.elapsed());
    }

    /// Takes in an upload that has ended; with `wait`, waits for it first, for as long as the group is not ended from outside:
    /// then no COMMIT is granted any more, and an engine that waited on would be taken for one that hangs.
    fn settle(&mut self, wait: bool) -> Result<(), Failure> {
        let Some(mut upload) = self
            .in_flight
            .take_if(|upload| wait || upload.is_finished())
        else {
            return Ok(());
        };
        let saved = loop {
            let glance = async { tokio::time::timeout(GLANCE, &mut upload).await };
            match self.io.wait(glance) {
                Ok(saved) => break saved,
                Err(_) if self.watch.is_over() => {
                    upload.abort();
                    return Err(Failure {
                        class: FailureClass::Stale,
                        message: "the group was ended while a checkpoint was written".to_owned(),
                    });
                }
                Err(_) => {}
            }
        };
        let saved = saved.map_err(|error| Failure {
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
            sum_ms: Some(millis(self.place.summed.take())),
            save_ms: self.stall.take().map(millis),
            ..untimed(&self.place.membership, report)
        }
    }

    fn report_progress(&self, phase: Phase, step: u64) {
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
            phase,
            step,
            total_steps: self.place.steps,
            loss: mean(&|r| r.loss),
            samples_per_second: per_second * self.place.global_batch as f64,
            step_ms,
        }));
    }
}

impl Sink for Saver<'_> {
    fn notice(&mut self) -> Notice {
        Notice {
            leave: self.watch.wanted_checkpoint(),
            saving: self
                .in_flight
                .as_ref()
                .is_some_and(|upload| !upload.is_finished()),
        }
    }

    fn after_step(&mut self, trainer: &Trainer, report: &StepReport) -> anyhow::Result<Control> {
        let record = self.record(report);
        self.curves.push(record);
        let step = trainer.position().step;
        let is_first = !std::mem::replace(&mut self.stepped, true);
        if is_first || step.is_multiple_of(PROGRESS_EVERY) || step == self.place.steps {
            self.report_progress(Phase::Stepping, step);
        }
        // Before anything here can fail: the others count on this rank's part in what was agreed.
        self.agreed = report.notice.leave;
        self.settle(false)?;
        // Where all have to write, one that still does would be waited for: then nobody begins.
        let is_late = match self.place.sharded {
            true => report.notice.saving,
            false => self.in_flight.is_some(),
        };
        if step.is_multiple_of(self.place.every_steps) && step < self.place.steps {
            if is_late {
                self.left_out += 1;
            } else {
                self.begin(trainer, SHARES);
            }
        }
        Ok(if self.watch.is_over() {
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
        sum_ms: None,
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
            notice: Notice::default(),
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
