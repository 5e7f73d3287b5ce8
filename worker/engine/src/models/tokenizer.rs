//! CLIP's tokenizer: byte-level byte-pair encoding of lower-cased words.
//!
//! A text is normalised (NFC, white space collapsed, lower case), cut into words, and each word's bytes, written as
//! printable letters with `</w>` after the last, are merged pair by pair in the order of the merge table.

use std::path::Path;

use distillery_common::teacher::{Error, Vocabulary, WORD_END};
use icu_normalizer::ComposingNormalizer;
use regex::Regex;

/// Contractions, runs of letters, single digits, runs of anything else.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+";

/// Most bytes of a text that are read; far beyond what fits the ids.
const MAX_TEXT_BYTES: usize = 16 << 10;

/// A tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    vocabulary: Vocabulary,
    words: Regex,
    letters: Vec<char>,
}

impl Tokenizer {
    /// Reads the tokenizer in `folder` (tokenizer.json, or vocab.json and merges.txt) for an encoder with `positions`
    /// positions and `vocabulary` entries.
    ///
    /// # Errors
    /// See [`Vocabulary::open`].
    pub fn open(folder: &Path, positions: usize, vocabulary: i64) -> Result<Self, Error> {
        Ok(Self {
            vocabulary: Vocabulary::open(folder, positions, vocabulary)?,
            words: Regex::new(WORDS).expect("the pattern is sound"),
            letters: byte_letters(),
        })
    }

    /// Ids in every text.
    pub fn length(&self) -> usize {
        self.vocabulary.length
    }

    /// Start token, the text's tokens as far as they fit, end token, padding: always `length` ids.
    pub fn encode(&self, text: &str) -> Vec<i64> {
        let table = &self.vocabulary;
        let mut ids = vec![table.start];
        ids.extend(self.tokens(text).into_iter().take(table.length - 2));
        ids.push(table.end);
        ids.resize(table.length, table.pad);
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
            .vocabulary
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
                let known = self.vocabulary.ids.get(&symbol).copied();
                ids.extend(known.or(self.vocabulary.unknown));
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
        let rank = |pair: &[String]| {
            self.vocabulary
                .ranks
                .get(&(pair[0].clone(), pair[1].clone()))
                .copied()
        };
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
