//! `coordinator check FILE`.

use std::process::ExitCode;

use serde_json::json;

use super::{Context, RecipeArguments};
use crate::app;
use crate::console;

pub(super) fn run(arguments: &RecipeArguments, context: Context) -> anyhow::Result<ExitCode> {
    let recipe = super::load(arguments)?;
    let teacher = app::open_teacher(&recipe)?;
    if context.json {
        console::result(json!({"faults": [], "warnings": teacher.warnings}))?;
    } else {
        super::warn(&teacher);
        console::note(format_args!("{} has no faults", arguments.file.display()));
    }
    Ok(ExitCode::SUCCESS)
}
