//! The doors of the recipe: from a file with `--set` texts, and from the record of a run.

use std::path::{Path, PathBuf};

use super::check::{self, Surroundings};
use super::fault::{Code, Fault, Faults};
use super::raw::{self, Node, Origin};
use super::{Recipe, set};

/// Largest file that `${file:PATH}` reads.
const MAX_SECRET_BYTES: u64 = 4096;

/// Reads and checks the recipe in `path`, changed by `sets` (`a.b=c`, see the command line's `--set`).
///
/// # Errors
///
/// Every fault at once: of the text, of single values, of what values mean to each other, and of what the
/// recipe names on this host.
pub fn load(path: &Path, sets: &[String]) -> Result<Recipe, Faults> {
    let folder = std::path::absolute(path).ok();
    let base = folder.as_deref().and_then(Path::parent);
    from_file(path, base.unwrap_or(Path::new("/")), sets, true)
}

/// The same for a recipe that will lie in the folder `base` of another host, where the files that it names are.
///
/// # Errors
///
/// Every fault at once, but for files that are not there.
pub fn load_for_elsewhere(path: &Path, base: &Path, sets: &[String]) -> Result<Recipe, Faults> {
    from_file(path, base, sets, false)
}

fn from_file(path: &Path, base: &Path, sets: &[String], look: bool) -> Result<Recipe, Faults> {
    let file = path.display().to_string();
    let text = read_bounded(path).map_err(|label| {
        let fault = Fault {
            code: Code::Unreadable,
            path: String::new(),
            message: format!("cannot read the recipe {file}"),
            label,
            help: None,
            span: None,
        };
        Faults::new(file.clone(), String::new(), sets.to_vec(), vec![fault])
    })?;
    let origin = Source {
        file,
        base: base.to_owned(),
        look,
    };
    read(text, sets, &origin, &Host)
}

/// Checks the recipe in `text` as if it stood in a file named `file` in the folder `base`, without asking
/// whether the files it names exist, and with an empty environment.
///
/// # Errors
///
/// Every fault at once.
pub fn parse(text: &str, file: &str, base: &Path, sets: &[String]) -> Result<Recipe, Faults> {
    let origin = Source {
        file: file.to_owned(),
        base: base.to_owned(),
        look: false,
    };
    read(text.to_owned(), sets, &origin, &Nowhere)
}

impl Recipe {
    /// Rebuilds the recipe that [`Recipe::to_stored`] wrote, with the same checks as a file but no look at
    /// this host.
    ///
    /// # Errors
    ///
    /// Every fault, when the record was not written by this version.
    pub fn from_stored(stored: &serde_json::Value) -> Result<Self, Faults> {
        let root = Node::from_json(stored);
        let fail = |faults| {
            Faults::new(
                "the stored recipe".into(),
                String::new(),
                Vec::new(),
                faults,
            )
        };
        check::check(&root, Path::new("/"), &Nowhere, false).map_err(fail)
    }
}

/// Where a text came from.
struct Source {
    file: String,
    base: PathBuf,
    /// Whether the files it names must exist.
    look: bool,
}

fn read(
    text: String,
    sets: &[String],
    source: &Source,
    around: &dyn Surroundings,
) -> Result<Recipe, Faults> {
    let tree = raw::parse(&text, Origin::File, 0);
    let checked = tree.map_err(|fault| vec![*fault]).and_then(|mut root| {
        let mut faults = set::apply(&mut root, sets);
        match check::check(&root, &source.base, around, source.look) {
            Ok(recipe) if faults.is_empty() => Ok(recipe),
            Ok(_) => Err(faults),
            Err(more) => {
                faults.extend(more);
                Err(faults)
            }
        }
    });
    checked.map_err(|faults| Faults::new(source.file.clone(), text, sets.to_vec(), faults))
}

/// The text of a recipe file, or why not.
fn read_bounded(path: &Path) -> Result<String, String> {
    use std::io::Read as _;
    let limit = raw::MAX_BYTES;
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    if bytes.len() > limit {
        return Err(format!("it is larger than {limit} bytes"));
    }
    String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()]
            .iter()
            .filter(|b| **b == b'\n')
            .count();
        format!("line {} is not UTF-8", line + 1)
    })
}

/// This host.
struct Host;

impl Surroundings for Host {
    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn read(&self, path: &Path) -> std::io::Result<String> {
        use std::io::Read as _;
        let mut text = String::new();
        let file = std::fs::File::open(path)?;
        file.take(MAX_SECRET_BYTES).read_to_string(&mut text)?;
        Ok(text)
    }

    fn is_file(&self, path: &Path) -> bool {
        path.is_file()
    }

    fn is_dir(&self, path: &Path) -> bool {
        path.is_dir()
    }
}

/// A host with nothing on it, for texts whose surroundings do not matter.
struct Nowhere;

impl Surroundings for Nowhere {
    fn variable(&self, _: &str) -> Option<String> {
        None
    }

    fn read(&self, _: &Path) -> std::io::Result<String> {
        Err(std::io::ErrorKind::NotFound.into())
    }

    fn is_file(&self, _: &Path) -> bool {
        false
    }

    fn is_dir(&self, _: &Path) -> bool {
        false
    }
}
