//! The sources of the workspace, read and scanned.

use std::path::{Path as FilePath, PathBuf};

use crate::scan::{self, Located, Path};

/// One Rust file as the laws see it.
pub(crate) struct Source {
    /// Relative to the workspace, with forward slashes.
    pub(crate) path: String,
    pub(crate) line_count: usize,
    /// Everything, comments and tests included.
    pub(crate) tokens: Vec<Located>,
    /// Without comments and without `#[cfg(test)]` items.
    pub(crate) shipped: Vec<Located>,
    /// The paths in `shipped`.
    pub(crate) paths: Vec<Path>,
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        let tokens = scan::tokens(text);
        let shipped = scan::shipped(&tokens);
        let paths = scan::paths(&shipped);
        Self {
            path: path.to_owned(),
            line_count: text.lines().count(),
            tokens,
            shipped,
            paths,
        }
    }
}

/// The workspace's folder.
pub(crate) fn root() -> PathBuf {
    let tests = FilePath::new(env!("CARGO_MANIFEST_DIR"));
    tests
        .parent()
        .expect("the tests crate lies in the workspace")
        .to_owned()
}

/// The text of a file of the workspace.
pub(crate) fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every Rust file of every crate, in order of path.
pub(crate) fn all() -> Vec<Source> {
    let mut files = Vec::new();
    for member in ["common", "coordinator", "worker", "tests"] {
        collect(&root().join(member), &mut files);
    }
    files.sort();
    assert!(
        files.len() > 20,
        "only {} sources found: the scan is looking elsewhere",
        files.len()
    );
    files.iter().map(|file| load(file)).collect()
}

fn load(file: &FilePath) -> Source {
    let path = file.strip_prefix(root()).expect("collected below the root");
    let path = path
        .to_str()
        .expect("paths of sources are UTF-8")
        .replace('\\', "/");
    Source::new(&path, &read(&path))
}

fn collect(folder: &FilePath, files: &mut Vec<PathBuf>) {
    let entries =
        std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries {
        let path = entry.expect("a readable folder entry").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}
