//! The engine's command line. People rarely type it: a worker or the coordinator does.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use distillery_common::telemetry::{FORMAT_VARIABLE, Format};

/// Computes for a Distillery worker: one process per device.
#[derive(Debug, Parser)]
#[command(name = "engine", version)]
pub struct Cli {
    /// How to serve a worker.
    #[command(flatten)]
    pub serve: Serve,
    /// How logs are written: for people, or a JSON object a line.
    #[arg(long, env = FORMAT_VARIABLE, default_value_t, value_name = "plain|json")]
    pub log_format: Format,
    /// What to do instead.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What else an engine does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answers one request: JSON on standard input, lines of JSON on standard output.
    Once,
    /// Prints in JSON what computes here.
    Describe {
        /// Also the devices that can be used, and whether NCCL loads.
        #[arg(long)]
        devices: bool,
    },
}

/// How to serve a worker.
#[derive(Debug, Args)]
pub struct Serve {
    /// The worker's socket.
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// CPU threads of one operation; by default what the recipe or OMP_NUM_THREADS says.
    #[arg(long)]
    pub threads: Option<u32>,
    /// This host's address for the engines of other hosts.
    #[arg(long, default_value = "127.0.0.1")]
    pub advertise: IpAddr,
}
