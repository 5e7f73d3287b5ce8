//! `coordinator schema`.

use std::process::ExitCode;

use crate::console;

pub(super) fn run() -> anyhow::Result<ExitCode> {
    let schema = distillery_common::recipe::json_schema();
    console::result(format_args!("{schema:#}"))?;
    Ok(ExitCode::SUCCESS)
}
