//! `make chaos MINUTES=10 SEED=1`: hurts real coordinators, workers and engines in every way we know of, and asks
//! the auditor after each run what became of it.
//!
//! ```text
//!  campaign ──▶ site: coordinators, workers (external: they outlive coordinators), engines (the stand-in)
//!     │            │ killed, stopped, doubled, cut off, out of disk, out of time
//!     └──▶ audit RUN --against UNDISTURBED: 0 violations
//! ```
//!
//! Everything is drawn from the seed but what the operating system decides: a seed names a run, and does not
//! repeat its every moment. Nothing here may rely on what the product says where the store can say it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use distillery_common::seed::{Purpose, Stream};
use distillery_common::telemetry::Stopwatch;

mod clock;
mod coordinators;
mod disk;
mod drains;
mod elastic;
mod engines;
mod faraway;
mod hosts;
mod moment;
mod proxy;
mod recovery;
mod score;
mod server;
mod site;
mod takeovers;
mod two_hosts;
mod workers;
mod writer;
mod writers;

use score::{Score, Table};

/// Set by Ctrl-C: everything that waits gives up, and cleans up on its way out.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether somebody wants this to end.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Hurts runs in every way, and says what became of them.
#[derive(Debug, Parser)]
#[command(name = "chaos", version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// One campaign alone, or some; all of them in turn when not given.
    #[arg(long, value_enum, value_delimiter = ',')]
    campaign: Vec<Campaign>,
    /// What the last line begins with.
    #[arg(long, default_value = "chaos")]
    title: String,
    /// Faults of a campaign that was asked for; its own number when not given.
    #[arg(short, long)]
    number: Option<u64>,
    /// How long all campaigns in turn may take, in minutes.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Names what is drawn.
    #[arg(short, long, default_value_t = 1)]
    seed: u64,
    /// Tasks in the runs whose coordinator is killed.
    #[arg(long, default_value_t = 20_000)]
    tasks: u64,
    /// Where folders of runs are made; in memory when it can be.
    #[arg(long)]
    folder: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Writes a run's objects over and over, and prints what was acknowledged: to be killed.
    #[command(hide = true)]
    Writer {
        /// Where.
        folder: PathBuf,
    },
}

/// A way of hurting runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Campaign {
    CoordinatorKills,
    TwoCoordinators,
    WorkerKills,
    StoppedWorkers,
    /// Workers that stand still with the usual waiting times: how soon is their task somebody else's?
    SilentWorkers,
    /// Workers that are told to leave, with and without time for it.
    Drains,
    Engines,
    Network,
    /// Two hosts and a bucket on a third.
    TwoHosts,
    Store,
    DiskFull,
    Clock,
    Writers,
    /// Random histories of the real engine in reproducible mode: one and the same student.
    Elastic,
    /// How soon a group of sixteen stand-ins trains again when one is killed or stopped.
    Recovery,
    /// The same with four real engines, and hosts that are cut off.
    RealRecovery,
}

/// What a campaign has.
pub(crate) struct Context {
    /// Where folders of runs are made.
    pub(crate) base: PathBuf,
    /// Faults to make.
    pub(crate) number: u64,
    /// Names what is drawn.
    pub(crate) seed: u64,
    /// Tasks in the runs whose coordinator is killed.
    pub(crate) tasks: u64,
    /// Set where all campaigns share some minutes: no campaign begins another run after it.
    pub(crate) patience: Option<Duration>,
    watch: Stopwatch,
}

impl Context {
    /// The chance of run `number`.
    pub(crate) fn stream(&self, number: u64) -> Stream {
        Stream::new(self.seed, Purpose::Bootstrap, number, 0)
    }

    /// Whether no further run should begin.
    pub(crate) fn is_over(&self, faults: u64) -> bool {
        let late = self.patience.is_some_and(|p| self.watch.elapsed() > p);
        faults >= self.number || late || interrupted()
    }
}

impl Campaign {
    fn name(self) -> &'static str {
        match self {
            Self::CoordinatorKills => "coordinator-kills",
            Self::TwoCoordinators => "two-coordinators",
            Self::WorkerKills => "worker-kills",
            Self::StoppedWorkers => "stopped-workers",
            Self::SilentWorkers => "silent-workers",
            Self::Drains => "drains",
            Self::Engines => "engines",
            Self::Network => "network",
            Self::TwoHosts => "two-hosts",
            Self::Store => "store",
            Self::DiskFull => "disk-full",
            Self::Clock => "clock",
            Self::Writers => "writers",
            Self::Elastic => "elastic",
            Self::Recovery => "recovery",
            Self::RealRecovery => "real-recovery",
        }
    }

    /// Whether it is about what the engine computes. A mix does without: it is about the control plane.
    fn needs_the_engine(self) -> bool {
        matches!(self, Self::Elastic | Self::RealRecovery)
    }

    /// Faults when nobody says how many, alone and in a short mix.
    fn numbers(self) -> (u64, u64) {
        match self {
            Self::CoordinatorKills => (100, 8),
            Self::TwoCoordinators => (200, 12),
            Self::WorkerKills => (200, 12),
            Self::StoppedWorkers => (50, 6),
            Self::SilentWorkers => (40, 4),
            Self::Drains => (200, 12),
            Self::Engines => (50, 8),
            Self::Network => (30, 6),
            Self::TwoHosts => (30, 3),
            Self::Store => (30, 5),
            Self::DiskFull => (10, 2),
            Self::Clock => (10, 2),
            Self::Writers => (1000, 40),
            Self::Elastic => (50, 1),
            Self::Recovery => (200, 8),
            Self::RealRecovery => (200, 4),
        }
    }

    fn run(self, context: &Context) -> Score {
        let mut score = Score::default();
        let ended = match self {
            Self::CoordinatorKills => coordinators::kills(context, &mut score),
            Self::TwoCoordinators => takeovers::chains(context, &mut score),
            Self::WorkerKills => workers::kills(context, &mut score),
            Self::StoppedWorkers => workers::stops(context, &mut score),
            Self::SilentWorkers => workers::silences(context, &mut score),
            Self::Drains => drains::drains(context, &mut score),
            Self::Engines => engines::hurt(context, &mut score),
            Self::Network => faraway::network(context, &mut score),
            Self::TwoHosts => two_hosts::partitions(context, &mut score),
            Self::Store => faraway::store(context, &mut score),
            Self::DiskFull => disk::fill(context, &mut score),
            Self::Clock => clock::shift(context, &mut score),
            Self::Writers => writers::kills(context, &mut score),
            Self::Elastic => elastic::histories(context, &mut score),
            Self::Recovery => recovery::simulated(context, &mut score),
            Self::RealRecovery => recovery::real(context, &mut score),
        };
        if let Err(error) = ended {
            if interrupted() {
                score.note("interrupted");
            } else {
                score.violated(format!("{error:#}"));
            }
        }
        score
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(Command::Writer { folder }) = &arguments.command {
        writer::write(folder)?;
        return Ok(ExitCode::SUCCESS);
    }
    watch_for_an_end()?;
    let base = arguments.folder.clone().unwrap_or_else(memory);
    let by_name = !arguments.campaign.is_empty();
    let mut table = Table::default();
    for &campaign in &arguments.campaign {
        let number = arguments.number.unwrap_or(campaign.numbers().0);
        let context = context(&arguments, base.clone(), number, arguments.seed, None);
        table.add(campaign.name(), &campaign.run(&context));
    }
    if !by_name {
        mix(&arguments, &base, &mut table);
    }
    Ok(table.tell(&arguments.title, by_name))
}

fn context(
    arguments: &Arguments,
    base: PathBuf,
    number: u64,
    seed: u64,
    patience: Option<Duration>,
) -> Context {
    Context {
        base,
        number,
        seed,
        tasks: arguments.tasks,
        patience,
        watch: Stopwatch::start(),
    }
}

/// All campaigns in turn, over and over, until the minutes are over.
fn mix(arguments: &Arguments, base: &std::path::Path, table: &mut Table) {
    let watch = Stopwatch::start();
    let length = Duration::from_secs(arguments.minutes * 60);
    for round in 0.. {
        for &campaign in Campaign::value_variants() {
            if campaign.needs_the_engine() {
                continue;
            }
            let left = length.saturating_sub(watch.elapsed());
            if left.is_zero() || interrupted() {
                return;
            }
            let seed = arguments.seed.wrapping_add(round << 32);
            let number = campaign.numbers().1;
            // Runs of a mix are small, so that every campaign has its turn.
            let mut context = context(arguments, base.into(), number, seed, Some(left));
            context.tasks = context.tasks.min(1000);
            table.add(campaign.name(), &campaign.run(&context));
        }
    }
}

/// A folder in memory, where there is one: what is tested is order, not a disk.
fn memory() -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    if shared.is_dir() {
        shared
    } else {
        std::env::temp_dir()
    }
}

/// Ctrl-C ends everything in order; runs are in process groups of their own, and do not hear of it.
fn watch_for_an_end() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) = (
                signal(SignalKind::interrupt()),
                signal(SignalKind::terminate()),
            ) else {
                return;
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            INTERRUPTED.store(true, Ordering::Relaxed);
        });
    });
    Ok(())
}
