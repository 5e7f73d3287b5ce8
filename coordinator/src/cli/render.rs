//! `coordinator render WHAT FILE`: what a cluster is given, for people who would rather apply it themselves.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;

use super::{Context, RecipeArguments};
use crate::console;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Manifests for `kubectl apply -f -`: the coordinator, what it may do, and, with launcher external, the workers.
    Kubernetes(Kubernetes),
}

#[derive(Debug, clap::Args)]
struct Kubernetes {
    #[command(flatten)]
    recipe: RecipeArguments,
    /// Image that holds the coordinator.
    #[arg(
        long,
        value_name = "IMAGE",
        default_value = concat!("registry.example.com/distillery/coordinator:", env!("CARGO_PKG_VERSION"))
    )]
    image: String,
}

pub(super) fn run(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    match &arguments.what {
        What::Kubernetes(own) => kubernetes(own, context),
    }
}

#[cfg(feature = "kubernetes")]
fn kubernetes(arguments: &Kubernetes, context: Context) -> anyhow::Result<ExitCode> {
    use crate::launch::kubernetes::manifests::{Source, manifests};
    let RecipeArguments { file, sets } = &arguments.recipe;
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("{} cannot be read", file.display()))?;
    // What a recipe for a cluster names is on the cluster, not here; nor is its folder the base of anything there.
    let base = std::path::Path::new("/etc/distillery/recipe");
    let recipe = distillery_common::recipe::parse(&text, &file.display().to_string(), base, sets)?;
    let manifests = manifests(Source {
        recipe: &recipe,
        text: &text,
        sets,
        image: &arguments.image,
    })?;
    if context.json {
        let objects: Vec<_> = manifests.iter().map(|manifest| &manifest.object).collect();
        console::result(serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects}))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut documents = Vec::new();
    for manifest in &manifests {
        let yaml =
            serde_saphyr::to_string(&manifest.object).context("a manifest cannot be written")?;
        documents.push(format!("# {}\n{}", manifest.file, yaml.trim_end()));
    }
    console::result(documents.join("\n---\n"))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(not(feature = "kubernetes"))]
fn kubernetes(_: &Kubernetes, _: Context) -> anyhow::Result<ExitCode> {
    anyhow::bail!(
        "this coordinator was built without Kubernetes; build it with `--features kubernetes`"
    )
}
