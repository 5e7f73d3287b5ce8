//! `coordinator render kubernetes FILE`.

use std::process::ExitCode;

use crate::cli::{Context, RecipeArguments};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
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

#[cfg(feature = "kubernetes")]
pub(super) fn run(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    use anyhow::Context as _;

    use crate::console;
    use crate::launch::kubernetes::manifests::{Source, manifests};

    let RecipeArguments { file, sets } = &arguments.recipe;
    // What a recipe for a cluster names is on the cluster, not here; nor is its folder the base of anything there.
    let base = std::path::Path::new("/etc/distillery/recipe");
    let recipe = distillery_common::recipe::load_for_elsewhere(file, base, sets)?;
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("{} cannot be read", file.display()))?;
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
pub(super) fn run(_: &Arguments, _: Context) -> anyhow::Result<ExitCode> {
    anyhow::bail!(
        "this coordinator was built without Kubernetes; build it with `--features kubernetes`"
    )
}
