//! What must not be shown of what engines print: an engine sees this process's environment, and a library in it may print
//! what it finds there.
//!
//! A secret is looked for as it is, line by line where it has several, and in the forms that programs write texts in: in
//! JSON, quoted for people, in a URL. Bytes are searched before lines are cut, so that none is left in halves. What is
//! shorter than [`SECRET_BYTES`] is not hidden, since it would be found in every other word.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use aho_corasick::AhoCorasick;
use distillery_common::logs::{self, LINE_BYTES};
use distillery_common::security::Join;
use distillery_common::task::Failure;

/// Shortest text that is taken for a secret.
const SECRET_BYTES: usize = 8;
/// Shortest user of a URL without a password that is taken for a token.
const TOKEN_BYTES: usize = 20;
/// Longest form that is looked for; whoever searches holds three times as much of a line without an end.
const LONGEST: usize = 64 << 10;
/// What stands in a secret's place.
const MARK: &str = "•••";

/// Parts of the names of secret variables.
const NAMES: [&str; 16] = [
    "SECRET",
    "TOKEN",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "CREDENTIAL",
    "_KEY",
    "APIKEY",
    "API-KEY",
    "ACCESSKEY",
    "ACCOUNTKEY",
    "JOIN",
    "AUTHORIZATION",
    "SIGNATURE",
    "CONNECTION_STRING",
    "CONNECTIONSTRING",
];
/// Ends of the names of secret variables.
const ENDS: [&str; 5] = ["_HEADERS", "_PASS", "_PWD", "_SAS", "_AUTH"];

/// Everything that must not be shown.
#[derive(Default)]
pub struct Secrets(RwLock<Known>);

#[derive(Default)]
struct Known {
    /// As they are.
    secrets: BTreeSet<String>,
    search: Option<Arc<Search>>,
}

/// Finds the forms of all secrets.
struct Search {
    automaton: AhoCorasick,
    forms: Vec<Vec<u8>>,
    longest: usize,
}

impl Secrets {
    /// Those of this process's environment, which its engines inherit.
    pub fn of_environment() -> Self {
        Self::of(std::env::vars_os().map(|(name, value)| {
            let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
            (text(name), text(value))
        }))
    }

    fn of(variables: impl Iterator<Item = (String, String)>) -> Self {
        let secrets = Self::default();
        let found = variables.flat_map(|(name, value)| of_variable(&name, &value));
        secrets.add(found);
        secrets
    }

    /// The run's token is hidden from now on, wherever it was read.
    pub fn learn(&self, join: &Join) {
        let token = join.token().reveal();
        self.add([token.to_uppercase(), token, join.reveal()]);
    }

    fn add(&self, found: impl IntoIterator<Item = String>) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let before = known.secrets.len();
        known.secrets.extend(found);
        if known.secrets.len() > before {
            known.search = Search::new(&known.secrets).map(Arc::new);
        }
    }

    fn search(&self) -> Option<Arc<Search>> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.search.clone()
    }

    /// Most bytes of a line without an end that may be held before it is cut.
    pub fn most_bytes(&self) -> usize {
        let longest = self.search().map_or(0, |search| search.longest);
        (4 * LINE_BYTES).max(3 * longest)
    }

    /// A line as it may be shown: without them, plain and of bounded length. Of a line that goes on, its end stays in
    /// `bytes` for the next call if a secret may begin there.
    pub fn shown(&self, bytes: &mut Vec<u8>, goes_on: bool) -> String {
        let Some(search) = self.search() else {
            let text = logs::plain(&String::from_utf8_lossy(bytes));
            bytes.clear();
            return text;
        };
        let found = search.found(bytes);
        let until = match goes_on {
            true => search.cut(bytes, &found),
            false => bytes.len(),
        };
        let text = without(&bytes[..until], &found);
        bytes.drain(..until);
        let text = logs::whole(&String::from_utf8_lossy(&text));
        // Colours in the midst of a secret are gone only now.
        logs::cut(&search.hidden_in(&text)).to_owned()
    }

    /// `text` without them.
    pub fn hidden_in(&self, text: &str) -> String {
        match self.search() {
            Some(search) => search.hidden_in(text),
            None => text.to_owned(),
        }
    }

    /// `failure` without them.
    pub fn hidden_in_failure(&self, failure: Failure) -> Failure {
        let message = self.hidden_in(&failure.message);
        Failure { message, ..failure }
    }
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        write!(f, "Secrets({})", known.secrets.len())
    }
}

impl Search {
    /// None where nothing is secret.
    fn new(secrets: &BTreeSet<String>) -> Option<Self> {
        let forms: BTreeSet<Vec<u8>> = secrets.iter().flat_map(|secret| forms(secret)).collect();
        let forms: Vec<_> = forms.into_iter().collect();
        let longest = forms.iter().map(Vec::len).max()?;
        let automaton = AhoCorasick::new(&forms)
            .inspect_err(|error| tracing::error!(%error, "secrets cannot be hidden"))
            .ok()?;
        Some(Self {
            automaton,
            forms,
            longest,
        })
    }

    /// Where secrets stand, from and to, in order and apart from one another.
    fn found(&self, bytes: &[u8]) -> Vec<(usize, usize)> {
        let mut places: Vec<_> = self
            .automaton
            .find_overlapping_iter(bytes)
            .map(|place| (place.start(), place.end()))
            .collect();
        places.sort_unstable();
        let mut apart: Vec<(usize, usize)> = Vec::with_capacity(places.len());
        for (from, to) in places {
            match apart.last_mut() {
                Some(last) if from < last.1 => last.1 = last.1.max(to),
                _ => apart.push((from, to)),
            }
        }
        apart
    }

    /// Where `bytes`, of which more will come, can be cut: before the first secret that may have begun without an end, and
    /// before one that is whole and reaches into that.
    fn cut(&self, bytes: &[u8], found: &[(usize, usize)]) -> usize {
        let begun = bytes.len() - self.begun(bytes);
        let across = found.iter().find(|&&(from, to)| from < begun && begun < to);
        match across {
            Some(&(from, _)) if bytes.len() - from <= 2 * self.longest => from,
            // Secrets that run into one another without end: what is found of them is hidden.
            Some(&(_, to)) => to,
            None => begun,
        }
    }

    /// How many of the last bytes a secret may begin with.
    fn begun(&self, bytes: &[u8]) -> usize {
        let longest_of = |form: &Vec<u8>| {
            let most = (form.len() - 1).min(bytes.len());
            (1..=most).rev().find(|&len| bytes.ends_with(&form[..len]))
        };
        self.forms.iter().filter_map(longest_of).max().unwrap_or(0)
    }

    fn hidden_in(&self, text: &str) -> String {
        let shown = without(text.as_bytes(), &self.found(text.as_bytes()));
        // Forms are whole texts, and so is what is between them.
        String::from_utf8_lossy(&shown).into_owned()
    }
}

/// `bytes` with a mark for each of `places`.
fn without(bytes: &[u8], places: &[(usize, usize)]) -> Vec<u8> {
    let mut kept = Vec::with_capacity(bytes.len());
    let mut at = 0;
    for &(from, to) in places {
        if from >= bytes.len() {
            break;
        }
        kept.extend(&bytes[at..from]);
        kept.extend(MARK.as_bytes());
        at = to.min(bytes.len());
    }
    kept.extend(&bytes[at..]);
    kept
}

/// What is secret of a variable: all of it where its name says so, and passwords in URLs in any case.
fn of_variable(name: &str, value: &str) -> Vec<String> {
    let name = name.to_ascii_uppercase();
    let mut found = in_urls(value, name.contains("PROXY"));
    if is_secret(&name) && !is_place(value) {
        found.push(value.to_owned());
        found.extend(value.lines().map(|line| line.trim().to_owned()));
        if let Ok(json) = serde_json::from_str(value) {
            in_json(&json, false, &mut found);
        }
        let all = name.contains("HEADERS");
        for part in value.split([';', ',']) {
            if let Some((name, value)) = part.split_once('=')
                && (all || is_secret(&name.trim().to_ascii_uppercase()))
            {
                // Values of headers are written as in URLs, and may be two words: `Bearer …`.
                for value in [value.trim().to_owned(), decoded(value.trim())] {
                    found.extend(value.split_whitespace().map(str::to_owned));
                    found.push(value);
                }
            }
        }
    }
    found.retain(|secret| secret.len() >= SECRET_BYTES || is_short_user(secret));
    found
}

/// Whether it names a file or folder of this host: where a secret is, and none itself.
fn is_place(value: &str) -> bool {
    let path = Path::new(value);
    path.is_absolute() && path.exists()
}

/// Whether it is `user:password@`, which is no word however short it is.
fn is_short_user(secret: &str) -> bool {
    secret.len() > 3 && secret.contains(':') && secret.ends_with('@')
}

fn is_secret(name: &str) -> bool {
    NAMES.iter().any(|part| name.contains(part)) || ENDS.iter().any(|end| name.ends_with(end))
}

/// Texts in a key file that were given as a value: those whose names say so, line by line.
fn in_json(json: &serde_json::Value, secret: bool, found: &mut Vec<String>) {
    use serde_json::Value;
    match json {
        Value::String(text) if secret => {
            found.push(text.clone());
            found.extend(text.lines().map(|line| line.trim().to_owned()));
        }
        Value::Array(all) => all.iter().for_each(|one| in_json(one, secret, found)),
        Value::Object(all) => all.iter().for_each(|(name, one)| {
            in_json(one, is_secret(&name.to_ascii_uppercase()), found);
        }),
        Value::String(_) | Value::Number(_) | Value::Bool(_) | Value::Null => {}
    }
}

/// `user:password` of the URLs in a value, and the passwords; of a proxy, also where it is no whole URL. A user alone is
/// somebody's name, unless it is so long that it may be a token.
fn in_urls(value: &str, proxy: bool) -> Vec<String> {
    let mut found = Vec::new();
    let mut urls: Vec<&str> = value.split("://").skip(1).collect();
    if urls.is_empty() && proxy {
        urls.push(value);
    }
    for url in urls {
        let end = url
            .find(|c: char| "/?#,;\"'".contains(c) || c.is_whitespace())
            .unwrap_or(url.len());
        let Some((user, _)) = url[..end].rsplit_once('@') else {
            continue;
        };
        if !user.contains(':') && user.len() < TOKEN_BYTES {
            continue;
        }
        let short = user.len() < SECRET_BYTES;
        found.push(format!("{user}{}", if short { "@" } else { "" }));
        if let Some((_, password)) = user.split_once(':') {
            found.extend([password.to_owned(), decoded(password)]);
        }
    }
    found
}

/// Without the escapes of URLs (RFC 3986 §2.1).
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let two = after.first_chunk::<2>().filter(|_| first == b'%');
        let digits = two.and_then(|two| str::from_utf8(two).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `secret` as programs may write it.
fn forms(secret: &str) -> BTreeSet<Vec<u8>> {
    let once = [
        secret.to_owned(),
        secret.trim().to_owned(),
        logs::whole(secret),
        in_json_text(secret),
        in_ascii(&in_json_text(secret)),
        between_quotes(&format!("{secret:?}")),
        in_url(secret, ""),
        in_url(secret, "/"),
    ];
    // A message that is quoted may be in an object that is quoted again.
    let twice: Vec<String> = once.iter().map(|form| in_json_text(form)).collect();
    let all = once.into_iter().chain(twice).map(String::into_bytes);
    all.filter(|form| form.len() >= SECRET_BYTES.min(secret.len()) && form.len() <= LONGEST)
        .collect()
}

/// As between the quotes of JSON.
fn in_json_text(text: &str) -> String {
    between_quotes(&serde_json::Value::from(text).to_string())
}

fn between_quotes(quoted: &str) -> String {
    quoted[1..quoted.len() - 1].to_owned()
}

/// As JSON for those who take ASCII alone.
fn in_ascii(text: &str) -> String {
    let mut ascii = String::with_capacity(text.len());
    for unit in text.encode_utf16() {
        match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii() => ascii.push(char::from(byte)),
            _ => ascii.push_str(&format!("\\u{unit:04x}")),
        }
    }
    ascii
}

/// As in a URL, where letters, digits, `-._~` and `also` stand as they are.
fn in_url(text: &str, also: &str) -> String {
    let mut url = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        if byte.is_ascii_alphanumeric() || "-._~".contains(c) || also.contains(c) {
            url.push(c);
        } else {
            url.push_str(&format!("%{byte:02X}"));
        }
    }
    url
}

#[cfg(test)]
mod tests;
