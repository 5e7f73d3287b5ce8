//! What a recipe names on this host: is it there? The only part of the check that asks a disk.

use std::path::Path;

use super::super::fault::{Code, Fault};
use super::super::{Holdout, Metric, Recipe};
use super::Surroundings;
use super::resolve::Resolved;
use crate::prompts;

/// What a teacher folder may have to let prompt adherence be measured.
const SCORER: &str = "scorer/scorer.json";

/// Whether the teacher in `folder` brings its own scorer.
pub(super) fn has_scorer(folder: &Path, around: &dyn Surroundings) -> bool {
    around.is_file(&folder.join(SCORER))
}

/// Checks that everything named exists and is what it should be.
pub(super) fn check(recipe: &Recipe, top: &Resolved, around: &dyn Surroundings) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut refuse = |path: &str, message: String, label: &str, help: &str| {
        faults.push(Fault {
            code: Code::NoFile,
            path: path.into(),
            message,
            label: label.into(),
            help: Some(help.into()),
            span: super::place(top, path),
        });
    };
    let folder = &recipe.teacher.model;
    if !around.is_dir(folder) {
        let message = format!("there is no folder {}", folder.display());
        let help = "teacher.model is a folder in the diffusers layout, relative to the recipe file";
        refuse("teacher.model", message, "no such folder", help);
    } else if !around.is_file(&folder.join("model_index.json")) {
        let message = format!("{} is not a pipeline folder", folder.display());
        let help = "it should hold model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/";
        refuse("teacher.model", message, "no model_index.json in it", help);
    }
    let adherence = recipe
        .evaluate
        .as_ref()
        .and_then(|e| e.metrics.iter().position(|m| *m == Metric::PromptAdherence));
    if let Some(i) = adherence
        && around.is_dir(folder)
        && !has_scorer(folder, around)
    {
        let message = "prompt_adherence cannot be measured with this teacher".to_owned();
        let label = format!("{} has no {SCORER}", folder.display());
        let help = "remove this metric, or use a teacher folder with a scorer";
        refuse(&format!("evaluate.metrics.{i}"), message, &label, help);
    }
    let named = &recipe.prompts;
    let holdout = match &named.holdout {
        Holdout::File(file) => Some(("prompts.holdout", file)),
        Holdout::Share(_) => None,
    };
    let preview = named.preview.as_ref().map(|p| ("prompts.preview", p));
    let lists = [Some(("prompts.train", &named.train)), holdout, preview];
    for (path, file) in lists.into_iter().flatten() {
        if !prompts::is_known_form(file) {
            let message = format!("{} is not a list of prompts", file.display());
            let help = "one prompt per line (.txt), {\"prompt\": …} per line (.jsonl), or a column prompt (.parquet)";
            refuse(path, message, "expected .txt, .jsonl or .parquet", help);
        } else if !around.is_file(file) {
            let message = format!("there is no file {}", file.display());
            let help = "paths are relative to the recipe file";
            refuse(path, message, "no such file", help);
        }
    }
    faults
}
