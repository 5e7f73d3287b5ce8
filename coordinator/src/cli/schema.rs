//! `coordinator schema`.

use std::process::ExitCode;

pub(super) fn run() -> anyhow::Result<ExitCode> {
    println!("{:#}", distillery_common::recipe::json_schema());
    Ok(ExitCode::SUCCESS)
}
