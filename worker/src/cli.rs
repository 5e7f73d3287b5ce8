//! The command line: raw arguments become a checked [`Config`].

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use distillery_common::telemetry::{FORMAT_VARIABLE, Format};

use crate::agent::{JoinSource, age};
use crate::app::{self, Config};
use crate::engine_process::Device;

/// Exit code of a wrong command line.
const USAGE: u8 = 64;

#[derive(Debug, Parser)]
#[command(
    name = "worker",
    version,
    about = "Lends this host's devices to a run.",
    after_help = "Examples:\n  worker join --coordinator @join.txt\n  DISTILLERY_JOIN=https://… worker join --devices 0,1\n\nExit codes: 0 done or drained, 1 failed, 64 usage, 75 no coordinator for too long: try again."
)]
enum Command {
    /// Joins a run and works until it ends or this worker is told to leave.
    Join(JoinArguments),
    /// Says whether the worker that was started with `--alive FILE` turns or hangs, for probes: exit code 0 or 1.
    Alive(AliveArguments),
}

#[derive(Debug, clap::Args)]
struct AliveArguments {
    /// The file.
    file: PathBuf,
    /// Seconds that its worker may have been silent.
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    within: u64,
}

#[derive(Debug, clap::Args)]
struct JoinArguments {
    /// The join string that the coordinator wrote, or @FILE: a 0600 file that holds it, read again at every
    /// reconnection. Prefer the file or the variable: other users can see a command line.
    #[arg(
        long,
        env = "DISTILLERY_JOIN",
        hide_env_values = true,
        value_name = "JOIN|@FILE"
    )]
    coordinator: String,
    /// `cpu`, or the ordinals of GPUs: `0,1`.
    #[arg(long, default_value = "cpu", value_name = "cpu|N,…")]
    devices: String,
    /// Name of this worker for people and logs; the host's name when none is given.
    #[arg(long)]
    name: Option<String>,
    /// The engine; found beside this program when not given.
    #[arg(long, env = "DISTILLERY_ENGINE", value_name = "PATH")]
    engine: Option<PathBuf>,
    /// Threads of each CPU engine; the recipe's when not given.
    #[arg(long)]
    threads: Option<u32>,
    /// This host's address for the engines of other hosts; the one that faces the coordinator when not given.
    #[arg(long, env = "DISTILLERY_ADVERTISE", value_name = "ADDRESS")]
    advertise: Option<IpAddr>,
    /// Seconds to finish the work in hand after a signal.
    #[arg(long, default_value_t = 25, value_name = "SECONDS")]
    drain_grace: u64,
    /// Exit code after a signal made this worker leave, for whoever starts it again then; 0 when not given.
    #[arg(
        long,
        default_value_t = 0,
        value_name = "CODE",
        hide_default_value = true
    )]
    signal_exit_code: u8,
    /// How logs are written: for people, or a JSON object a line.
    #[arg(long, env = FORMAT_VARIABLE, default_value_t, value_name = "plain|json")]
    log_format: Format,
    /// Accept a join string without TLS for another host.
    #[arg(long)]
    insecure: bool,
    /// End when the standard input closes: the way a parent that starts workers makes sure that none outlives it.
    #[arg(long)]
    parent_stdin: bool,
    /// A file of this worker's own whose time of change says when its loop last turned: for `worker alive`.
    #[arg(long, value_name = "FILE", hide = true)]
    alive: Option<PathBuf>,
}

/// Runs the worker and says how it ended.
pub fn main() -> ExitCode {
    let command = match Command::try_parse() {
        Ok(command) => command,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let arguments = match command {
        Command::Join(arguments) => arguments,
        Command::Alive(arguments) => return look(&arguments),
    };
    let format = arguments.log_format;
    distillery_common::telemetry::init("info", format);
    let checked = check(arguments);
    let config = match checked {
        Ok(config) => config,
        Err(error) => {
            say(&error);
            return ExitCode::from(USAGE);
        }
    };
    match app::run(config, format) {
        Ok(code) => code,
        Err(error) => {
            say(&error);
            ExitCode::FAILURE
        }
    }
}

/// Looks at another worker of this host.
fn look(arguments: &AliveArguments) -> ExitCode {
    use std::io::Write as _;
    let file = arguments.file.display();
    let (word, code) = match age(&arguments.file) {
        Ok(age) if age.as_secs() <= arguments.within => {
            (format!("alive: its loop turned {} s ago", age.as_secs()), 0)
        }
        Ok(age) => (
            format!(
                "not alive: {file} was signed {} s away from now, which may be {} s at most",
                age.as_secs(),
                arguments.within
            ),
            1,
        ),
        Err(error) => (format!("not alive: {file}: {error}"), 1),
    };
    // A probe shows either; nobody else may be there to read it.
    let _ = writeln!(std::io::stdout(), "{word}");
    ExitCode::from(code)
}

fn check(arguments: JoinArguments) -> anyhow::Result<Config> {
    let host = host_name();
    let name = arguments.name.unwrap_or_else(|| host.clone());
    anyhow::ensure!(
        distillery_common::storage::layout::is_segment(&name),
        "--name {name:?} is not made of letters, digits and . _ = -"
    );
    let engine = match arguments.engine {
        Some(path) => path,
        None => beside_this_program("engine")?,
    };
    anyhow::ensure!(
        engine.is_file(),
        "there is no engine at {}; build it, or say where it is with --engine or DISTILLERY_ENGINE",
        engine.display()
    );
    let join = match arguments.coordinator.strip_prefix('@') {
        Some(path) => JoinSource::File(path.into()),
        None => JoinSource::Text(arguments.coordinator),
    };
    let join = join.checked(arguments.insecure)?;
    Ok(Config {
        join,
        insecure: arguments.insecure,
        name,
        host,
        devices: devices(&arguments.devices)?,
        engine,
        threads: arguments.threads,
        advertise: arguments.advertise,
        drain_grace: Duration::from_secs(arguments.drain_grace),
        signal_exit_code: arguments.signal_exit_code,
        parent_stdin: arguments.parent_stdin,
        alive: arguments.alive,
    })
}

fn devices(text: &str) -> anyhow::Result<Vec<Device>> {
    if text == "cpu" {
        return Ok(vec![Device::Cpu]);
    }
    text.split(',')
        .map(|ordinal| {
            let ordinal = ordinal.trim().parse().ok();
            ordinal.map(Device::Cuda).with_context(|| {
                format!("--devices {text:?} is neither `cpu` nor a list of ordinals such as 0,1")
            })
        })
        .collect()
}

fn beside_this_program(name: &str) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("this program does not know where it lies")?;
    Ok(program.with_file_name(name))
}

/// The host's name, made fit for keys.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name
        .trim()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "._-".contains(*c))
        .collect();
    if name.is_empty() { "host".into() } else { name }
}

/// Says what went wrong; whoever should read it may be gone.
fn say(error: &anyhow::Error) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_the_cpu_or_ordinals() {
        assert_eq!(devices("cpu").expect("valid"), [Device::Cpu]);
        assert_eq!(
            devices("0, 3").expect("valid"),
            [Device::Cuda(0), Device::Cuda(3)]
        );
        let error = devices("gpu").expect_err("no such device").to_string();
        assert!(error.contains("\"gpu\" is neither"), "{error}");
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory as _;
        Command::command().debug_assert();
    }
}
