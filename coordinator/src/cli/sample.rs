//! `coordinator sample MODEL`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use distillery_common::once::{Model, Request, Sample};
use distillery_common::prompts;

use super::Context;
use super::one_shot::{Dtype, Engine, show};

/// Most seeds in one range.
const MAX_SEEDS: u64 = 10_000;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  coordinator sample runs/quickstart --prompt 'two red discs' --steps 1,2,4,8 --grid grid.png\n  coordinator sample runs/quickstart/export/seg2 --prompts prompts.txt --steps 4 --out pictures\n  coordinator sample configs/teachers/scenes --guidance 4 --prompt 'a blue ring' --steps 25 --seed 0..3 --grid teacher.png"
)]
pub(super) struct Arguments {
    /// A teacher's folder, an exported folder, or a run.
    model: String,
    /// The training stage of a run; its last one when not given.
    #[arg(long)]
    stage: Option<String>,
    /// The step of the stage; its newest checkpoint when not given.
    #[arg(long)]
    step: Option<u64>,
    /// What to draw; may be given more than once.
    #[arg(
        long = "prompt",
        value_name = "TEXT",
        required_unless_present = "prompts"
    )]
    prompt: Vec<String>,
    /// A file of prompts: .txt, .jsonl or .parquet.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// With how many steps, one picture each.
    #[arg(long, value_delimiter = ',', default_value = "4", value_parser = clap::value_parser!(u32).range(1..1000))]
    steps: Vec<u32>,
    /// How to draw; what suits the model when not given.
    #[arg(long, value_parser = ["ddim", "tlcm9", "lcm", "segments"])]
    sampler: Option<String>,
    /// Seeds of the noise: 7, or 0..3 for 0, 1, 2 and 3.
    #[arg(long = "seed", value_delimiter = ',', default_value = "0", value_parser = seeds)]
    seeds: Vec<Seeds>,
    /// Guidance scale; needed for teachers. Students have it in their weights.
    #[arg(long)]
    guidance: Option<f64>,
    /// Folder for one PNG for each prompt, seed and number of steps.
    #[arg(long, value_name = "FOLDER", required_unless_present = "grid")]
    out: Option<PathBuf>,
    /// One PNG of all: a row for each prompt and seed, a column for each number of steps.
    #[arg(long, value_name = "FILE")]
    grid: Option<PathBuf>,
    /// Number format to compute in.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    #[command(flatten)]
    engine: Engine,
}

pub(super) fn run(arguments: Arguments, context: Context) -> anyhow::Result<ExitCode> {
    if let Some(out) = &arguments.out
        && out.extension().is_some_and(|ending| ending == "png")
        && !out.is_dir()
    {
        bail!(
            "--out names a folder for many pictures; for one picture of all use --grid {}",
            out.display()
        );
    }
    let mut texts = arguments.prompt;
    if let Some(file) = &arguments.prompts {
        texts.extend(prompts::load(file)?.0.iter().map(|p| p.text().to_owned()));
    }
    let seeds = arguments
        .seeds
        .iter()
        .flat_map(|s| s.first..=s.last)
        .collect();
    let request = Request::Sample(Sample {
        model: model(&arguments.model, arguments.stage, arguments.step)?,
        prompts: texts,
        steps: arguments.steps,
        sampler: arguments.sampler,
        seeds,
        guidance: arguments.guidance,
        out: arguments.out.clone(),
        grid: arguments.grid.clone(),
        dtype: arguments.dtype.name(),
        host: arguments.engine.host(),
    });
    let result = arguments.engine.ask(&request)?;
    let places = [arguments.out, arguments.grid];
    let places: Vec<String> = places
        .iter()
        .flatten()
        .map(|p| p.display().to_string())
        .collect();
    let sampler = result["sampler"].as_str().unwrap_or_default();
    let pictures = match result["pictures"].as_u64() {
        Some(1) => "1 picture".to_owned(),
        _ => format!("{} pictures", result["pictures"]),
    };
    let sentence = format!("{pictures} by {sampler}: {}", places.join(" and "));
    show(&result, context.json, &sentence)
}

/// What `text` names: a pipeline folder, an export with one in it, or a run.
fn model(text: &str, stage: Option<String>, step: Option<u64>) -> anyhow::Result<Model> {
    let path = Path::new(text);
    let folders = [path.to_owned(), path.join("diffusers")];
    let folder = folders
        .into_iter()
        .find(|folder| folder.join("model_index.json").is_file());
    if let Some(folder) = folder {
        if stage.is_some() || step.is_some() {
            bail!(
                "{} is a pipeline folder: --stage and --step belong to runs",
                folder.display()
            );
        }
        return Ok(Model::Folder(folder));
    }
    if text.contains("://") || path.join("run.json").is_file() {
        return Ok(Model::Checkpoint {
            run: text.to_owned(),
            stage,
            step,
        });
    }
    bail!(
        "{text} is neither a pipeline folder (it has no model_index.json) nor a run (it has no run.json)"
    )
}

/// Some seeds in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seeds {
    first: u64,
    last: u64,
}

fn seeds(text: &str) -> Result<Seeds, String> {
    let number = |text: &str| {
        text.parse::<u64>()
            .map_err(|_| format!("{text:?} is no seed"))
    };
    let (first, last) = match text.split_once("..") {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(text)?, number(text)?),
    };
    if last < first || last - first >= MAX_SEEDS {
        return Err(format!(
            "{text:?} names none, or more than {MAX_SEEDS} seeds"
        ));
    }
    Ok(Seeds { first, last })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_numbers_or_closed_ranges() {
        assert_eq!(seeds("7"), Ok(Seeds { first: 7, last: 7 }));
        assert_eq!(seeds("0..3"), Ok(Seeds { first: 0, last: 3 }));
        for wrong in ["", "x", "3..0", "0..", "-1", "0..99999"] {
            assert!(seeds(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_model_is_known_by_what_lies_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let text = folder.path().to_str().expect("plain");
        let error = model(text, None, None).expect_err("empty").to_string();
        assert!(
            error.contains("model_index.json") && error.contains("run.json"),
            "{error}"
        );
        std::fs::write(folder.path().join("run.json"), "{}").expect("writable");
        let stage = Some("seg2".to_owned());
        let found = model(text, stage.clone(), Some(3)).expect("a run");
        assert_eq!(
            found,
            Model::Checkpoint {
                run: text.into(),
                stage,
                step: Some(3)
            }
        );
        let inner = folder.path().join("diffusers");
        std::fs::create_dir(&inner).expect("writable");
        std::fs::write(inner.join("model_index.json"), "{}").expect("writable");
        assert_eq!(
            model(text, None, None).expect("an export"),
            Model::Folder(inner)
        );
        assert!(model(text, None, Some(3)).is_err());
        assert!(matches!(
            model("s3://b/r", None, None),
            Ok(Model::Checkpoint { .. })
        ));
    }
}
