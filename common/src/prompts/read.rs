//! Files of prompts as users write them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;

use super::{Error, Prompt, Report, Skipped, parquet};

/// Endings of files that can be read.
pub(super) const FORMS: [&str; 3] = ["txt", "jsonl", "parquet"];

/// Names of the field or column that holds the text, in the order they are looked for.
pub(super) const FIELDS: [&str; 3] = ["prompt", "text", "caption"];

/// Longest line, or text of a row.
pub(super) const MAX_LINE_BYTES: u64 = 64 << 10;

/// Reads the distinct prompts of a .txt (one per line), .jsonl (an object per line) or .parquet file, in the
/// order of the file. The text is in `prompt`, `text` or `caption`.
///
/// # Errors
///
/// A file that cannot be read, with the line; a file without any prompt.
pub fn load(path: &Path) -> Result<(Vec<Prompt>, Report), Error> {
    let mut list = List::new(path);
    match path.extension().and_then(|e| e.to_str()) {
        Some("txt") => lines(path, &mut list, |line| Ok(Some(line.to_owned())))?,
        Some("jsonl") => lines(path, &mut list, json_text)?,
        Some("parquet") => parquet::read(path, &mut list)?,
        _ => {
            return Err(Error::UnknownForm {
                file: path.to_owned(),
            });
        }
    }
    list.finish()
}

/// Distinct prompts so far.
pub(super) struct List {
    prompts: Vec<Prompt>,
    seen: BTreeMap<[u8; 16], ()>,
    report: Report,
}

impl List {
    fn new(path: &Path) -> Self {
        Self {
            prompts: Vec::new(),
            seen: BTreeMap::new(),
            report: Report {
                file: path.to_owned(),
                ..Report::default()
            },
        }
    }

    /// Takes the text of line or row `number`, counted from 1.
    pub(super) fn push(&mut self, number: u64, text: &str) {
        let Some(prompt) = Prompt::new(text) else {
            skip(&mut self.report.blank, number);
            return;
        };
        if self.seen.insert(prompt.id(), ()).is_some() {
            skip(&mut self.report.duplicate, number);
            return;
        }
        self.prompts.push(prompt);
    }

    fn finish(mut self) -> Result<(Vec<Prompt>, Report), Error> {
        if self.prompts.is_empty() {
            return Err(Error::Empty {
                file: self.report.file,
            });
        }
        self.report.kept = self.prompts.len() as u64;
        Ok((self.prompts, self.report))
    }
}

fn skip(skipped: &mut Option<Skipped>, number: u64) {
    let first = Skipped {
        count: 0,
        first: number,
    };
    skipped.get_or_insert(first).count += 1;
}

pub(super) fn unreadable(path: &Path, source: std::io::Error) -> Error {
    Error::Unreadable {
        file: path.to_owned(),
        source,
    }
}

/// Reads a text file line by line; `text_of` finds the prompt in a line that is not blank.
fn lines(
    path: &Path,
    list: &mut List,
    text_of: impl Fn(&str) -> Result<Option<String>, String>,
) -> Result<(), Error> {
    let file = File::open(path).map_err(|e| unreadable(path, e))?;
    let mut file = BufReader::new(file);
    let mut bytes = Vec::new();
    for number in 1.. {
        bytes.clear();
        let read = file
            .by_ref()
            .take(MAX_LINE_BYTES + 1)
            .read_until(b'\n', &mut bytes);
        if read.map_err(|e| unreadable(path, e))? == 0 {
            break;
        }
        let fault = |problem: String| Error::Line {
            file: path.to_owned(),
            line: number,
            problem,
        };
        if bytes.len() as u64 > MAX_LINE_BYTES {
            return Err(fault(format!("longer than {MAX_LINE_BYTES} bytes")));
        }
        let line = std::str::from_utf8(&bytes).map_err(|_| fault("not UTF-8".into()))?;
        let line = if number == 1 {
            line.trim_start_matches('\u{feff}')
        } else {
            line
        };
        let text = if line.trim().is_empty() {
            None
        } else {
            text_of(line).map_err(fault)?
        };
        list.push(number, text.as_deref().unwrap_or(""));
    }
    Ok(())
}

/// The prompt in a line of JSON; none when it is null.
fn json_text(line: &str) -> Result<Option<String>, String> {
    let value: serde_json::Value =
        serde_json::from_str(line).map_err(|e| format!("not JSON: {e}"))?;
    let Some(fields) = value.as_object() else {
        return Err("not a JSON object: expected {\"prompt\": …}".into());
    };
    match FIELDS.iter().find_map(|name| fields.get(*name)) {
        Some(serde_json::Value::String(text)) => Ok(Some(text.clone())),
        Some(serde_json::Value::Null) => Ok(None),
        Some(_) => Err("the prompt is not text".into()),
        None => Err(format!("none of the keys {}", FIELDS.join(", "))),
    }
}
