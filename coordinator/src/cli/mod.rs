//! The command line: one file for each command, one way to end.

mod check;
mod control;
mod doctor;
mod export;
mod gc;
mod logs;
mod one_shot;
mod plan;
mod render;
mod report;
mod run;
mod sample;
mod schema;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use serde_json::json;

use distillery_common::recipe::{self, Faults, Recipe};
use distillery_common::teacher::Folder;
use distillery_common::telemetry::{self, FORMAT_VARIABLE, Format};

use crate::console;
use crate::driver::Clock;

/// Exit code of a wrong command line.
const USAGE: u8 = 64;
/// Exit code of a recipe with faults.
const FAULTS: u8 = 2;

#[derive(Debug, Parser)]
#[command(
    name = "coordinator",
    version,
    about = "Distils a latent diffusion teacher into a few-step student.",
    after_help = "Examples:\n  coordinator run configs/quickstart.yaml\n  coordinator run distill.yaml --set seed=7 --set optimizer.lr=1e-5\n  coordinator status file:///runs/one\n\nExit codes: 0 done, 1 failed, 2 faults in the recipe, 64 usage, 75 stopped or interrupted: the same command resumes."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// More of what happens on standard error; twice for everything. RUST_LOG wins.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Results and errors as JSON on standard output, logs as JSON lines unless --log-format says otherwise.
    #[arg(long, global = true)]
    json: bool,
    /// How logs are written, here and by workers that are started: for people, or a JSON object a line.
    #[arg(long, env = FORMAT_VARIABLE, value_name = "plain|json", global = true)]
    log_format: Option<Format>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Starts a run, resumes it, or attaches to it: its state is found at the recipe's output.
    Run(run::Arguments),
    /// Says everything that is wrong with a recipe.
    Check(RecipeArguments),
    /// Shows the stages of a recipe, and all its values with the defaults, without running it.
    Plan(RecipeArguments),
    /// Prints what a cluster's own tools take, ready to be submitted.
    Render(render::Arguments),
    /// Prints the JSON Schema of recipes, for editors.
    Schema,
    /// Shows how a run is.
    Status(status::Arguments),
    /// Shows the workers of a run, what each does and for how long.
    Workers(status::Arguments),
    /// Shows what engines have printed, with -f as it comes.
    Logs(logs::Arguments),
    /// Stops a run, to be resumed: after a checkpoint, or at once.
    Stop(control::Stop),
    /// Lets a run begin nothing new: tasks end, groups leave after a checkpoint.
    Pause(control::WithReason),
    /// Lets a paused run go on.
    Resume(control::Run),
    /// Gives a run up for good; what it made stays.
    Cancel(control::WithReason),
    /// Lets a worker leave after what it has in hand.
    Drain(control::Drain),
    /// Looks at this host, and tries in a bucket or folder every promise that a run relies on.
    Doctor(doctor::Arguments),
    /// Lists, or with --delete removes, files that attempts left behind and nothing names.
    Gc(gc::Arguments),
    /// Writes a run's results as one page.
    Report(report::Arguments),
    /// Draws pictures from a teacher, an export or a run's student.
    Sample(sample::Arguments),
    /// Writes a run's student in forms that other programs read.
    Export(export::Arguments),
}

#[derive(Debug, Clone, clap::Args)]
struct RecipeArguments {
    /// The recipe.
    file: PathBuf,
    /// Changes a value: `--set stages.seg4.steps=100`. Later ones win.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    sets: Vec<String>,
}

/// What every command is told.
#[derive(Debug, Clone, Copy)]
struct Context {
    json: bool,
    log_format: Format,
    clock: Clock,
}

/// Runs one command and says how it ended.
pub fn main() -> ExitCode {
    let clock = Clock::start();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return misused(&error),
    };
    let log_format = match (arguments.log_format, arguments.json) {
        (Some(format), _) => format,
        (None, true) => Format::Json,
        (None, false) => Format::Plain,
    };
    // What a doctor finds is its result: the tries on the way to it would only bury that.
    let quiet = matches!(arguments.command, Command::Doctor(_));
    init_logs(arguments.verbose, quiet, log_format);
    let context = Context {
        json: arguments.json,
        // Logs of workers lie in files: --json is about what this process says.
        log_format: arguments.log_format.unwrap_or_default(),
        clock,
    };
    let ended = match arguments.command {
        Command::Run(own) => run::run(own, context),
        Command::Check(own) => check::run(&own, context),
        Command::Plan(own) => plan::run(&own, context),
        Command::Render(own) => render::run(own, context),
        Command::Schema => schema::run(),
        Command::Status(own) => status::run(&own, context),
        Command::Workers(own) => status::workers(&own, context),
        Command::Logs(own) => logs::run(own, context),
        Command::Stop(own) => control::stop(own, context),
        Command::Pause(own) => control::pause(own, context),
        Command::Resume(own) => control::resume(&own, context),
        Command::Cancel(own) => control::cancel(own, context),
        Command::Drain(own) => control::drain(own, context),
        Command::Doctor(own) => doctor::run(own, context),
        Command::Gc(own) => gc::run(&own, context),
        Command::Report(own) => report::run(&own, context),
        Command::Sample(own) => sample::run(own, context),
        Command::Export(own) => export::run(own, context),
    };
    ended.unwrap_or_else(|error| fail(&error, context))
}

/// Says what is wrong with the command line, or what was asked about it.
fn misused(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if std::env::args_os().any(|argument| argument == "--json") {
        // The exit code says it too.
        let _ = console::result(json!({"error": error.to_string().trim_end()}));
    } else {
        let _ = error.print();
    }
    ExitCode::from(USAGE)
}

fn init_logs(verbose: u8, quiet: bool, format: Format) {
    let level = match verbose {
        0 if quiet => "off",
        // The launcher tells of failed calls itself, once each.
        0 => "warn,kube_client=off",
        1 => "info",
        _ => "debug",
    };
    telemetry::init(level, format);
}

/// Says what went wrong, on one screen.
fn fail(error: &anyhow::Error, context: Context) -> ExitCode {
    if let Some(faults) = error.downcast_ref::<Faults>() {
        if context.json {
            // The exit code says it too.
            let _ = console::result(faults.to_json());
        } else {
            console::draw(faults.render(color()));
        }
        return ExitCode::from(FAULTS);
    }
    if context.json {
        let _ = console::result(json!({"error": format!("{error:#}")}));
    } else {
        console::note(format_args!("error: {error:#}"));
    }
    ExitCode::FAILURE
}

fn color() -> bool {
    use std::io::IsTerminal as _;
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

fn load(arguments: &RecipeArguments) -> Result<Recipe, Faults> {
    recipe::load(&arguments.file, &arguments.sets)
}

/// What the user should know of a teacher but need not change.
fn warn(teacher: &Folder) {
    for warning in &teacher.warnings {
        console::note(format_args!("warning: {warning}"));
    }
}

/// A small runtime: everything here waits far more than it computes.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the runtime cannot start")
}
