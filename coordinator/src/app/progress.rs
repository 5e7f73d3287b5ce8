//! Progress for people: a live display on a terminal, plain lines otherwise.

use std::io::IsTerminal as _;
use std::time::Duration;

use crate::console;
use crate::driver::{Handle, Snapshot};
use crate::plan::{Kind, grouped};
use crate::scheduler::StageView;

/// Between two drawings on a terminal, and between two plain lines.
const REDRAW: Duration = Duration::from_millis(500);
const LINE: Duration = Duration::from_secs(5);
/// Characters of a bar.
const BAR: usize = 24;

/// Shows the run until its driver ends.
pub(super) async fn show(handle: Handle, resumed: bool) {
    if resumed {
        console::note("resuming");
    }
    let live = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let mut display = Display::default();
    loop {
        tokio::time::sleep(if live { REDRAW } else { LINE }).await;
        let Ok(snapshot) = handle.snapshot().await else {
            return;
        };
        display.observe(&snapshot);
        if live {
            display.redraw(&snapshot);
        } else {
            display.print(&snapshot);
        }
    }
}

/// What was shown, and how fast each stage goes.
#[derive(Debug, Default)]
struct Display {
    lines: usize,
    last: String,
    pace: Option<Pace>,
}

/// The active stage's progress when it was first seen.
#[derive(Debug)]
struct Pace {
    stage: String,
    since: Duration,
    done: f64,
}

impl Display {
    fn observe(&mut self, snapshot: &Snapshot) {
        let Some(stage) = active(snapshot) else {
            return;
        };
        let done = fraction(stage);
        let is_known = self
            .pace
            .as_ref()
            .is_some_and(|pace| pace.stage == stage.name && pace.done <= done);
        if !is_known {
            self.pace = Some(Pace {
                stage: stage.name.clone(),
                since: snapshot.elapsed,
                done,
            });
        }
    }

    /// Time left in the active stage, at the pace since it was first seen.
    fn left(&self, snapshot: &Snapshot) -> Option<Duration> {
        let stage = active(snapshot)?;
        let pace = self.pace.as_ref().filter(|pace| pace.stage == stage.name)?;
        let done = fraction(stage) - pace.done;
        let spent = snapshot.elapsed.saturating_sub(pace.since);
        if done <= 0.0 || spent < Duration::from_secs(2) {
            return None;
        }
        let left = spent.as_secs_f64() * (1.0 - fraction(stage)) / done;
        Some(Duration::from_secs_f64(left.clamp(0.0, 1e8)))
    }

    fn print(&mut self, snapshot: &Snapshot) {
        let started: Vec<_> = snapshot
            .view
            .stages
            .iter()
            .filter(|stage| !["blocked", "sealed"].contains(&stage.state))
            .collect();
        // Stages that wait for workers are worth a word only while no other has them.
        let waits = |stage: &StageView| stage.state == "gathering";
        let all_wait = started.iter().all(|stage| waits(stage));
        let lines: Vec<_> = started
            .into_iter()
            .filter(|stage| all_wait || !waits(stage))
            .map(describe)
            .collect();
        let line = lines.join("; ");
        if !line.is_empty() && line != self.last {
            let left = self.left(snapshot).map(clock).unwrap_or_default();
            console::note(format_args!("{} {line}{left}", hms(snapshot.elapsed)));
            self.last = line;
        }
    }

    fn redraw(&mut self, snapshot: &Snapshot) {
        let mut frame = String::new();
        if self.lines > 0 {
            frame.push_str(&format!("\x1b[{}A", self.lines));
        }
        self.lines = 0;
        for stage in &snapshot.view.stages {
            let filled = (fraction(stage) * BAR as f64) as usize;
            let bar = format!("{}{}", "█".repeat(filled), "░".repeat(BAR - filled));
            frame.push_str(&format!(
                "\x1b[2K{:<14} {bar} {}\n",
                stage.name,
                describe(stage)
            ));
            self.lines += 1;
        }
        let busy = snapshot
            .view
            .workers
            .iter()
            .filter(|w| w.state == "busy")
            .count();
        let left = self.left(snapshot).map(clock).unwrap_or_default();
        frame.push_str(&format!(
            "\x1b[2K{} {} · {busy} of {} workers busy{left}\n",
            hms(snapshot.elapsed),
            snapshot.view.state,
            snapshot.view.workers.len(),
        ));
        self.lines += 1;
        console::draw(&frame);
    }
}

fn active(snapshot: &Snapshot) -> Option<&StageView> {
    snapshot
        .view
        .stages
        .iter()
        .find(|stage| !["blocked", "sealed"].contains(&stage.state))
}

/// Share of a stage that is done, tasks under way included.
fn fraction(stage: &StageView) -> f64 {
    let total = stage.total.max(1) as f64;
    let (part, whole) = stage.in_flight;
    // Leased tasks are not done; each worker's part counts as that part of one task.
    let under_way = if whole > 0 {
        part as f64 / whole as f64
    } else {
        0.0
    };
    ((stage.done as f64 + under_way) / total).clamp(0.0, 1.0)
}

fn describe(stage: &StageView) -> String {
    let unit = if stage.kind == Kind::Distill {
        "steps"
    } else {
        "tasks"
    };
    let mut text = format!(
        "{} {} of {} {unit}",
        stage.state,
        grouped(stage.done),
        grouped(stage.total)
    );
    if let Some(group) = &stage.group {
        text.push_str(&format!(
            ", loss {:.4}, {:.0} rows/s, {:.0} ms/step, world {}",
            group.loss, group.samples_per_second, group.step_ms, stage.world
        ));
    }
    format!("{}: {text}", stage.name)
}

fn clock(left: Duration) -> String {
    format!(" · about {} left in this stage", hms(left))
}

fn hms(time: Duration) -> String {
    let s = time.as_secs();
    format!("{:02}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(done: u64, in_flight: (u64, u64)) -> StageView {
        StageView {
            name: "trajectories".into(),
            kind: Kind::Trajectories,
            state: "active",
            done,
            total: 10,
            in_flight,
            group: None,
            world: 0,
        }
    }

    #[test]
    fn work_under_way_moves_the_bar_but_never_past_its_end() {
        assert_eq!(fraction(&stage(5, (0, 0))), 0.5);
        assert_eq!(fraction(&stage(5, (8, 16))), 0.55);
        assert_eq!(fraction(&stage(10, (16, 16))), 1.0);
    }
}
