//! What a process that was killed while it wrote to a disk leaves there: files called `name#1`, which the store hides.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use distillery_common::storage::{Store, layout};

use super::{Garbage, Target, Why};

/// Half-written files below the run's folder that were last changed at `old` or before; none in a bucket.
pub(super) fn leftovers(store: &Store, old: i64) -> Vec<Garbage> {
    let record = store.local_file(&layout::run_record());
    let Some(root) = record.as_deref().and_then(Path::parent) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        // A folder that vanishes meanwhile has nothing to find.
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        for entry in entries {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() {
                folders.push(entry.path());
            } else if metadata.is_file() && is_staging(&entry.path()) && metadata.mtime() <= old {
                let path = entry.path();
                let name = path.strip_prefix(root).unwrap_or(&path);
                found.push(Garbage {
                    name: name.display().to_string(),
                    len: metadata.len(),
                    why: Why::Staging,
                    target: Target::File(path),
                });
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Removes such a file, and says whether it is gone.
pub(super) fn delete(path: &Path) -> bool {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "a half-written file cannot be deleted");
            false
        }
        Ok(()) | Err(_) => true,
    }
}

fn is_staging(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let number = name.and_then(|name| name.rsplit_once('#'));
    number.is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}
