//! `make sdxl-memory`: trains adapters beside a denoiser of SDXL's full size on this machine's CPU, for two steps with a
//! checkpoint after each, and holds the engine's peak memory against what `coordinator plan` says and against 24 GiB.
//!
//! The weights are random and the latent is small, so nothing is learnt; weights, state and the way to the store are what
//! they are for a GPU, and activations are what the arithmetic says for the size.

mod folder;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use distillery_common::checkpoint;
use distillery_common::curves::from_jsonl;
use distillery_common::storage::Store;
use distillery_common::telemetry::Stopwatch;
use distillery_tests::harness::{EngineKind, Run, repository};

const GIB: f64 = (1u64 << 30) as f64;
/// The device that training should fit.
const GOAL_GIB: f64 = 24.0;
/// How far the plan may be off.
const TOLERANCE: f64 = 0.1;
/// The longest that a run may take.
const PATIENCE: Duration = Duration::from_secs(3600);
/// The stage's name.
const STAGE: &str = "adapters";

/// Measures the memory of training at SDXL's size.
#[derive(Debug, Parser)]
#[command(name = "sdxl-memory")]
struct Arguments {
    /// Where 7 GB are written, and removed afterwards; the system's folder for such things unless said.
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Side of the latent.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(i64).range(4..=128))]
    side: i64,
    /// Inner width of the adapters.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(i64).range(1..=512))]
    lora_rank: i64,
    /// Keep activations rather than computing them again.
    #[arg(long)]
    keep: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let scratch = match &arguments.scratch {
        Some(folder) => tempfile::Builder::new()
            .prefix("sdxl-memory-")
            .tempdir_in(folder)?,
        None => tempfile::Builder::new().prefix("sdxl-memory-").tempdir()?,
    };
    let watch = Stopwatch::start();
    let teacher = scratch.path().join("teacher");
    std::fs::create_dir(&teacher)?;
    let fixtures = repository().join("worker/engine/tests/fixtures/sdxl");
    folder::make(&fixtures, &teacher, arguments.side)?;
    say(&watch, "the teacher is made");
    let mut run = Run::new(
        scratch.path(),
        &recipe(&arguments, scratch.path())?,
        EngineKind::Real,
    )?;
    let predicted = predicted(&run)?;
    run.finish(PATIENCE)?;
    say(&watch, "the run has ended");
    let measured = measured(&run).await? as f64 / GIB;
    let predicted = predicted as f64 / GIB;
    let ratio = predicted / measured;
    let holds = measured <= GOAL_GIB && (ratio - 1.0).abs() <= TOLERANCE;
    println!(
        "sdxl-memory: peak {measured:.2} GiB (goal ≤ {GOAL_GIB} GiB), predicted {predicted:.2} GiB, {ratio:.3} of it \
         (goal {} to {})",
        1.0 - TOLERANCE,
        1.0 + TOLERANCE
    );
    Ok(match holds {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn say(watch: &Stopwatch, what: &str) {
    println!("{:6.1} s  {what}", watch.elapsed().as_secs_f64());
}

/// The recipe of two steps, with its prompts beside it in `folder`.
fn recipe(arguments: &Arguments, folder: &Path) -> anyhow::Result<String> {
    let prompts = folder.join("prompts.txt");
    std::fs::write(&prompts, "a red square\na blue circle\n")?;
    let held_out = folder.join("held-out.txt");
    std::fs::write(&held_out, "a green cross\n")?;
    Ok(format!(
        "version: 1\n\
         name: sdxl-memory\n\
         output: run\n\
         teacher: {{model: {folder}/teacher, variant: fp16, dtype: bf16, guidance: 1.0}}\n\
         prompts: {{train: {prompts}, holdout: {held_out}}}\n\
         trajectories: {{count: 1, segments: 2, shard_trajectories: 1, batch: 1}}\n\
         student: {{kind: lora, lora_rank: {rank}, targets: lcm}}\n\
         batch: {{global: 1}}\n\
         compute: {{dtype: bf16, recompute: {recompute}}}\n\
         stages: [{{name: {STAGE}, segments: 2, steps: 2}}]\n\
         checkpoint: {{every_steps: 1}}\n\
         evaluate: false\n\
         export: false\n\
         cluster: {{launcher: local, workers: {{min: 1, max: 1}}}}\n",
        folder = folder.display(),
        prompts = prompts.display(),
        held_out = held_out.display(),
        rank = arguments.lora_rank,
        recompute = !arguments.keep,
    ))
}

/// What `coordinator plan` says that training takes, device and host together; shows its table.
fn predicted(run: &Run) -> anyhow::Result<u64> {
    let recipe = run.output().with_file_name("recipe.yaml");
    let plan = |json: bool| {
        let mut command = run.command("coordinator");
        command.arg("plan").arg(&recipe);
        if json {
            command.arg("--json");
        }
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        anyhow::ensure!(output.status.success(), "coordinator plan: {said}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let table = plan(false)?;
    let lines = table.lines().skip_while(|line| !line.starts_with("memory"));
    println!("{}", lines.take(2).collect::<Vec<_>>().join("\n"));
    let json: serde_json::Value = serde_json::from_str(&plan(true)?)?;
    let bytes = |key: &str| {
        let found = json["memory"][0][key].as_u64();
        found.with_context(|| format!("the plan has no {key}"))
    };
    Ok(bytes("device")? + bytes("host")?)
}

/// The most memory that the engine had while it trained, as the last checkpoint tells.
async fn measured(run: &Run) -> anyhow::Result<u64> {
    let store = Store::open(&run.output().display().to_string())?;
    let newest = checkpoint::newest(&store, STAGE, |_, _| true).await?;
    let newest = newest.context("the run left no whole checkpoint")?;
    let manifest = newest.manifest();
    println!(
        "{} bytes of state in {} tensors and {} files",
        manifest.total_bytes(),
        manifest.tensors.len(),
        manifest.files.len()
    );
    let curves = from_jsonl(&newest.metrics().await?)?;
    for record in &curves {
        println!(
            "step {}: {:.1} s, loss {:?}, gradient {:?}",
            record.step,
            record.step_ms / 1e3,
            record.loss,
            record.grad_norm
        );
    }
    let peak = curves.iter().filter_map(|record| record.peak_bytes).max();
    peak.context("no step says what memory it took")
}
