//! Entry of the engine.

use std::process::ExitCode;

use clap::Parser as _;
use distillery_common::telemetry::{self, Format};
use distillery_engine::app;
use distillery_engine::cli::Cli;

/// EX_USAGE of sysexits.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    telemetry::init("info", Format::Plain);
    let done = match &cli.serve.socket {
        Some(socket) => app::serve(&cli.serve, socket),
        None => {
            eprintln!("error: engine serves a worker: --socket PATH is missing");
            return ExitCode::from(USAGE);
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
