//! Maps whose keys the user chooses: labels and resources of Kubernetes.
//!
//! The rules are those of the API server, so that a recipe is refused here and not hours later there.

use std::collections::BTreeMap;

use super::super::fault::Code;
use super::super::table::MapOf;
use super::resolve::{At, Checked, Resolved, Resolver};
use super::words::{describe, join};
use crate::recipe::raw::Value;

/// Most characters of a name, of a prefix before its slash, and of a whole DNS name.
const NAME: usize = 63;
const PREFIX: usize = 253;
/// What may stand behind an amount.
const SUFFIXES: [&str; 16] = [
    "", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei",
];

/// Checks a map; none when a fault was reported.
pub(super) fn check(resolver: &mut Resolver<'_>, of: MapOf, at: &At<'_>) -> Option<Resolved> {
    let entries = match &at.node.value {
        Value::Null => return Some(Resolved::new(Checked::Absent, at.span)),
        Value::Map(entries) => entries,
        Value::Scalar { .. } | Value::List(_) => {
            resolver.wrong_type(at, "keys with a text each, like {disk: ssd}");
            return None;
        }
    };
    let before = resolver.faults.len();
    let mut map = BTreeMap::new();
    for entry in entries {
        let path = join(at.path, &entry.key);
        let key_span = entry.key_span.or(at.span);
        if !is_qualified_name(&entry.key) {
            let message = format!("{} has the key {:?}", at.path, entry.key);
            let label = "no key that Kubernetes takes";
            let help = "write NAME or PREFIX/NAME, of letters, digits and -_. between them";
            let help = Some(help.to_owned());
            resolver.fault(Code::OutOfRange, &path, key_span, &message, label, help);
            continue;
        }
        let value = match &entry.node.value {
            Value::Scalar { text, .. } => text.clone(),
            Value::Null | Value::List(_) | Value::Map(_) => {
                let span = entry.node.span.or(key_span);
                let node = &entry.node;
                resolver.wrong_type(
                    &At {
                        path: &path,
                        node,
                        span,
                    },
                    "text",
                );
                continue;
            }
        };
        let (fits, label, help) = match of {
            MapOf::Labels => (
                value.is_empty() || is_name(&value),
                "no value of a label",
                "at most 63 letters, digits and -_. between them",
            ),
            MapOf::Quantities => (
                is_quantity(&value),
                "no amount of a resource",
                "write a number, or one with a unit: 500m, 4, 16Gi",
            ),
        };
        if !fits {
            let span = entry.node.span.or(key_span);
            let message = format!("{path} is {}", describe(&entry.node));
            let help = Some(help.to_owned());
            resolver.fault(Code::OutOfRange, &path, span, &message, label, help);
        } else if map.insert(entry.key.clone(), value).is_some() {
            let message = format!("{path} stands twice");
            let help = Some("remove one of them".to_owned());
            resolver.fault(
                Code::Duplicate,
                &path,
                key_span,
                &message,
                "stands before",
                help,
            );
        }
    }
    (resolver.faults.len() == before).then(|| Resolved::new(Checked::Map(map), at.span))
}

/// Letters, digits and `-_.`, with a letter or digit at both ends.
fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |at: Option<&u8>| at.is_some_and(u8::is_ascii_alphanumeric);
    let inner = |b: &u8| b.is_ascii_alphanumeric() || b"-_.".contains(b);
    bytes.len() <= NAME && ends(bytes.first()) && ends(bytes.last()) && bytes.iter().all(inner)
}

/// A name, or one behind a DNS name and a slash.
pub(super) fn is_qualified_name(text: &str) -> bool {
    match text.split_once('/') {
        Some((prefix, name)) => is_dns_name(prefix) && is_name(name),
        None => is_name(text),
    }
}

/// A DNS subdomain (RFC 1123) in lower case.
pub(super) fn is_dns_name(text: &str) -> bool {
    let end = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let label = |label: &str| {
        let bytes = label.as_bytes();
        let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
        end(bytes.first()) && end(bytes.last()) && bytes.iter().all(inner)
    };
    text.len() <= PREFIX && text.split('.').all(label)
}

/// A decimal number with one of the units.
fn is_quantity(text: &str) -> bool {
    let is_number = |b: u8| b.is_ascii_digit() || b == b'.';
    let end = text
        .bytes()
        .position(|b| !is_number(b))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    number.parse::<f64>().is_ok_and(f64::is_finite) && SUFFIXES.contains(&suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_api_server() {
        for good in ["a", "disk-type", "nvidia.com/gpu.product", "Team_1"] {
            assert!(is_qualified_name(good), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "a/b/c",
            "/a",
            "UP.per/a",
            "a b",
            &"x".repeat(64),
        ] {
            assert!(!is_qualified_name(bad), "{bad}");
        }
        assert!(is_dns_name("runs.team-1") && !is_dns_name("Runs") && !is_dns_name("a..b"));
    }

    #[test]
    fn amounts_are_numbers_with_a_unit() {
        for good in ["1", "0.5", "500m", "16Gi", "1e"] {
            assert_eq!(is_quantity(good), good != "1e", "{good}");
        }
        for bad in ["", "Gi", "16GB", "-1", "4 Gi", "1.2.3"] {
            assert!(!is_quantity(bad), "{bad}");
        }
    }
}
