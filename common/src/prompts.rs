//! Prompts: read from files, normalised, told apart, held out, stored.
//!
//! A prompt is its normalised text: two spellings that differ in white space are one prompt. Which trajectory
//! has which prompt is a pure function of the seed. This module must never know a tokenizer.

mod parquet;
mod read;
mod stored;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::ids::Digest;
use crate::order::{pass_key, permute};
use crate::recipe::{self, Holdout};
use crate::seed::{Purpose, Stream};

pub use read::load;
pub use stored::{from_parquet, to_parquet};

/// Held-out prompts that grids show when the recipe names none.
const PREVIEW_PROMPTS: usize = 4;

/// A normalised text: no white space at its ends, single spaces inside, not empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prompt {
    text: String,
    id: [u8; 16],
}

impl Prompt {
    /// The prompt that `raw` spells; none when it is blank.
    pub fn new(raw: &str) -> Option<Self> {
        let words: Vec<&str> = raw.split_whitespace().collect();
        let text = words.join(" ");
        let digest = Digest::of(text.as_bytes());
        let id = digest.0[..16].try_into().expect("a digest has 32 bytes");
        (!text.is_empty()).then_some(Self { text, id })
    }

    /// The normalised text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The first 16 bytes of the SHA-256 of the text.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }
}

/// What was left out while reading a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// The file.
    pub file: PathBuf,
    /// Distinct prompts.
    pub kept: u64,
    /// Lines or rows without text: how many, and the first one's number from 1.
    pub blank: Option<Skipped>,
    /// Lines or rows whose prompt came before: how many, and the first one's number from 1.
    pub duplicate: Option<Skipped>,
    /// Prompts removed because they are held out.
    pub held_out: u64,
}

/// Lines or rows of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Skipped {
    /// How many.
    pub count: u64,
    /// The first one's number, from 1.
    pub first: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} prompts", self.file.display(), self.kept)?;
        for (skipped, noun) in [(self.blank, "blank"), (self.duplicate, "repeated")] {
            if let Some(Skipped { count, first }) = skipped {
                write!(f, ", {count} {noun} left out (first: line {first})")?;
            }
        }
        if self.held_out > 0 {
            write!(f, ", {} left out because they are held out", self.held_out)?;
        }
        Ok(())
    }
}

/// Why prompts cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the prompts {}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The ending names no known form.
    #[error("{} is not a list of prompts: expected .txt, .jsonl or .parquet", file.display())]
    UnknownForm {
        /// The file.
        file: PathBuf,
    },
    /// A line that cannot be read.
    #[error("{} line {line}: {problem}", file.display())]
    Line {
        /// The file.
        file: PathBuf,
        /// From 1.
        line: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// A Parquet file that cannot be read.
    #[error("{} is not a readable Parquet file of prompts: {problem}", file.display())]
    Parquet {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Nothing to use.
    #[error("{} holds no prompts", file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
    /// Every training prompt is held out.
    #[error("no prompt of {} is left to train on: all of them are held out", file.display())]
    AllHeldOut {
        /// The training prompts.
        file: PathBuf,
    },
    /// A stored list that was not written by [`to_parquet`].
    #[error("a stored list of prompts cannot be read: {0}")]
    Stored(String),
}

/// The three lists of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Lists {
    /// What trajectories are drawn for.
    pub train: Vec<Prompt>,
    /// What students are judged by; may be empty when the recipe holds out nothing.
    pub holdout: Vec<Prompt>,
    /// What grids show.
    pub preview: Vec<Prompt>,
    /// What was left out, one for each file.
    pub reports: Vec<Report>,
}

/// Reads what a recipe names, and keeps what is held out from training.
///
/// # Errors
///
/// A file that cannot be read or holds nothing, or a hold-out that leaves nothing to train on.
pub fn load_lists(prompts: &recipe::Prompts, seed: u64) -> Result<Lists, Error> {
    let (all, mut report) = load(&prompts.train)?;
    let mut reports = Vec::new();
    let (train, holdout) = match &prompts.holdout {
        Holdout::Share(share) => hold_out(all, *share, seed),
        Holdout::File(file) => {
            let (holdout, about) = load(file)?;
            reports.push(about);
            (without(all, &holdout), holdout)
        }
    };
    report.held_out = report.kept - train.len() as u64;
    report.kept = train.len() as u64;
    reports.insert(0, report);
    if train.is_empty() {
        return Err(Error::AllHeldOut {
            file: prompts.train.clone(),
        });
    }
    let preview = match &prompts.preview {
        Some(file) => {
            let (preview, about) = load(file)?;
            reports.push(about);
            preview
        }
        None => {
            let source = if holdout.is_empty() { &train } else { &holdout };
            source.iter().take(PREVIEW_PROMPTS).cloned().collect()
        }
    };
    Ok(Lists {
        train,
        holdout,
        preview,
        reports,
    })
}

/// Splits `prompts` into (train, holdout), both in the order of the file.
///
/// Whether a prompt is held out depends on its text and the seed alone, so a list may grow without prompts
/// changing sides. When a share above zero selects none, the prompt nearest to being selected is held out.
pub fn hold_out(prompts: Vec<Prompt>, share: f64, seed: u64) -> (Vec<Prompt>, Vec<Prompt>) {
    let limit = (share * 2f64.powi(64)) as u64;
    let lowest = prompts.iter().map(|p| lot(p, seed)).min();
    let chosen = |p: &Prompt| {
        let lot = lot(p, seed);
        share > 0.0 && (lot < limit || Some(lot) == lowest)
    };
    let (holdout, train) = prompts.into_iter().partition(chosen);
    (train, holdout)
}

/// A prompt's place in the draw of held-out prompts.
fn lot(prompt: &Prompt, seed: u64) -> u64 {
    let first = prompt.id[..8].try_into().expect("an id has 16 bytes");
    Stream::new(seed, Purpose::Holdout, u64::from_le_bytes(first), 0).next_u64()
}

/// `prompts` without those in `held_out`.
fn without(prompts: Vec<Prompt>, held_out: &[Prompt]) -> Vec<Prompt> {
    let held_out: BTreeMap<[u8; 16], ()> = held_out.iter().map(|p| (p.id, ())).collect();
    let keep = |p: &Prompt| !held_out.contains_key(&p.id);
    prompts.into_iter().filter(keep).collect()
}

/// Position in a list of `n_prompts` of the prompt that trajectory `ordinal` has.
///
/// Each pass over the list has an order of its own, so any number of trajectories uses prompts evenly.
///
/// # Panics
///
/// When the list is empty.
pub fn prompt_of(ordinal: u64, n_prompts: u64, seed: u64) -> u64 {
    let key = Stream::new(seed, Purpose::PromptOrder, 0, 0).next_u64();
    permute(
        n_prompts,
        pass_key(key, ordinal / n_prompts),
        ordinal % n_prompts,
    )
}

/// Whether `path` ends like a file of prompts.
pub fn is_known_form(path: &Path) -> bool {
    let ending = path.extension().and_then(|e| e.to_str());
    ending.is_some_and(|e| read::FORMS.contains(&e))
}
