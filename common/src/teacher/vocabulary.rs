//! A CLIP tokenizer's tables: tokenizer.json, or vocab.json with merges.txt; and its configuration.
//!
//! What ids a text gets is the engine's business; whether the tables can give any is found out here.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Map, Value};

use super::Error;
use super::keys::{Keys, read_bytes};

/// What ends a word.
pub const WORD_END: &str = "</w>";

/// Tokens of CLIP's own files, where nothing else is said.
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// A tokenizer's tables, checked for the encoder that reads the ids.
#[derive(Debug)]
pub struct Vocabulary {
    /// Ids by token.
    pub ids: HashMap<String, i64>,
    /// Ranks by pair of neighbours: the lowest is merged first.
    pub ranks: HashMap<(String, String), usize>,
    /// Tokens that are found in the raw text, with their ids, longest first.
    pub special: Vec<(String, i64)>,
    /// Id of what has none.
    pub unknown: Option<i64>,
    /// Id before every text.
    pub start: i64,
    /// Id after every text.
    pub end: i64,
    /// Id that short texts are filled up with.
    pub pad: i64,
    /// Ids in every text.
    pub length: usize,
}

impl Vocabulary {
    /// Reads the tokenizer in `folder` for an encoder with `positions` positions and `vocabulary` entries.
    ///
    /// # Errors
    /// When a file is missing or damaged, is not CLIP's kind, or names ids that the encoder has not.
    pub fn open(folder: &Path, positions: usize, vocabulary: i64) -> Result<Self, Error> {
        let tables = read(folder)?;
        let wrong = |problem: String| Error::file(folder, problem);
        let outside = |id: &i64| !(0..vocabulary).contains(id);
        if let Some((token, id)) = tables.ids.iter().find(|(_, id)| outside(id)) {
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
        let (start, end) = (id("start", &tables.start)?, id("end", &tables.end)?);
        let pad = id("pad", &tables.pad)?;
        let mut special = tables
            .special
            .iter()
            .map(|token| Ok((token.clone(), id("special", token)?)))
            .collect::<Result<Vec<_>, Error>>()?;
        special.sort_by_key(|(token, _)| std::cmp::Reverse(token.len()));
        Ok(Self {
            special,
            unknown: tables.ids.get(&tables.unknown).copied(),
            start,
            end,
            pad,
            length,
            ids: tables.ids,
            ranks: tables.ranks,
        })
    }
}

/// What the files say.
#[derive(Debug)]
struct Tables {
    ids: HashMap<String, i64>,
    ranks: HashMap<(String, String), usize>,
    special: BTreeSet<String>,
    start: String,
    end: String,
    pad: String,
    unknown: String,
    max_length: Option<usize>,
}

fn read(folder: &Path) -> Result<Tables, Error> {
    let config = optional_object(&folder.join("tokenizer_config.json"))?;
    let map = optional_object(&folder.join("special_tokens_map.json"))?;
    let named = |key: &str| {
        [&config, &map]
            .into_iter()
            .find_map(|object| token_text(object.get(key)?))
    };
    let role = |key: &str, default: &str| named(key).unwrap_or_else(|| default.to_owned());
    let (start, end) = (role("bos_token", START), role("eos_token", END));
    let (pad, unknown) = (role("pad_token", END), role("unk_token", END));
    let mut tables = Tables {
        ids: HashMap::new(),
        ranks: HashMap::new(),
        special: [&start, &end, &pad, &unknown]
            .into_iter()
            .cloned()
            .collect(),
        start,
        end,
        pad,
        unknown,
        // Files without a limit carry a huge number there.
        max_length: config
            .get("model_max_length")
            .and_then(Value::as_u64)
            .map(|length| length as usize),
    };
    let whole = folder.join("tokenizer.json");
    match whole.is_file() {
        true => tables.fill_from_one_file(&whole)?,
        false => tables.fill_from_two_files(folder)?,
    }
    Ok(tables)
}

impl Tables {
    fn fill_from_one_file(&mut self, path: &Path) -> Result<(), Error> {
        let file = Keys::read(path)?;
        let model = file.get("model").and_then(Value::as_object);
        let model = model.ok_or_else(|| Error::file(path, "has no model"))?;
        let text = |key: &str| model.get(key).and_then(Value::as_str);
        if text("type").is_some_and(|kind| kind != "BPE")
            || text("end_of_word_suffix") != Some(WORD_END)
        {
            return Err(Error::file(
                path,
                "is not CLIP's: it must hold byte-pair encoding with words ending in </w>",
            ));
        }
        let vocabulary = model.get("vocab").and_then(Value::as_object);
        self.fill_ids(
            path,
            vocabulary.ok_or_else(|| Error::file(path, "has no model.vocab"))?,
        )?;
        let merges = model.get("merges").and_then(Value::as_array);
        for merge in merges.ok_or_else(|| Error::file(path, "has no model.merges"))? {
            let pair = match merge {
                Value::String(line) => line.split_once(' '),
                Value::Array(pair) => pair
                    .first()
                    .and_then(Value::as_str)
                    .zip(pair.get(1).and_then(Value::as_str)),
                _ => None,
            };
            self.add_merge(pair.ok_or_else(|| {
                Error::file(path, format!("has the merge {merge}, which is no pair"))
            })?);
        }
        for token in file
            .get("added_tokens")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let content = token.get("content").and_then(Value::as_str);
            let (Some(content), Some(id)) = (content, token.get("id").and_then(Value::as_i64))
            else {
                return Err(Error::file(
                    path,
                    format!("has the added token {token} without content or id"),
                ));
            };
            self.ids.insert(content.to_owned(), id);
            self.special.insert(content.to_owned());
        }
        Ok(())
    }

    fn fill_from_two_files(&mut self, folder: &Path) -> Result<(), Error> {
        let path = folder.join("vocab.json");
        self.fill_ids(&path, Keys::read(&path)?.map())?;
        let path = folder.join("merges.txt");
        let text = String::from_utf8(read_bytes(&path)?)
            .map_err(|_| Error::file(&path, "is not UTF-8"))?;
        // CLIP's original file ends with an empty line and begins with its version.
        for line in text
            .lines()
            .filter(|line| !line.starts_with("#version") && !line.is_empty())
        {
            self.add_merge(line.split_once(' ').ok_or_else(|| {
                Error::file(&path, format!("has the line {line:?}, which is no pair"))
            })?);
        }
        Ok(())
    }

    fn fill_ids(&mut self, path: &Path, vocabulary: &Map<String, Value>) -> Result<(), Error> {
        for (token, id) in vocabulary {
            let id = id.as_i64().ok_or_else(|| {
                Error::file(
                    path,
                    format!("gives {token:?} the id {id}, which is no whole number"),
                )
            })?;
            self.ids.insert(token.clone(), id);
        }
        Ok(())
    }

    fn add_merge(&mut self, (left, right): (&str, &str)) {
        let rank = self.ranks.len();
        self.ranks
            .entry((left.to_owned(), right.to_owned()))
            .or_insert(rank);
    }
}

/// A token, plain or with its properties.
fn token_text(value: &Value) -> Option<String> {
    value
        .as_str()
        .or_else(|| value.get("content")?.as_str())
        .map(str::to_owned)
}

/// The keys of a file that need not be there.
fn optional_object(path: &Path) -> Result<Map<String, Value>, Error> {
    match path.is_file() {
        true => Ok(Keys::read(path)?.map().clone()),
        false => Ok(Map::new()),
    }
}
