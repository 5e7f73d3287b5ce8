//! `coordinator render slurm FILE`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;

use distillery_common::ids::Digest;
use distillery_common::recipe::slurm::Slurm;
use distillery_common::recipe::{self, Launcher, Recipe};

use crate::cli::RecipeArguments;
use crate::console;
use crate::launch::slurm::{Head, Worker, head, heterogeneous, worker};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    recipe: RecipeArguments,
    /// Who submits workers, and in which jobs.
    #[arg(long, value_enum, default_value_t = Style::Array)]
    style: Style,
    /// Where the recipe lies on the cluster; where FILE lies when not given. Its relative paths start there.
    #[arg(long = "recipe", value_name = "PATH")]
    place: Option<PathBuf>,
    /// The coordinator on the cluster; this program when not given. Worker and engine lie beside it, unless the recipe
    /// says otherwise.
    #[arg(long, value_name = "PATH")]
    coordinator: Option<PathBuf>,
    /// Write the scripts into this folder instead of printing them.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Style {
    /// The coordinator in a job of its own; it submits an array of workers, and replaces what is lost.
    Array,
    /// The coordinator in a job of its own, and an array of workers for you to submit, as many times as you like.
    External,
    /// One heterogeneous job: a head without GPUs, and all workers.
    Heterogeneous,
}

/// A script and the name of its file.
type Script = (&'static str, String);

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let file = &arguments.recipe.file;
    let holds_token = |set: &&String| set.contains("token") && !set.contains("${");
    anyhow::ensure!(
        !arguments.recipe.sets.iter().any(|set| holds_token(&set)),
        "--set would write the run's token into a script that others may read; name it as ${{env:NAME}} or ${{file:PATH}}"
    );
    let place = arguments.place.as_ref().unwrap_or(file);
    let place = std::path::absolute(place).context("the recipe's path cannot be made absolute")?;
    let base = place.parent().unwrap_or(Path::new("/"));
    let recipe = recipe::load_for_elsewhere(file, base, &arguments.recipe.sets)?;
    let Launcher::Slurm(section) = &recipe.cluster.launcher else {
        anyhow::bail!(
            "{}: cluster.launcher is not slurm, so that nothing says what to ask Slurm for; write `cluster: {{launcher: slurm, slurm: {{…}}}}`",
            file.display()
        );
    };
    let scripts = scripts(arguments, &recipe, section, place)?;
    // What is printed can be redirected into a file for sbatch: a script by itself begins with its own first line.
    let alone = scripts.len() == 1;
    for (name, text) in scripts {
        match &arguments.folder {
            None if alone => console::result(text.trim_end())?,
            None => console::result(format_args!("# ==== {name}: sbatch {name}\n{text}"))?,
            Some(folder) => {
                let path = folder.join(name);
                std::fs::create_dir_all(folder)
                    .and_then(|()| std::fs::write(&path, text))
                    .with_context(|| format!("{} cannot be written", path.display()))?;
                console::note(path.display());
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn scripts(
    arguments: &Arguments,
    recipe: &Recipe,
    section: &Slurm,
    place: PathBuf,
) -> anyhow::Result<Vec<Script>> {
    let own = || std::env::current_exe().context("this program does not know where it lies");
    let coordinator = match &arguments.coordinator {
        Some(path) => path.clone(),
        None => own()?,
    };
    // Of this run alone: the head ends workers by their name, and another run may have the recipe's.
    let digest = Digest::of(recipe.output.as_bytes()).to_string();
    let name = format!("{}-{}", recipe.name, &digest[..8]);
    let of_head = Head {
        name: format!("distill-{name}-head"),
        coordinator: coordinator.clone(),
        recipe: place,
        sets: arguments.recipe.sets.clone(),
        workers: None,
    };
    if arguments.style == Style::Array {
        return Ok(vec![("head.sbatch", head(section, &of_head))]);
    }
    let folder = recipe.output.strip_prefix("file://").with_context(|| {
        format!(
            "the run is to lie at {}, and its join string in your state folder, under an id that is not known yet: use --style array, or an output on a file system that all nodes share",
            recipe.output
        )
    })?;
    let folder = Path::new(folder);
    let beside = |name: &str| coordinator.with_file_name(name);
    let hosts = recipe.cluster.max_workers.div_ceil(section.engines());
    let mut of_head = of_head;
    of_head.sets.extend([
        "cluster.launcher=external".into(),
        "cluster.slurm=null".into(),
        format!("cluster.listen={}", recipe.cluster.listen),
    ]);
    let of_workers = Worker {
        name: format!("distill-{name}-workers"),
        worker: section.worker.clone().unwrap_or_else(|| beside("worker")),
        engine: section.engine.clone().unwrap_or_else(|| beside("engine")),
        join: folder.join("join"),
        logs: folder.join("logs/slurm"),
        log: Some(format!("distill-{name}-workers-%A_%a.log")),
        count: Some(hosts),
        threads: recipe.compute.threads,
    };
    if arguments.style == Style::Heterogeneous {
        let text = heterogeneous(section, &of_head, &of_workers, hosts);
        return Ok(vec![("job.sbatch", text)]);
    }
    of_head.workers = Some(of_workers.name.clone());
    Ok(vec![
        ("head.sbatch", head(section, &of_head)),
        ("workers.sbatch", worker(section, &of_workers)),
    ])
}
