//! Valid inputs: files of this repository, and the objects of a run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::harness::{EngineKind, Run, repository, sim_recipe};

/// How long the run may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// Larger files are no good seeds: most of them is the same thing again.
const LARGEST: u64 = 256 << 10;

/// Where seeds come from.
#[derive(Debug)]
pub struct Corpus {
    run: PathBuf,
    _folder: tempfile::TempDir,
}

impl Corpus {
    /// Makes a run with the engine's stand-in, from its recipe to its end.
    pub fn make() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut run = Run::new(folder.path(), sim_recipe(), EngineKind::Sim)?;
        run.finish(PATIENCE)?;
        Ok(Self {
            run: run.output(),
            _folder: folder,
        })
    }

    /// Root of the run.
    pub(super) fn run(&self) -> &Path {
        &self.run
    }

    /// Objects of the run, by what their path below it says of them: key and bytes.
    pub(super) fn objects(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<(String, Vec<u8>)>> {
        let mut found = Vec::new();
        for path in files_below(&self.run)? {
            let key = path.strip_prefix(&self.run)?.display().to_string();
            if wanted(&key) {
                found.push((key, std::fs::read(&path)?));
            }
        }
        Ok(found)
    }

    /// Their bytes alone.
    pub(super) fn contents(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Vec<u8>>> {
        let objects = self.objects(wanted)?.into_iter();
        Ok(objects.map(|(_, bytes)| bytes).collect())
    }
}

/// Files of the repository below `folder` whose names end with `end`.
pub(super) fn repository_files(folder: &str, end: &str) -> Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    for path in files_below(&repository().join(folder))? {
        if path.display().to_string().ends_with(end) && path.metadata()?.len() <= LARGEST {
            found.push(std::fs::read(&path)?);
        }
    }
    Ok(found)
}

fn files_below(root: &Path) -> Result<Vec<PathBuf>> {
    let mut folders = vec![root.to_owned()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder);
        for entry in entries.with_context(|| format!("{} cannot be read", folder.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}
