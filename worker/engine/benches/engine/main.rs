//! `make bench-engine`: the engine beside a PyTorch loop with diffusers and peft, on the same model, rows and threads
//! (F1, F2).
//!
//! The peer (`tests/python/bench_reference.py`) and our side (this program with `--ours`) are processes that hold the
//! same problem and answer the same requests. First both must find the same numbers. Then they take turns, and every
//! figure is the median over the rounds of the ratio within a round: machines are shared and noisy, absolute times only
//! orient.
//!
//! Goals are for both sides choosing their kernels freely. A third process shows what the worker's pin to one
//! instruction set, which makes hosts agree on every bit, leaves of them.

mod ours;
mod problem;
mod side;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;

use problem::Work;
use side::Side;

/// Largest relative difference of numbers that must be the same.
const SAME: f64 = 1e-3;
/// Rounds that are not counted: first steps allocate memory and choose kernels.
const WARM_UP: usize = 2;
/// Goals for time ours / time of the peer's LCM step: the ratio of their arithmetic.
const GOAL_FULL: f64 = 0.69;
const GOAL_LORA: f64 = 0.62;
/// Goal for guided evaluations per second, ours / peer.
const GOAL_GUIDED: f64 = 1.0;

/// The engine beside PyTorch.
#[derive(Debug, Parser)]
struct Arguments {
    /// Rounds that are counted.
    #[arg(long, default_value_t = 21)]
    rounds: usize,
    /// Threads of either side.
    #[arg(long, default_value_t = 2)]
    threads: i32,
    /// Rows of a batch.
    #[arg(long, default_value_t = 64)]
    rows: u64,
    /// Steps between two readings of the clock.
    #[arg(long, default_value_t = 2)]
    repeats: u32,
    /// Answer as our side for the problem in this folder.
    #[arg(long, hide = true)]
    ours: Option<PathBuf>,
    /// Cargo says this.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every goal is reached.
fn run(arguments: &Arguments) -> Result<bool> {
    if let Some(folder) = &arguments.ours {
        return ours::answer(folder).map(|()| true);
    }
    let folder = tempfile::tempdir().context("a temporary folder")?;
    let (folder, threads) = (folder.path(), arguments.threads);
    problem::write(folder, arguments.rows, threads, arguments.repeats)?;
    let mut bench = Bench {
        ours: Side::ours(folder, threads, false)?,
        pinned: Side::ours(folder, threads, true)?,
        peer: Side::peer(folder, threads)?,
        rounds: arguments.rounds,
    };
    for work in [Work::Guided, Work::MlcmFull, Work::MlcmLora] {
        bench.compare(work)?;
    }
    println!("{:42} {:>10} {:>10}  ratio", "", "ours", "PyTorch");
    let guided = bench.guided()?;
    let full = bench.steps("full", Work::MlcmFull, Work::LcmFull)?;
    let lora = bench.steps("LoRA", Work::MlcmLora, Work::LcmLora)?;
    println!(
        "bench-engine: F1 full {full:.2} LoRA {lora:.2}, F2 {guided:.2} (goal F1 <= {GOAL_FULL} / {GOAL_LORA}, \
         F2 >= {GOAL_GUIDED:.1})"
    );
    Ok(full <= GOAL_FULL && lora <= GOAL_LORA && guided >= GOAL_GUIDED)
}

struct Bench {
    ours: Side,
    pinned: Side,
    peer: Side,
    rounds: usize,
}

impl Bench {
    /// All sides do the same work, or no ratio means anything.
    fn compare(&mut self, work: Work) -> Result<()> {
        let peer = self.peer.check(work)?;
        for side in [&mut self.ours, &mut self.pinned] {
            let ours = side.check(work)?;
            let close = |(a, b): (&f64, &f64)| (a - b).abs() <= SAME * b.abs();
            ensure!(
                ours.len() == peer.len() && std::iter::zip(&ours, &peer).all(close),
                "{}: the engine finds {ours:?}, PyTorch {peer:?}",
                work.name()
            );
        }
        Ok(())
    }

    /// Guided evaluations per second: prints them, and gives the ratio.
    fn guided(&mut self) -> Result<f64> {
        let [ours, pinned, peer] = self.measure([
            (Who::Ours, Work::Guided),
            (Who::Pinned, Work::Guided),
            (Who::Peer, Work::Guided),
        ])?;
        line("guided evaluations, pinned", &pinned, &peer, Unit::Rate)?;
        line("guided evaluations", &ours, &peer, Unit::Rate)
    }

    /// Training steps: prints our step beside the same step and beside one of latent consistency distillation, and
    /// gives the ratio to the latter.
    fn steps(&mut self, student: &str, mlcm: Work, lcm: Work) -> Result<f64> {
        let [ours, pinned, same, peer] = self.measure([
            (Who::Ours, mlcm),
            (Who::Pinned, mlcm),
            (Who::Peer, mlcm),
            (Who::Peer, lcm),
        ])?;
        let of = |words: &str| format!("{student}: MLCM step / {words}");
        line(&of("the same"), &ours, &same, Unit::Time)?;
        line(&of("LCM step, pinned"), &pinned, &peer, Unit::Time)?;
        line(&of("LCM step"), &ours, &peer, Unit::Time)
    }

    /// Seconds of each work in every counted round. Who comes first changes from round to round, so that nobody always
    /// follows another's heat.
    fn measure<const N: usize>(&mut self, works: [(Who, Work); N]) -> Result<[Vec<f64>; N]> {
        let mut seconds = std::array::from_fn(|_| Vec::new());
        for round in 0..WARM_UP + self.rounds {
            for turn in 0..N {
                let at = (round + turn) % N;
                let (who, work) = works[at];
                let side = match who {
                    Who::Ours => &mut self.ours,
                    Who::Pinned => &mut self.pinned,
                    Who::Peer => &mut self.peer,
                };
                let measured = side.measure(work)?;
                if round >= WARM_UP {
                    seconds[at].push(measured);
                }
            }
        }
        Ok(seconds)
    }
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy)]
enum Who {
    /// The engine with any kernels.
    Ours,
    /// The engine as the worker runs it.
    Pinned,
    /// PyTorch.
    Peer,
}

/// What is compared.
#[derive(Debug, Clone, Copy)]
enum Unit {
    /// Times: less is better.
    Time,
    /// How often in a second: more is better.
    Rate,
}

/// Prints a line of the table, and gives the median ratio.
fn line(name: &str, ours: &[f64], peer: &[f64], unit: Unit) -> Result<f64> {
    let ratio = |(ours, peer): (&f64, &f64)| match unit {
        Unit::Time => ours / peer,
        Unit::Rate => peer / ours,
    };
    let shown = |seconds: &[f64]| {
        let median = Spread::of(seconds.iter().copied()).median;
        match unit {
            Unit::Time => format!("{:.1} ms", 1000.0 * median),
            Unit::Rate => format!("{:.2} /s", 1.0 / median),
        }
    };
    let (left, right) = (shown(ours), shown(peer));
    let Spread {
        least,
        median,
        most,
    } = Spread::of(std::iter::zip(ours, peer).map(ratio));
    println!("{name:42} {left:>10} {right:>10}  {median:.3} ({least:.3}..{most:.3})");
    std::io::stdout().flush()?;
    Ok(median)
}

/// Of at least one value.
struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (values[0], values[values.len() - 1]);
        let upper = values[values.len() / 2];
        let median = match values.len() % 2 {
            0 => (values[values.len() / 2 - 1] + upper) / 2.0,
            _ => upper,
        };
        Self {
            least,
            median,
            most,
        }
    }
}
