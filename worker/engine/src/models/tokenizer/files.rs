//! The files that hold a tokenizer: tokenizer.json, or vocab.json with merges.txt; and its configuration.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Map, Value};

use super::{Error, WORD_END};

/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Tokens of CLIP's own files, where nothing else is said.
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// What the files say.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) ids: HashMap<String, i64>,
    pub(super) ranks: HashMap<(String, String), usize>,
    pub(super) special: BTreeSet<String>,
    pub(super) start: String,
    pub(super) end: String,
    pub(super) pad: String,
    pub(super) unknown: String,
    pub(super) max_length: Option<usize>,
}

pub(super) fn read(folder: &Path) -> Result<Tables, Error> {
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
        let file = object(path)?;
        let model = file.get("model").and_then(Value::as_object);
        let model = model.ok_or_else(|| wrong(path, "has no model"))?;
        let text = |key: &str| model.get(key).and_then(Value::as_str);
        if text("type").is_some_and(|kind| kind != "BPE")
            || text("end_of_word_suffix") != Some(WORD_END)
        {
            return Err(wrong(
                path,
                "is not CLIP's: it must hold byte-pair encoding with words ending in </w>",
            ));
        }
        let vocabulary = model.get("vocab").and_then(Value::as_object);
        self.fill_ids(
            path,
            vocabulary.ok_or_else(|| wrong(path, "has no model.vocab"))?,
        )?;
        let merges = model.get("merges").and_then(Value::as_array);
        for merge in merges.ok_or_else(|| wrong(path, "has no model.merges"))? {
            let pair = match merge {
                Value::String(line) => line.split_once(' '),
                Value::Array(pair) => pair
                    .first()
                    .and_then(Value::as_str)
                    .zip(pair.get(1).and_then(Value::as_str)),
                _ => None,
            };
            self.add_merge(
                pair.ok_or_else(|| {
                    wrong(path, format!("has the merge {merge}, which is no pair"))
                })?,
            );
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
                return Err(wrong(
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
        self.fill_ids(&path, &object(&path)?)?;
        let path = folder.join("merges.txt");
        let text = String::from_utf8(bytes(&path)?).map_err(|_| wrong(&path, "is not UTF-8"))?;
        // CLIP's original file ends with an empty line and begins with its version.
        for line in text
            .lines()
            .filter(|line| !line.starts_with("#version") && !line.is_empty())
        {
            self.add_merge(
                line.split_once(' ').ok_or_else(|| {
                    wrong(&path, format!("has the line {line:?}, which is no pair"))
                })?,
            );
        }
        Ok(())
    }

    fn fill_ids(&mut self, path: &Path, vocabulary: &Map<String, Value>) -> Result<(), Error> {
        for (token, id) in vocabulary {
            let id = id.as_i64().ok_or_else(|| {
                wrong(
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

fn wrong(path: &Path, problem: impl Into<String>) -> Error {
    Error::Content {
        path: path.to_owned(),
        problem: problem.into(),
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>, Error> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > MAX_FILE_BYTES {
        return Err(wrong(
            path,
            format!("has {size} bytes, too many for a tokenizer"),
        ));
    }
    std::fs::read(path).map_err(io)
}

fn object(path: &Path) -> Result<Map<String, Value>, Error> {
    serde_json::from_slice(&bytes(path)?).map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })
}

fn optional_object(path: &Path) -> Result<Map<String, Value>, Error> {
    match path.is_file() {
        true => object(path),
        false => Ok(Map::new()),
    }
}
