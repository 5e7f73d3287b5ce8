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
/// Share of a stage, and time in it, from which its pace is worth telling; and the time from which it is told anyway.
const TELLING: f64 = 0.03;
const SOON: Duration = Duration::from_secs(5);
const LATE: Duration = Duration::from_secs(60);
/// Most characters of a bar; a sixth of a narrow terminal.
const BAR: usize = 24;
/// Characters in a line where the terminal does not tell its width.
const WIDTH: usize = 80;
/// Lines where it does not tell its height.
const HEIGHT: usize = 24;

/// Shows the run until its driver ends.
pub(super) async fn show(handle: Handle, resumed: bool) {
    if resumed {
        console::note("resuming");
    }
    // The bars have no colours, so that NO_COLOR says nothing about them.
    let live = std::io::stderr().is_terminal();
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
    note: String,
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
        // The first steps of a stage say little: workers load, and the first tasks all end at once.
        let is_telling = (done >= TELLING && spent >= SOON) || spent >= LATE;
        if done <= 0.0 || !is_telling {
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
            .filter(|stage| is_active(stage))
            .collect();
        // Stages that wait for workers are worth a word only while no other has them.
        let waits = |stage: &StageView| stage.state == "gathering";
        let all_wait = started.iter().all(|stage| waits(stage));
        let lines: Vec<_> = started
            .into_iter()
            .filter(|stage| all_wait || !waits(stage))
            .map(|stage| format!("{}: {}", stage.name, describe(stage)))
            .collect();
        let line = lines.join("; ");
        if !line.is_empty() && line != self.last {
            let left = self.left(snapshot).map(clock).unwrap_or_default();
            console::note(format_args!("{} {line}{left}", hms(snapshot.elapsed)));
            self.last = line;
        }
        let note = snapshot.view.note.clone().unwrap_or_default();
        if note != self.note && !note.is_empty() {
            console::note(format_args!("{} {note}", hms(snapshot.elapsed)));
        }
        self.note = note;
    }

    fn redraw(&mut self, snapshot: &Snapshot) {
        let size = terminal_size::terminal_size_of(std::io::stderr());
        let (width, height) = size.map_or((WIDTH, HEIGHT), |(width, height)| {
            (usize::from(width.0), usize::from(height.0))
        });
        let lines = frame(snapshot, self.left(snapshot), width, height);
        let mut text = String::new();
        if self.lines > 0 {
            text.push_str(&format!("\x1b[{}A", self.lines));
        }
        for line in &lines {
            text.push_str(&format!("\x1b[2K{line}\n"));
        }
        // A frame that was longer leaves nothing below.
        text.push_str("\x1b[J");
        self.lines = lines.len();
        console::draw(&text);
    }
}

/// The lines of the live display, none as long as the terminal is wide: one that wraps would be two to the terminal
/// and one to the next redraw. Where not all stages fit, those at work are shown.
fn frame(snapshot: &Snapshot, left: Option<Duration>, width: usize, height: usize) -> Vec<String> {
    let view = &snapshot.view;
    let taken = 2 + usize::from(view.note.is_some());
    let room = height.saturating_sub(taken).max(1);
    let fits = view.stages.len() <= room;
    let shown = view.stages.iter().filter(|stage| fits || is_active(stage));
    let bar = (width / 6).clamp(4, BAR);
    let mut lines: Vec<String> = shown
        .take(room)
        .map(|stage| {
            let filled = (fraction(stage) * bar as f64) as usize;
            let (done, open) = ("█".repeat(filled), "░".repeat(bar - filled));
            format!("{:<12} {done}{open} {}", stage.name, describe(stage))
        })
        .collect();
    let busy = view.workers.iter().filter(|w| w.state == "busy").count();
    lines.push(format!(
        "{} {} · {busy} of {} workers busy{}",
        hms(snapshot.elapsed),
        view.state,
        view.workers.len(),
        left.map(clock).unwrap_or_default()
    ));
    lines.extend(view.note.clone());
    lines.iter().map(|line| cut(line, width)).collect()
}

/// `line` with less than `width` characters.
fn cut(line: &str, width: usize) -> String {
    let most = width.saturating_sub(1);
    if line.chars().count() <= most {
        return line.to_owned();
    }
    let kept = line.chars().take(most.saturating_sub(1));
    kept.chain(['…']).take(most).collect()
}

fn active(snapshot: &Snapshot) -> Option<&StageView> {
    snapshot.view.stages.iter().find(|stage| is_active(stage))
}

fn is_active(stage: &StageView) -> bool {
    !["blocked", "sealed"].contains(&stage.state)
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
    text
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
    use distillery_common::group::{GroupId, Phase, Progress};
    use distillery_common::ids::{Generation, Term};

    use super::*;
    use crate::scheduler::View;

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

    #[test]
    fn no_line_of_the_live_display_wraps() {
        let training = StageView {
            kind: Kind::Distill,
            state: "training",
            done: 11_999,
            total: 12_000,
            group: Some(Progress {
                group: GroupId {
                    stage: "trajectories".into(),
                    generation: Generation(1),
                },
                phase: Phase::Stepping,
                step: 11_999,
                total_steps: 12_000,
                loss: 0.1234,
                samples_per_second: 1234.0,
                step_ms: 1234.0,
            }),
            world: 8,
            ..stage(0, (0, 0))
        };
        let view = View {
            term: Term(1),
            state: "running".into(),
            stages: vec![training; 9],
            workers: vec![],
            note: Some("a stage waits for workers, and for this line to be cut ".repeat(5)),
        };
        let snapshot = Snapshot {
            view,
            elapsed: Duration::from_secs(3_599),
            decisions: vec![],
            failures: vec![],
        };
        for (width, height) in [(20, 24), (40, 24), (80, 24), (200, 24), (80, 5)] {
            let lines = frame(&snapshot, Some(Duration::from_secs(60)), width, height);
            assert!(lines.len() < height, "{width} x {height}: {lines:?}");
            for line in lines {
                assert!(line.chars().count() < width, "{width} x {height}: {line}");
            }
        }
        let lines = frame(&snapshot, None, 200, 24);
        assert!(lines[0].ends_with("world 8"), "{}", lines[0]);
        assert_eq!(lines[0].matches("trajectories").count(), 1, "{}", lines[0]);
    }
}
