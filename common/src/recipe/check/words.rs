//! Values, keys and paths as messages name them.

use super::super::nearest;
use super::super::raw::{Node, Value};
use super::super::table::{Kind, RECIPE, Section, Word};
use super::resolve::{Checked, Resolved};

/// `path.key`, or `key` at the top.
pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// A value as a message names it.
pub(super) fn describe(node: &Node) -> String {
    let short = |text: &str| match text.char_indices().nth(40) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text.to_owned(),
    };
    match &node.value {
        Value::Null => "empty".into(),
        Value::Scalar { text, plain: true } => short(text),
        Value::Scalar { text, plain: false } => format!("the text {:?}", short(text)),
        Value::List(items) => format!("a list of {}", items.len()),
        Value::Map(_) => "a section".into(),
    }
}

/// The words of `words` that may be used, for messages.
pub(super) fn built(words: &[Word]) -> Vec<&'static str> {
    words.iter().filter(|w| w.built).map(|w| w.name).collect()
}

/// Whether a value is this word.
pub(super) fn is_text(resolved: &Resolved, word: &str) -> bool {
    matches!(&resolved.value, Checked::Text(text) if text == word)
}

/// Whether two values are the same text.
pub(super) fn same_scalar(a: &Node, b: &Node) -> bool {
    match (&a.value, &b.value) {
        (Value::Scalar { text: a, .. }, Value::Scalar { text: b, .. }) => a == b,
        _ => false,
    }
}

/// A default has no place in the text.
pub(super) fn unplaced(mut resolved: Resolved) -> Resolved {
    resolved.span = None;
    if let Checked::List(items) = &mut resolved.value {
        items.iter_mut().for_each(|item| item.span = None);
    }
    resolved
}

/// The way out of an unknown key.
pub(super) fn unknown_key_help(section: &'static Section, key: &str) -> String {
    if key == "<<" {
        return "merge keys are not read: stages inherit the sections above them by themselves"
            .into();
    }
    let keys = || section.fields.iter().map(|f| f.key);
    if let Some(near) = nearest::of(key, keys()) {
        return format!("did you mean {near}?");
    }
    if let Some(home) = home_of(&RECIPE, "", key) {
        return format!("{key} is a key of {home}");
    }
    let known: Vec<&str> = keys().collect();
    format!("the keys of {} are {}", section.name, known.join(", "))
}

/// The path of the first section that has `key`.
fn home_of(section: &'static Section, path: &str, key: &str) -> Option<String> {
    for field in section.fields {
        let here = join(path, field.key);
        match &field.kind {
            Kind::Section(inner) | Kind::Switch(inner) | Kind::List(Kind::Section(inner)) => {
                if inner.fields.iter().any(|f| f.key == key) {
                    return Some(here);
                }
                if let Some(home) = home_of(inner, &here, key) {
                    return Some(home);
                }
            }
            _ => {}
        }
    }
    None
}
