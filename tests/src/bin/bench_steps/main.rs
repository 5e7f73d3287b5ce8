//! `make bench-steps`: what a step of the demo's first stage takes with 1, 2 and 4 real engines on this machine, and where
//! its time goes.
//!
//! Every figure is of a run of the shipping programs over the same rows: the median step of its curve, which rank 0 writes,
//! and of the parts of that step that rows and the group's operations took. In an operation a rank also waits for the
//! others, so the time of the sum alone is at most what is shown. The runs take turns, round by round.
//!
//! Then a longer run is watched from its first step to its last: the coordinator's own counters tell what passed between it
//! and the workers. The last line says how much of it was no heartbeat; the exit code is 1 when anything was.

mod messages;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use distillery_common::curves::{StepRecord, from_jsonl};
use distillery_tests::harness::{EngineKind, Run};

/// Longest that a run may take.
const PATIENCE: Duration = Duration::from_secs(900);
/// Steps at the start of a run that are not counted: memory is touched and rows are read for the first time.
const WARM_UP: usize = 8;

/// What a step takes.
#[derive(Debug, Parser)]
#[command(name = "bench-steps")]
struct Arguments {
    /// Steps of a run.
    #[arg(long, default_value_t = 48)]
    steps: usize,
    /// Rounds of all runs.
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Numbers of engines, each with one thread.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4")]
    engines: Vec<u32>,
    /// What is trained: full or lora.
    #[arg(long, default_value = "full")]
    student: String,
    /// Steps of a run of two engines whose messages are counted.
    #[arg(long, default_value_t = 10_000)]
    messages: usize,
}

/// One way to take the same steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Way {
    engines: u32,
    threads: u32,
    sharded: bool,
    reproducible: bool,
}

impl Way {
    fn plain(engines: u32) -> Self {
        Self {
            engines,
            threads: 1,
            sharded: false,
            reproducible: false,
        }
    }

    /// What is compared with [`Self::plain`].
    fn all(engines: &[u32]) -> Vec<Self> {
        let mut ways = Vec::new();
        for &engines in engines {
            let plain = Self::plain(engines);
            ways.push(plain);
            if engines == 1 {
                ways.push(Self {
                    threads: 2,
                    ..plain
                });
            } else {
                ways.push(Self {
                    sharded: true,
                    ..plain
                });
            }
            ways.push(Self {
                reproducible: true,
                ..plain
            });
        }
        ways
    }

    fn recipe(self, steps: usize, student: &str, rows: &str) -> String {
        include_str!("../../../recipes/steps.yaml")
            .replace("{rows}", rows)
            .replace("{student}", student)
            .replace("{sharded}", &self.sharded.to_string())
            .replace("{reproducible}", &self.reproducible.to_string())
            .replace("{threads}", &self.threads.to_string())
            .replace("{steps}", &steps.to_string())
            .replace("{engines}", &self.engines.to_string())
    }
}

/// Medians of one run, in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Figures {
    step: f64,
    rows: f64,
    group: f64,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    anyhow::ensure!(arguments.steps > 2 * WARM_UP, "too few steps to count");
    let folder = tempfile::tempdir()?;
    // Rows belong to the number of threads that drew them.
    let mut drawn: BTreeMap<u32, String> = BTreeMap::new();
    let ways = Way::all(&arguments.engines);
    let mut found: BTreeMap<Way, Vec<Figures>> = BTreeMap::new();
    for _ in 0..arguments.rounds {
        for &way in &ways {
            if let Entry::Vacant(place) = drawn.entry(way.threads) {
                let rows = draw(way.threads, &arguments, folder.path());
                place.insert(rows.context("drawing trajectories")?);
            }
            let figures = measure(way, &arguments, &drawn[&way.threads])
                .with_context(|| format!("{way:?}"))?;
            eprintln!("{way:?}: {figures:?}");
            found.entry(way).or_default().push(figures);
        }
    }
    println!(
        "{:>7} {:>7} {:>7} {:>12}  {:>8} {:>8} {:>8} {:>7}  of one engine, and of the plain way",
        "engines", "threads", "moments", "reproducible", "step ms", "rows ms", "group ms", "group"
    );
    let middle = |way: Way| found.get(&way).map(|all| overall(all));
    for way in ways {
        let Some(figures) = middle(way) else {
            continue;
        };
        let beside = |other: Way| {
            middle(other).map_or_else(
                || "-".to_owned(),
                |o| format!("{:.2}", figures.step / o.step),
            )
        };
        println!(
            "{:>7} {:>7} {:>7} {:>12}  {:>8.1} {:>8.2} {:>8.2} {:>6.1}%  {} {}",
            way.engines,
            way.threads,
            if way.sharded { "shared" } else { "whole" },
            way.reproducible,
            figures.step,
            figures.rows,
            figures.group,
            100.0 * figures.group / figures.step,
            beside(Way::plain(1)),
            beside(Way::plain(way.engines)),
        );
    }
    let rows = match drawn.remove(&1) {
        Some(rows) => rows,
        None => draw(1, &arguments, folder.path())?,
    };
    tell_messages(&arguments, &rows)
}

/// Counts the messages of a longer run and says how many there were.
fn tell_messages(arguments: &Arguments, rows: &str) -> anyhow::Result<ExitCode> {
    let folder = tempfile::tempdir()?;
    let recipe = Way::plain(2).recipe(arguments.messages, &arguments.student, rows);
    // What a step holds changes nothing of what is said about it.
    let recipe = recipe.replace("global: 64", "global: 2");
    let counted = messages::count(&recipe, folder.path(), arguments.messages)?;
    let (steps, beats) = (counted.steps, counted.beats);
    let others: u64 = counted.others.values().sum();
    println!(
        "{beats} heartbeats and answers to them in {steps} steps of two engines; others: {:?}",
        counted.others
    );
    println!(
        "bench-steps: {others} messages between coordinator and workers in {steps} steps, heartbeats aside (goal 0)"
    );
    let enough = 10 * steps >= 9 * arguments.messages as u64;
    Ok(if others == 0 && enough {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Draws the rows that engines with so many threads train on, in a run that takes no more than one step.
fn draw(threads: u32, arguments: &Arguments, folder: &Path) -> anyhow::Result<String> {
    let way = Way {
        threads,
        ..Way::plain(1)
    };
    let folder = folder.join(threads.to_string());
    std::fs::create_dir(&folder)?;
    let recipe = way.recipe(1, &arguments.student, "none");
    let mut run = Run::new(&folder, &recipe, EngineKind::Real)?;
    run.finish(PATIENCE)?;
    Ok(run.output().display().to_string())
}

/// Takes the steps in `way`.
fn measure(way: Way, arguments: &Arguments, rows: &str) -> anyhow::Result<Figures> {
    let folder = tempfile::tempdir()?;
    let recipe = way.recipe(arguments.steps, &arguments.student, rows);
    let mut run = Run::new(folder.path(), &recipe, EngineKind::Real)?;
    run.finish(PATIENCE)?;
    let curve = run.output().join(format!(
        "checkpoints/seg8/{:010}-g1/metrics.jsonl",
        arguments.steps
    ));
    let curve = std::fs::read(&curve).with_context(|| curve.display().to_string())?;
    let steps = from_jsonl(&curve)?;
    let counted = steps.get(WARM_UP..).context("steps")?;
    let median_of = |of: &dyn Fn(&StepRecord) -> f64| median(counted.iter().map(of).collect());
    Ok(Figures {
        step: median_of(&|step| step.step_ms),
        rows: median_of(&|step| step.wait_ms),
        group: median_of(&|step| step.sum_ms.unwrap_or(0.0)),
    })
}

/// The medians of all rounds.
fn overall(rounds: &[Figures]) -> Figures {
    let of = |value: &dyn Fn(&Figures) -> f64| median(rounds.iter().map(value).collect());
    Figures {
        step: of(&|f| f.step),
        rows: of(&|f| f.rows),
        group: of(&|f| f.group),
    }
}

/// The middle of an odd number of values, the mean of the two in the middle of an even one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let upper = values.len() / 2;
    let lower = (values.len() - 1) / 2;
    f64::midpoint(values[lower], values[upper])
}
