//! Entry of the engine.

use std::process::ExitCode;

use clap::Parser as _;
use distillery_common::telemetry;
use distillery_engine::cli::{Cli, Command};
use distillery_engine::raw_tensor::keep_freed_memory;
use distillery_engine::{app, once};

/// EX_USAGE of sysexits.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    telemetry::init("info", cli.log_format);
    keep_freed_memory();
    let done = match (&cli.command, &cli.serve.socket) {
        (Some(Command::Once), _) => return once::main(),
        (Some(Command::Describe { devices }), _) => app::describe(*devices),
        (None, Some(socket)) => app::serve(&cli.serve, socket),
        (None, None) => {
            eprintln!("error: engine serves a worker: --socket PATH is missing");
            return ExitCode::from(USAGE);
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
