//! What is slow to find out and stays true while a file does not change: digests of weights, what an engine is.
//!
//! A cache in the user's cache folder, keyed by path, length, time of change and inode. Losing it costs time only;
//! nothing that cannot be read or written is an error. It is believed, so nobody else may write it, whatever the umask.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Entries kept; beyond that the cache starts anew.
const ENTRIES: usize = 1000;

/// Remembered answers.
#[derive(Debug, Default)]
pub(super) struct Memo {
    file: Option<PathBuf>,
    known: BTreeMap<String, String>,
    changed: bool,
}

impl Memo {
    /// What the user's cache folder holds.
    pub(super) fn open() -> Self {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        match cache.or_else(home) {
            Some(folder) => Self::at(folder.join("distillery/memo.json")),
            None => Self::default(),
        }
    }

    fn at(file: PathBuf) -> Self {
        let known = std::fs::read(&file)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self {
            file: Some(file),
            known,
            changed: false,
        }
    }

    /// What was found out about `path` as `question`, while the file is as it was then.
    pub(super) fn recall(&self, question: &str, path: &Path) -> Option<String> {
        self.known.get(&key(question, path)?).cloned()
    }

    /// Remembers an answer.
    pub(super) fn note(&mut self, question: &str, path: &Path, answer: String) {
        if let Some(key) = key(question, path) {
            if self.known.len() >= ENTRIES {
                self.known.clear();
            }
            self.known.insert(key, answer);
            self.changed = true;
        }
    }

    /// Keeps what is new for the next process.
    pub(super) fn save(&self) {
        let Some(file) = self.file.as_ref().filter(|_| self.changed) else {
            return;
        };
        let partial = file.with_extension(format!("{}.partial", std::process::id()));
        let write = || {
            if let Some(folder) = file.parent() {
                let mut made = DirBuilder::new();
                made.recursive(true).mode(0o700).create(folder)?;
            }
            let mut kept = OpenOptions::new();
            kept.write(true).create(true).truncate(true).mode(0o600);
            kept.open(&partial)?
                .write_all(&serde_json::to_vec(&self.known)?)?;
            std::fs::rename(&partial, file)
        };
        if let Err(error) = write() {
            tracing::debug!(file = %file.display(), %error, "the cache cannot be kept");
        }
    }
}

/// A question about one state of one file.
fn key(question: &str, path: &Path) -> Option<String> {
    let path = std::fs::canonicalize(path).ok()?;
    let meta = std::fs::metadata(&path).ok()?;
    Some(format!(
        "{question} {} {} {}.{:09} {}",
        path.display(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ino()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_holds_while_its_file_does() {
        let folder = tempfile::tempdir().expect("a folder");
        let subject = folder.path().join("weights");
        std::fs::write(&subject, "one").expect("writable");
        let cache = folder.path().join("cache/memo.json");
        let mut memo = Memo::at(cache.clone());
        assert_eq!(memo.recall("digest", &subject), None);
        memo.note("digest", &subject, "d1".into());
        memo.save();
        let later = Memo::at(cache.clone());
        assert_eq!(later.recall("digest", &subject), Some("d1".into()));
        assert_eq!(later.recall("software", &subject), None);
        std::fs::write(&subject, "three").expect("writable");
        assert_eq!(later.recall("digest", &subject), None);
        std::fs::write(&cache, "{broken").expect("writable");
        assert_eq!(Memo::at(cache).recall("digest", &subject), None);
    }
}
