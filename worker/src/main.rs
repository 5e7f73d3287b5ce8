//! Entry of the worker.

use std::process::ExitCode;

fn main() -> ExitCode {
    distillery_worker::cli::main()
}
