//! CLIP's tokenizer: byte-level byte-pair encoding of lower-cased words.
//!
//! A text is normalised (NFC, white space collapsed, lower case), cut into words, and each word's bytes, written as
//! printable letters with `</w>` after the last, are merged pair by pair in the order of the merge table.

mod files;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use icu_normalizer::ComposingNormalizer;
use regex::Regex;

/// What ends a word.
const WORD_END: &str = "</w>";

/// Contractions, runs of letters, single digits, runs of anything else.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+";

/// Most bytes of a text that are read; far beyond what fits the ids.
const MAX_TEXT_BYTES: usize = 16 << 10;

/// Why a tokenizer cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not JSON.
    #[error("{} is not valid JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it broke.
        source: serde_json::Error,
    },
    /// A file does not describe a CLIP tokenizer that fits the encoder.
    #[error("{} {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// A tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    ids: HashMap<String, i64>,
    ranks: HashMap<(String, String), usize>,
    /// Tokens that are found in the raw text, longest first.
    special: Vec<(String, i64)>,
    unknown: Option<i64>,
    start: i64,
    end: i64,
    pad: i64,
    length: usize,
    words: Regex,
    letters: Vec<char>,
}

impl Tokenizer {
    /// Reads the tokenizer in `folder` (tokenizer.json, or vocab.json and merges.txt) for an encoder with `positions`
    /// positions and `vocabulary` entries.
    ///
    /// # Errors
    /// When a file is missing or damaged, is not CLIP's kind, or names ids that the encoder has not.
    pub fn open(folder: &Path, positions: usize, vocabulary: i64) -> Result<Self, Error> {
        let tables = files::read(folder)?;
        let wrong = |problem: String| Error::Content {
            path: folder.to_owned(),
            problem,
        };
        if let Some((token, id)) = tables
            .ids
            .iter()
            .find(|(_, id)| !(0..vocabulary).contains(*id))
        {
            return Err(wrong(format!(
                "gives {token:?} the id {id}, but the text encoder has {vocabulary} entries"
            )));
        }
        let id = |role: &str, token: &str| {
            let id = tables.ids.get(token).copied();
            id.ok_or_else(|| wrong(format!("has no entry for its {role} token {token:?}")))
        };
        let length = tables
            .max_length
            .map_or(positions, |length| length.min(positions));
        if length < 2 {
            return Err(wrong(format!(
                "has model_max_length {length}; it must be at least 2"
            )));
        }
        let mut special = BTreeMap::new();
        for token in &tables.special {
            special.insert(
                (usize::MAX - token.len(), token.clone()),
                id("special", token)?,
            );
        }
        Ok(Self {
            unknown: tables.ids.get(&tables.unknown).copied(),
            start: id("start", &tables.start)?,
            end: id("end", &tables.end)?,
            pad: id("pad", &tables.pad)?,
            length,
            special: special
                .into_iter()
                .map(|((_, token), id)| (token, id))
                .collect(),
            ids: tables.ids,
            ranks: tables.ranks,
            words: Regex::new(WORDS).expect("the pattern is sound"),
            letters: byte_letters(),
        })
    }

    /// Ids in every text.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Start token, the text's tokens as far as they fit, end token, padding: always `length` ids.
    pub fn encode(&self, text: &str) -> Vec<i64> {
        let mut ids = vec![self.start];
        ids.extend(self.tokens(text).into_iter().take(self.length - 2));
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        ids
    }

    /// The text's own tokens, however many.
    pub fn tokens(&self, text: &str) -> Vec<i64> {
        let mut rest = &text[..text.floor_char_boundary(MAX_TEXT_BYTES)];
        let mut ids = Vec::new();
        while let Some((at, token, id)) = self.next_special(rest) {
            self.plain_tokens(&rest[..at], &mut ids);
            ids.push(id);
            rest = &rest[at + token.len()..];
        }
        self.plain_tokens(rest, &mut ids);
        ids
    }

    /// The first special token in `text`, the longest of those that start there.
    fn next_special(&self, text: &str) -> Option<(usize, &str, i64)> {
        let found = self
            .special
            .iter()
            .filter_map(|(token, id)| Some((text.find(token)?, token.as_str(), *id)));
        found.min_by_key(|(at, ..)| *at)
    }

    fn plain_tokens(&self, text: &str, ids: &mut Vec<i64>) {
        let composed = ComposingNormalizer::new_nfc().normalize(text);
        let lower: String = composed.chars().flat_map(char::to_lowercase).collect();
        for word in self.words.find_iter(&lower) {
            for symbol in self.merge(word.as_str()) {
                ids.extend(self.ids.get(&symbol).copied().or(self.unknown));
            }
        }
    }

    /// Merges the neighbours that come first in the merge table, the leftmost of equals, until none is in it.
    fn merge(&self, word: &str) -> Vec<String> {
        let mut symbols: Vec<String> = word
            .bytes()
            .map(|byte| self.letters[usize::from(byte)].to_string())
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.push_str(WORD_END);
        }
        let rank = |pair: &[String]| self.ranks.get(&(pair[0].clone(), pair[1].clone())).copied();
        let mut ranks: Vec<_> = symbols.windows(2).map(rank).collect();
        while let Some((at, _)) = ranks
            .iter()
            .enumerate()
            .filter_map(|(at, rank)| Some((at, (*rank)?)))
            .min_by_key(|(_, rank)| *rank)
        {
            let right = symbols.remove(at + 1);
            symbols[at].push_str(&right);
            ranks.remove(at);
            if at > 0 {
                ranks[at - 1] = rank(&symbols[at - 1..=at]);
            }
            if at < ranks.len() {
                ranks[at] = rank(&symbols[at..at + 2]);
            }
        }
        symbols
    }
}

/// The printable letter that stands for each byte: itself where it is printable Latin-1, else the next letter from
/// U+0100 on.
fn byte_letters() -> Vec<char> {
    let mut next = 0x100;
    let letter = |byte: u8| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("U+0100 to U+0143 are letters")
        }
    };
    (0..=255).map(letter).collect()
}
