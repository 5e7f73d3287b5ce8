//! SHA-256 of the files that a teacher's results depend on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::Digest as _;

use super::{Error, Folder, TextComponent, Weights};
use crate::ids::Digest;

/// Files of a tokenizer folder that decide what ids a text gets.
const TOKENIZER_FILES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
];

impl Folder {
    /// The digest of every file that is read, by its path relative to the folder.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn digests(&self) -> Result<BTreeMap<String, Digest>, Error> {
        self.digests_by(digest_of_file)
    }

    /// The same with a way of one's own to find a file's digest, such as one that remembers.
    ///
    /// # Errors
    /// When `digest` fails.
    pub fn digests_by(
        &self,
        mut digest: impl FnMut(&Path) -> Result<Digest, Error>,
    ) -> Result<BTreeMap<String, Digest>, Error> {
        let mut files = vec![
            self.path.join("model_index.json"),
            self.path.join("scheduler/scheduler_config.json"),
        ];
        files.extend(component_files(&self.path.join("unet"), &self.unet.weights));
        files.extend(component_files(&self.path.join("vae"), &self.vae.weights));
        for (name, text) in [
            ("text_encoder", Some(&self.text)),
            ("text_encoder_2", self.text_2.as_ref()),
        ] {
            if let Some(text) = text {
                files.extend(text_files(&self.path.join(name), text));
            }
        }
        let mut digests = BTreeMap::new();
        for file in files {
            let relative = file.strip_prefix(&self.path).unwrap_or(&file);
            digests.insert(relative.to_string_lossy().into_owned(), digest(&file)?);
        }
        Ok(digests)
    }

    /// One digest of the whole folder: of the sorted lines `<digest>  <relative path>\n`.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn digest(&self) -> Result<Digest, Error> {
        Ok(digest_of_list(&self.digests()?))
    }
}

/// One digest of several files: of the sorted lines `<digest>  <relative path>\n`. Pass a part of
/// [`Folder::digests`] to name a component.
pub fn digest_of_list(digests: &BTreeMap<String, Digest>) -> Digest {
    let lines: String = digests
        .iter()
        .map(|(path, digest)| format!("{digest}  {path}\n"))
        .collect();
    Digest::of(lines.as_bytes())
}

fn component_files(folder: &Path, weights: &Weights) -> Vec<PathBuf> {
    let config = folder.join("config.json");
    [config]
        .into_iter()
        .chain(weights.files.iter().cloned())
        .collect()
}

fn text_files(folder: &Path, text: &TextComponent) -> Vec<PathBuf> {
    let tokenizer = TOKENIZER_FILES
        .iter()
        .map(|name| text.tokenizer.join(name))
        .filter(|path| path.is_file());
    component_files(folder, &text.encoder.weights)
        .into_iter()
        .chain(tokenizer)
        .collect()
}

/// The digest of the file at `path`, read in pieces.
///
/// # Errors
/// When it cannot be read.
pub fn digest_of_file(path: &Path) -> Result<Digest, Error> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let mut hasher = sha2::Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).map_err(io)?;
        if read == 0 {
            return Ok(Digest(hasher.finalize().into()));
        }
        hasher.update(&buffer[..read]);
    }
}
