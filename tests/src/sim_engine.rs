//! `sim-engine`: takes the engine's place in tests of the control plane.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser;
use distillery_common::telemetry::{self, FORMAT_VARIABLE, Format};
use distillery_tests::sim::{self, Pace};

/// The engine's command line.
#[derive(Debug, Parser)]
#[command(name = "sim-engine", version)]
struct Arguments {
    /// What to do instead of serving a worker.
    #[command(subcommand)]
    command: Option<Command>,
    /// Socket of the worker.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// What the engine would compute on.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// This host's address for the engines of other hosts.
    #[arg(long, default_value = "127.0.0.1")]
    advertise: IpAddr,
    /// How logs are written.
    #[arg(long, env = FORMAT_VARIABLE, default_value_t)]
    log_format: Format,
    /// Milliseconds that a task takes at least.
    #[arg(long, env = "SIM_TASK_MS", default_value_t = 0)]
    task_ms: u64,
    /// Milliseconds that a training step takes at least.
    #[arg(long, env = "SIM_STEP_MS", default_value_t = 0)]
    step_ms: u64,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Prints in JSON what computes here.
    Describe {
        /// As the engine takes it; the stand-in has no devices to tell of.
        #[arg(long)]
        devices: bool,
    },
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    telemetry::init("info", arguments.log_format);
    let pace = Pace {
        task_ms: arguments.task_ms,
        step_ms: arguments.step_ms,
    };
    if let Some(Command::Describe { .. }) = arguments.command {
        println!("{}", serde_json::to_string(&sim::software())?);
        return Ok(());
    }
    let socket = arguments.socket.context("--socket is missing")?;
    sim::serve(&socket, &arguments.device, arguments.advertise, pace)
}
