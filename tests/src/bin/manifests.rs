//! `manifests`: renders the recipes of deploy/kubernetes and holds every manifest there against its recipe, its types and the
//! schemas of the newest versions of Kubernetes. With `--write` the files are written anew first.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Context as _;
use clap::Parser;
use distillery_tests::harness::programs;
use distillery_tests::manifests::{
    Document, OVERLAYS, folder, read, rendered, stored, unknown_keys,
};

/// Versions whose schemas are asked: the newest that the checker has.
const VERSIONS: [&str; 3] = ["1.37", "1.36", "1.35"];

#[derive(Debug, Parser)]
#[command(about = "Holds manifests against recipes, types and schemas.")]
struct Arguments {
    /// Write the files that are rendered.
    #[arg(long)]
    write: bool,
    /// The program kubernetes-validate.
    #[arg(long, env = "DISTILLERY_KUBERNETES_VALIDATE", value_name = "PATH")]
    checker: Option<PathBuf>,
    /// Ask no schema.
    #[arg(long)]
    without_schemas: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let coordinator = programs()?.join("coordinator");
    let mut printed: Vec<Document> = Vec::new();
    for overlay in OVERLAYS {
        printed.extend(rendered(&coordinator, overlay)?);
    }
    if arguments.write {
        for document in &printed {
            std::fs::write(folder().join(&document.file), &document.text)?;
        }
    }
    let stored = stored()?;
    let mut wrong = Vec::new();
    for document in &printed {
        let kept = stored.iter().find(|kept| kept.file == document.file);
        if kept.is_none_or(|kept| kept.text != document.text) {
            wrong.push(format!(
                "{}: not what its recipe renders; `manifests --write` writes it anew",
                document.file
            ));
        }
    }
    for document in &stored {
        match read(document).and_then(|object| unknown_keys(&object)) {
            Ok(lost) => wrong.extend(
                lost.iter()
                    .map(|key| format!("{}: unknown{key}", document.file)),
            ),
            Err(error) => wrong.push(format!("{}: {error:#}", document.file)),
        }
    }
    let mut versions: &[&str] = &[];
    if let Some(checker) = arguments
        .checker
        .filter(|path| !path.as_os_str().is_empty() && !arguments.without_schemas)
    {
        let scratch = tempfile::tempdir()?;
        for version in VERSIONS {
            wrong.extend(validate(&checker, version, &stored, scratch.path())?);
        }
        versions = &VERSIONS;
    } else if !arguments.without_schemas {
        wrong.push(
            "no kubernetes-validate: no schema of Kubernetes was asked; --without-schemas does without"
                .to_owned(),
        );
    }
    for line in &wrong {
        println!("{line}");
    }
    let refused = |document: &&Document| wrong.iter().any(|line| line.starts_with(&document.file));
    let valid = stored.len() - stored.iter().filter(refused).count();
    let asked = match versions {
        [] => "; NO SCHEMA WAS ASKED".to_owned(),
        versions => format!("; Kubernetes {}", versions.join(", ")),
    };
    println!(
        "manifests: {valid} files valid for {} versions (goal {} and {}{asked})",
        versions.len(),
        stored.len(),
        VERSIONS.len()
    );
    Ok(if wrong.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What the schemas of `version` say against `documents`; and that they say something against a wrong one.
fn validate(
    checker: &Path,
    version: &str,
    documents: &[Document],
    scratch: &Path,
) -> anyhow::Result<Vec<String>> {
    let ask = |paths: &[PathBuf]| {
        Command::new(checker)
            .args(["-k", version, "--strict", "--quiet"])
            .args(paths)
            .output()
            .with_context(|| format!("{} does not start", checker.display()))
    };
    let bad = scratch.join("bad.yaml");
    std::fs::write(
        &bad,
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: bad}\nbogus: 1\n",
    )?;
    anyhow::ensure!(
        !ask(&[bad])?.status.success(),
        "the checker takes an unknown field for {version}: it checks nothing"
    );
    let paths: Vec<PathBuf> = documents
        .iter()
        .map(|document| folder().join(&document.file))
        .collect();
    let output = ask(&paths)?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    if output.status.success() {
        return Ok(Vec::new());
    }
    let prefix = format!("{}/", folder().display());
    let lines = said.lines().filter(|line| !line.trim().is_empty());
    Ok(lines
        .map(|line| {
            format!(
                "{} ({version})",
                line.replace(&prefix, "").replace("ERROR ", "")
            )
        })
        .collect())
}
