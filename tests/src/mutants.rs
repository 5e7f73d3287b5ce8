//! Ways to break the shipping code, as `tests/mutants.txt` lists them. Knows how to read and apply them, not what they
//! lead to.

use std::path::Path;

use anyhow::Context as _;

/// One way to break the code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mutant {
    /// What is wrong then.
    pub name: String,
    /// The promise that it breaks.
    pub breaks: String,
    /// The file, relative to the workspace.
    pub file: String,
    /// A text that occurs in the file exactly once.
    pub find: String,
    /// What stands there instead.
    pub replace: String,
}

/// Where the list is, relative to the workspace.
pub const LIST: &str = "tests/mutants.txt";

/// Reads a list of mutants.
///
/// # Errors
/// Names the mutant that is not written as the others are.
pub fn parse(text: &str) -> anyhow::Result<Vec<Mutant>> {
    let text = format!("\n{text}");
    let blocks = text.split("\n== ").skip(1);
    blocks
        .map(|block| {
            let name = block.lines().next().unwrap_or_default().trim().to_owned();
            parse_one(&name, block).with_context(|| format!("the mutant {name:?}"))
        })
        .collect()
}

fn parse_one(name: &str, block: &str) -> anyhow::Result<Mutant> {
    let line = |start: &str| {
        let found = block.lines().find_map(|line| line.strip_prefix(start));
        let found = found.with_context(|| format!("it has no line {start}"))?;
        anyhow::Ok(found.trim().to_owned())
    };
    let (_, rest) = block.split_once("\n<<<<\n").context("it has no <<<<")?;
    let (find, rest) = rest.split_once("\n====\n").context("it has no ====")?;
    let (replace, _) = rest.split_once("\n>>>>").context("it has no >>>>")?;
    Ok(Mutant {
        name: name.to_owned(),
        breaks: line("breaks:")?,
        file: line("file:")?,
        find: find.to_owned(),
        replace: replace.to_owned(),
    })
}

impl Mutant {
    /// The text of its file below `root`, broken.
    ///
    /// # Errors
    /// When the file is not there, or the text to find does not occur exactly once.
    pub fn apply(&self, root: &Path) -> anyhow::Result<String> {
        let path = root.join(&self.file);
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let n = text.matches(&self.find).count();
        anyhow::ensure!(
            n == 1,
            "the mutant {:?} finds its text {n} times in {}",
            self.name,
            self.file
        );
        Ok(text.replacen(&self.find, &self.replace, 1))
    }
}
