//! `make test-attacks`: what strangers, holders of stale secrets and hostile files try on a living run.
//!
//! A real coordinator serves with TLS, a real worker with the engine's stand-in works for it. Every attack must be refused
//! in words of its own, in the answer or in the log, and bounded in what it costs; afterwards nothing of it may be left: no
//! file descriptor, no process, no object, hardly any memory. In the end the run makes what an undisturbed one makes.
//! The last line says how many attacks were refused; the exit code is 1 when one was not, or a floor is missed.

mod door;
mod files;
mod flood;
mod forge;
mod inside;
mod site;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use distillery_common::telemetry::Stopwatch;
use distillery_tests::figure::{Figure, at_most};

use self::site::{Site, Trial};

/// Connections that say nothing, of the whole trial: with fewer, times tell of the machine alone and are held against nothing.
const IDLE: usize = 10_000;

/// How much of it.
#[derive(Debug, Parser)]
struct Arguments {
    /// Connections that say nothing, all at once.
    #[arg(long, default_value_t = IDLE)]
    idle: usize,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    // Of the clients in this process only what is worst.
    distillery_common::telemetry::init("error", Default::default());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(attack(&arguments))
}

async fn attack(arguments: &Arguments) -> Result<ExitCode> {
    let scratch = tempfile::tempdir()?;
    let undisturbed = site::undisturbed(&scratch.path().join("undisturbed"))?;
    let mut site = Site::start(&scratch.path().join("attacked"))?;
    let watch = Stopwatch::start();
    let before = site.settled().await?;

    let mut trials = door::all(&site).await;
    trials.extend(inside::all(&site).await);
    trials.extend(files::all(&site, scratch.path()));
    let whole = arguments.idle >= IDLE;
    let (trial, mut figures) = flood::idle(&site, arguments.idle, whole).await?;
    trials.push(trial);

    let after = site.settled_below(before).await?;
    println!("coordinator before: {before}; after: {after}");
    figures.extend([
        at_most(
            "descriptors left behind",
            after.files_more_than(before),
            0.0,
            0.0,
        ),
        at_most(
            "processes left behind",
            after.processes_more_than(before),
            0.0,
            0.0,
        ),
        at_most(
            "MiB of memory left behind",
            after.mib_more_than(before),
            16.0,
            64.0,
        ),
        at_most(
            "lines of log for each window",
            site.refusals_logged() as f64 / door::windows(watch.elapsed()) as f64,
            10.0,
            20.0,
        ),
    ]);
    trials.push(Trial::of(
        "the run ends as an undisturbed one",
        site.finish(&undisturbed),
    ));
    Ok(tell(&trials, &figures))
}

/// Prints every trial and figure. Success if all are good.
fn tell(trials: &[Trial], figures: &[Figure]) -> ExitCode {
    for trial in trials {
        println!("{trial}");
    }
    for figure in figures {
        println!("{}", figure.text());
    }
    let refused = trials.iter().filter(|trial| trial.is_good()).count();
    let within = figures.iter().filter(|figure| figure.holds()).count();
    let (all, bounds) = (trials.len(), figures.len());
    println!(
        "test-attacks: {refused} of {all} refused (goal {all}), {within} of {bounds} bounds kept (goal {bounds})"
    );
    if refused == all && within == bounds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
