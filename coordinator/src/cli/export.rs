//! `coordinator export RUN`.

use std::path::PathBuf;
use std::process::ExitCode;

use distillery_common::once::{self, Request};

use super::Context;
use super::one_shot::{Dtype, Engine, show};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  coordinator export runs/quickstart --format diffusers,lora_universal --out student\n  coordinator export s3://bucket/run --stage seg4 --out seg4\n\nWhat was written is read back and compared with the student; an export that differs is removed."
)]
pub(super) struct Arguments {
    /// The run.
    run: String,
    /// The training stage; the last one when not given.
    #[arg(long)]
    stage: Option<String>,
    /// In which forms.
    #[arg(
        long = "format",
        value_delimiter = ',',
        default_value = "diffusers",
        value_parser = ["diffusers", "lora_universal"]
    )]
    formats: Vec<String>,
    /// Number format of the written weights.
    #[arg(long, value_enum, default_value = "f16")]
    dtype: Dtype,
    /// Folder of the export, which must not exist.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    engine: Engine,
}

pub(super) fn run(arguments: Arguments, context: Context) -> anyhow::Result<ExitCode> {
    let request = Request::Export(once::Export {
        run: arguments.run,
        stage: arguments.stage,
        formats: arguments.formats,
        dtype: arguments.dtype.name(),
        out: arguments.out.clone(),
        host: arguments.engine.host(),
    });
    let result = arguments.engine.ask(&request)?;
    let files = result["files"].as_array().map_or(0, Vec::len);
    let stage = result["stage"].as_str().unwrap_or_default();
    let sentence = format!(
        "stage {stage} at step {}: {files} files in {}, read back and equal",
        result["step"],
        arguments.out.display()
    );
    show(&result, context.json, &sentence)
}
