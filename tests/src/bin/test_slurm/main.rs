//! `make test-slurm`: real runs on a real Slurm, which is brought up on this machine for them and is gone afterwards.
//!
//! ```text
//!  case ──▶ cluster: munged, slurmctld, four slurmd, each host a set of namespaces with its own network and processes
//!    │        │ jobs requeued and signalled, hosts without power or network, controllers and coordinators killed
//!    └──▶ the student of an undisturbed run, an audit without a violation, an empty queue, no process left
//! ```
//!
//! It takes root and Debian's packages (`deploy/test-slurm.sh` installs them). Where they are not, nothing is tested and
//! that is said; with `DISTILLERY_REQUIRE_SLURM=1` it is a failure.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;
use distillery_common::telemetry::Stopwatch;

mod cases;
mod cluster;
mod site;

use cases::{Baselines, Case, Form};

/// Set by Ctrl-C: everything that waits gives up, and cleans up on its way out.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether somebody wants this to end.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Runs recipes on a Slurm cluster of this machine's own and hurts them.
#[derive(Debug, Parser)]
#[command(name = "test-slurm", version)]
struct Arguments {
    /// Three cases with the stand-in for the engine alone.
    #[arg(long)]
    short: bool,
    /// The plain case also with the quickstart: twice some ten minutes more on two cores.
    #[arg(long, conflicts_with = "short")]
    quickstart: bool,
    /// Only cases whose name holds this text.
    #[arg(long, default_value = "")]
    case: String,
    /// Keep the folder of a case that fails.
    #[arg(long)]
    keep: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    watch_for_an_end()?;
    let cases: Vec<Case> = Case::ALL
        .into_iter()
        .filter(|case| !arguments.short || case.is_short())
        .filter(|case| case.name().contains(&arguments.case))
        .collect();
    let goal = cases.len();
    anyhow::ensure!(goal > 0, "no case is called {:?}", arguments.case);
    if let Some(why) = cluster::cannot() {
        let required = std::env::var("DISTILLERY_REQUIRE_SLURM").is_ok_and(|value| value == "1");
        println!(
            "test-slurm: 0 of {goal} cases: SKIPPED: {why}; deploy/test-slurm.sh installs what is needed"
        );
        return Ok(match required {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        });
    }
    let form = match (arguments.short, arguments.quickstart) {
        (true, _) => Form::Short,
        (false, true) => Form::WithQuickstart,
        (false, false) => Form::Whole,
    };
    let watch = Stopwatch::start();
    let mut baselines = Baselines::new();
    let mut good = 0;
    for case in cases {
        let watch = Stopwatch::start();
        let ended = case.run(&mut baselines, form, arguments.keep);
        let seconds = watch.elapsed().as_secs_f64();
        match ended {
            Ok(said) => {
                good += 1;
                println!("{:<20} ok   {seconds:6.1} s  {said}", case.name());
            }
            Err(error) => println!("{:<20} NO   {seconds:6.1} s  {error:#}", case.name()),
        }
        if interrupted() {
            break;
        }
    }
    println!(
        "test-slurm: {good} of {goal} cases, {:.0} s (goal {goal} of {goal})",
        watch.elapsed().as_secs_f64()
    );
    Ok(match good == goal {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Ctrl-C ends everything in order; what was started is in process groups of its own, and does not hear of it.
fn watch_for_an_end() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let kinds = [
                SignalKind::interrupt(),
                SignalKind::terminate(),
                SignalKind::hangup(),
            ];
            let [Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)] = kinds.map(signal) else {
                return;
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            INTERRUPTED.store(true, Ordering::Relaxed);
        });
    });
    Ok(())
}
