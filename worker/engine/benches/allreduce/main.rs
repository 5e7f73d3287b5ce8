//! `make bench-allreduce`: the TCP ring beside Gloo, as PyTorch's process groups use it, on this machine's loopback (F5).
//!
//! Either side is one process per rank: this program with `--rank` for ours, `tests/python/bench_gloo.py` for Gloo. They
//! answer the same requests and take turns, so that whoever rests sleeps on its standard input; every figure is the median
//! over the rounds, of times of the slowest rank. First both sides must find the same sum.
//!
//! The ring turns pacing off between ranks of one host; Gloo takes what the machine is set to. Where that is BBR, a part of the
//! ratio is due to it: in a network namespace of its own with `net.ipv4.tcp_congestion_control=reno` both sides are without.
//!
//! The last lines show the sum along the fixed tree beside the plain one: what reproducible batches cost.

mod ours;
mod side;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;

use side::Side;

/// The least ratio of Gloo's time to ours, in any case, that is no failure.
const FLOOR: f64 = 1.0;
/// Rounds that are not counted: pages are touched and buffers of the kernel grow.
const WARM_UP: usize = 2;
/// Bytes that are reduced between two readings of the clock, so that small cases can be told from noise.
const BYTES_MEASURED: usize = 128 << 20;
/// Bytes of a mebibyte.
const MEBIBYTE: usize = 1 << 20;

/// The ring beside Gloo.
#[derive(Debug, Parser)]
struct Arguments {
    /// Rounds that are counted.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_value = "2,4")]
    worlds: Vec<u32>,
    /// Sizes of the buffer, in mebibytes.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64,256")]
    mebibytes: Vec<usize>,
    /// Leave Gloo out: only our times.
    #[arg(long)]
    alone: bool,
    /// Answer as this rank of ours.
    #[arg(long, hide = true, requires = "world")]
    rank: Option<u32>,
    /// Ranks of ours.
    #[arg(long, hide = true)]
    world: Option<u32>,
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

/// Whether every ratio reaches the floor.
fn run(arguments: &Arguments) -> Result<bool> {
    if let (Some(rank), Some(world)) = (arguments.rank, arguments.world) {
        return ours::answer(rank, world).map(|()| true);
    }
    println!(
        "{:>5} {:>8} {:>11} {:>11} {:>12}  ratio (least..most)",
        "ranks", "MiB", "ours", "Gloo", "ours, GB/s"
    );
    let mut least = f64::INFINITY;
    let mut tree = Vec::new();
    for &world in &arguments.worlds {
        let mut bench = Bench::start(world, arguments.alone)?;
        bench.compare()?;
        for &mebibytes in &arguments.mebibytes {
            let ratio = bench.case(mebibytes, arguments.rounds)?;
            least = least.min(ratio);
        }
        tree.push(bench.tree(arguments)?);
    }
    println!();
    tree.iter().for_each(|line| println!("{line}"));
    if arguments.alone {
        return Ok(true);
    }
    println!("bench-allreduce: {least:.2} (goal >= {FLOOR:.2})");
    Ok(least >= FLOOR)
}

/// Both sides with one number of ranks.
struct Bench {
    world: u32,
    ours: Side,
    gloo: Option<Side>,
}

impl Bench {
    fn start(world: u32, alone: bool) -> Result<Self> {
        let gloo = if alone {
            None
        } else {
            Some(Side::gloo(world)?)
        };
        let ours = Side::ours(world)?;
        Ok(Self { world, ours, gloo })
    }

    /// Both sides do the same work, or no ratio means anything.
    fn compare(&mut self) -> Result<()> {
        let ours = self.ours.ask("check")?;
        // Rank r brings r + 1 + i % 7 at place i; whole numbers are exact.
        let world = f64::from(self.world);
        let expected = (0..1000)
            .map(|i| world * (world + 1.0) / 2.0 + world * f64::from(i % 7))
            .sum::<f64>();
        ensure!(ours == expected, "the ring finds {ours}, not {expected}");
        if let Some(gloo) = &mut self.gloo {
            let theirs = gloo.ask("check")?;
            ensure!(theirs == expected, "Gloo finds {theirs}, not {expected}");
        }
        Ok(())
    }

    /// Prints a line of the table and gives the ratio.
    fn case(&mut self, mebibytes: usize, rounds: usize) -> Result<f64> {
        let bytes = mebibytes * MEBIBYTE;
        let request = request("sum", bytes);
        let (mut ours, mut gloo) = (Vec::new(), Vec::new());
        for round in 0..WARM_UP + rounds {
            // Who comes first changes, so that nobody always follows another's heat.
            let mut pair = [0.0; 2];
            for turn in 0..2 {
                let at = (round + turn) % 2;
                pair[at] = match (at, &mut self.gloo) {
                    (0, _) => self.ours.ask(&request)?,
                    (_, Some(gloo)) => gloo.ask(&request)?,
                    (_, None) => f64::NAN,
                };
            }
            if round >= WARM_UP {
                ours.push(pair[0]);
                gloo.push(pair[1]);
            }
        }
        let ratios: Vec<f64> = std::iter::zip(&ours, &gloo).map(|(o, g)| g / o).collect();
        let (least, ratio, most) = spread(ratios)?;
        let (_, ours, _) = spread(ours)?;
        let (_, gloo, _) = spread(gloo)?;
        println!(
            "{:>5} {mebibytes:>8} {:>8.2} ms {:>8.2} ms {:>12.2}  {ratio:.2} ({least:.2}..{most:.2})",
            self.world,
            1e3 * ours,
            1e3 * gloo,
            bytes as f64 / ours / 1e9,
        );
        std::io::stdout().flush()?;
        Ok(ratio)
    }

    /// The sum along the fixed tree beside the plain one, at the middle size.
    fn tree(&mut self, arguments: &Arguments) -> Result<String> {
        let mebibytes = arguments.mebibytes[arguments.mebibytes.len() / 2];
        let bytes = mebibytes * MEBIBYTE;
        let mut ratios = Vec::new();
        for round in 0..WARM_UP + arguments.rounds {
            let plain = self.ours.ask(&request("sum", bytes))?;
            let tree = self.ours.ask(&request("tree", bytes))?;
            if round >= WARM_UP {
                ratios.push(tree / plain);
            }
        }
        let (least, ratio, most) = spread(ratios)?;
        Ok(format!(
            "{} ranks, {mebibytes} MiB: fixed tree over {} leaves / plain sum {ratio:.2} ({least:.2}..{most:.2})",
            self.world,
            ours::LEAVES
        ))
    }
}

fn request(what: &str, bytes: usize) -> String {
    let repeats = (BYTES_MEASURED / bytes).clamp(1, 64);
    format!("{what} {bytes} {repeats}")
}

/// Least, median and most.
fn spread(mut values: Vec<f64>) -> Result<(f64, f64, f64)> {
    values.sort_by(f64::total_cmp);
    let first = *values.first().context("at least one round")?;
    Ok((first, values[values.len() / 2], values[values.len() - 1]))
}
