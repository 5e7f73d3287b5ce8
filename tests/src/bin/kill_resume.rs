//! `make kill-resume N=20 SEED=1`: kills runs at seeded random moments and compares what they make in the end.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use distillery_common::seed::{Purpose, Stream};
use distillery_common::telemetry::Stopwatch;
use distillery_tests::harness::{EngineKind, Hurt, Made, Run, Target, sim_recipe};

/// Longest that a run may take, kills and all.
const PATIENCE: Duration = Duration::from_secs(900);
/// Moments tried for one run, as a kill may come when nobody is there to be killed.
const MOMENTS: u16 = 10;
/// Longest that processes may outlive their coordinator.
const ORPHANS: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Engine {
    /// The stand-in, on a recipe of its own.
    Sim,
    /// The real one, on libtorch.
    Real,
}

/// Kills a run at random moments, starts the same command again, and compares the result with an undisturbed run.
#[derive(Debug, Parser)]
#[command(name = "kill-resume")]
struct Arguments {
    /// Kills in all.
    #[arg(short, long, default_value_t = 20)]
    number: u32,
    /// Kills in one run, each of another kind.
    #[arg(long, default_value_t = 1)]
    per_run: u32,
    /// Names the moments.
    #[arg(short, long, default_value_t = 1)]
    seed: u64,
    /// Which engine works.
    #[arg(long, value_enum, default_value_t = Engine::Real)]
    engine: Engine,
    /// The recipe of the real engine; its `output` does not count.
    #[arg(long, default_value = "configs/tiny.yaml")]
    recipe: PathBuf,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let session = Session(arguments);
    let (expected, length) = session.undisturbed()?;
    println!(
        "undisturbed: {:.1} s, rows {}",
        length.as_secs_f64(),
        expected.rows.short()
    );
    println!(
        "{:>4}  {:<12} {:>8}  {:<14} {:>6}  {:>7}  equal",
        "run", "killed", "after s", "stage", "killed", "total s"
    );
    let mut equal = 0;
    let mut kills = 0;
    let per_run = session.0.per_run.max(1);
    for number in 0..session.0.number.div_ceil(per_run) {
        let watch = Stopwatch::start();
        let result = session.hurt(number, length, &expected);
        let total = watch.elapsed().as_secs_f64();
        match result {
            Ok(hurts) => {
                for hurt in &hurts {
                    println!(
                        "{number:>4}  {:<12} {:>8.2}  {:<14} {:>6}  {total:>7.1}  yes",
                        hurt.target.name(),
                        hurt.at.as_secs_f64(),
                        hurt.stage,
                        hurt.killed
                    );
                }
                equal += hurts.len();
                kills += hurts.len();
            }
            Err(error) => {
                println!(
                    "{number:>4}  {:<12} {:>8}  {:<14} {:>6}  {total:>7.1}  NO: {error:#}",
                    "", "", "", ""
                );
                kills += per_run as usize;
            }
        }
    }
    println!(
        "kill-resume: {equal} of {kills} kills of living processes left the result bit for bit as it was (goal {kills} of {kills})"
    );
    Ok(if equal == kills {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

struct Session(Arguments);

impl Session {
    fn run(&self, folder: &tempfile::TempDir) -> anyhow::Result<Run> {
        Ok(match self.0.engine {
            // So slow that a kill meets it at work.
            Engine::Sim => Run::new(folder.path(), sim_recipe(), EngineKind::Sim)?
                .with("SIM_TASK_MS", 120)
                .with("SIM_STEP_MS", 15),
            Engine::Real => Run::of_file(folder.path(), &self.0.recipe, EngineKind::Real)?,
        })
    }

    fn undisturbed(&self) -> anyhow::Result<(Made, Duration)> {
        let folder = tempfile::tempdir()?;
        let mut run = self.run(&folder)?;
        let watch = Stopwatch::start();
        run.finish(PATIENCE).context("the undisturbed run")?;
        let length = watch.elapsed();
        Ok((run.made()?, length))
    }

    /// One run with its kills, every one of which met a living process; an error when it ends badly or makes
    /// something else.
    fn hurt(&self, number: u32, length: Duration, expected: &Made) -> anyhow::Result<Vec<Hurt>> {
        for moment in 0..MOMENTS {
            let mut stream = Stream::new(self.0.seed, Purpose::Bootstrap, number.into(), moment);
            let hurts = self.hurt_at(&mut stream, number, length, expected)?;
            let Some(miss) = hurts.iter().find(|hurt| hurt.killed == 0) else {
                return Ok(hurts);
            };
            println!(
                "{number:>4}  {:<12} {:>8.2}  {:<14} {:>6}  nobody was there; another moment",
                miss.target.name(),
                miss.at.as_secs_f64(),
                miss.stage,
                0
            );
        }
        anyhow::bail!("none of {MOMENTS} moments met a living process")
    }

    /// One run with its kills at the moments that `stream` draws.
    fn hurt_at(
        &self,
        stream: &mut Stream,
        number: u32,
        length: Duration,
        expected: &Made,
    ) -> anyhow::Result<Vec<Hurt>> {
        let per_run = self.0.per_run.max(1);
        let targets: Vec<Target> = (0..per_run)
            .map(|kill| Target::ALL[(number * per_run + kill) as usize % Target::ALL.len()])
            .collect();
        let folder = tempfile::tempdir()?;
        let mut run = self.run(&folder)?;
        let hurts = run.kill_and_finish(stream, &targets, length, PATIENCE)?;
        let made = run.made()?;
        anyhow::ensure!(
            made.rows == expected.rows,
            "the rows are others than those of the undisturbed run"
        );
        anyhow::ensure!(
            made.students == expected.students,
            "the students are others than those of the undisturbed run: {:?}",
            made.students
        );
        run.no_orphans(ORPHANS)?;
        Ok(hurts)
    }
}
