//! Entry of the coordinator.

use std::process::ExitCode;

fn main() -> ExitCode {
    distillery_coordinator::cli::main()
}
