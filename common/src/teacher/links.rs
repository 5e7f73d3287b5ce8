//! Links in a teacher's folder that lead out of it.
//!
//! Whoever gives a folder away must not decide which other files of the reader's host are read, named in messages or
//! copied into exports. Links within the folder are fine, and so are those of a download cache, whose snapshots link to
//! the blobs beside them: `models--NAME/snapshots/REVISION/…` to `models--NAME/blobs/…`.

use std::path::{Path, PathBuf};

use super::Error;

/// Deepest folder that is looked into; a pipeline has two levels.
const MAX_DEPTH: usize = 4;
/// Most entries that are looked at.
const MAX_ENTRIES: usize = 10_000;

/// Complains of the first link below `folder` that leads out of it. The folder itself may be reached through links.
pub(super) fn check(folder: &Path) -> Result<(), Error> {
    let io = |path: &Path, source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let root = folder.canonicalize().map_err(|error| io(folder, error))?;
    let mut allowed = vec![root.clone()];
    allowed.extend(blobs(&root));
    let mut folders = vec![(folder.to_owned(), 0)];
    let mut entries = 0;
    while let Some((inner, depth)) = folders.pop() {
        for entry in std::fs::read_dir(&inner).map_err(|error| io(&inner, error))? {
            let entry = entry.map_err(|error| io(&inner, error))?;
            let path = entry.path();
            entries += 1;
            if entries > MAX_ENTRIES {
                let problem = format!("holds more than {MAX_ENTRIES} files; it is no pipeline");
                return Err(Error::file(folder, problem));
            }
            let kind = entry.file_type().map_err(|error| io(&path, error))?;
            if kind.is_symlink() {
                within(&path, &allowed)?;
            } else if kind.is_dir() && depth < MAX_DEPTH {
                folders.push((path, depth + 1));
            }
        }
    }
    Ok(())
}

/// Where the snapshots of a download cache keep their contents.
fn blobs(root: &Path) -> Option<PathBuf> {
    let snapshots = root.parent()?;
    let is_cache = snapshots.file_name()? == "snapshots";
    is_cache.then(|| snapshots.with_file_name("blobs").canonicalize().ok())?
}

/// Complains unless the link at `path` ends below one of `allowed`. One that ends nowhere is nobody's secret; it is
/// complained of when it is read.
fn within(path: &Path, allowed: &[PathBuf]) -> Result<(), Error> {
    let Ok(target) = path.canonicalize() else {
        return Ok(());
    };
    if allowed.iter().any(|place| target.starts_with(place)) {
        return Ok(());
    }
    let problem = "is a link that leads out of the teacher's folder; if you trust it, put the file itself there";
    Err(Error::file(path, problem))
}
