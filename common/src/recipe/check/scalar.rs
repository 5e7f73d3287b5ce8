//! Single values against their kind in the table.

use std::path::{Component, Path, PathBuf};

use super::super::fault::Code;
use super::super::nearest;
use super::super::raw::Value;
use super::super::table::{ALMOST_ONE, Kind, Word};
use super::resolve::{At, Checked, Resolved, Resolver};
use super::words::{built, describe};
use crate::storage::layout::is_segment;

/// Bounds from here on are only there to keep numbers sane: nobody is told.
const LARGE: u64 = 1 << 40;

/// Schemes a run URI may have; what each is called elsewhere is the store's business.
const SCHEMES: [&str; 10] = [
    "file", "s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "memory",
];

/// Checks a scalar kind; none when a fault was reported.
pub(super) fn check(
    resolver: &mut Resolver<'_>,
    kind: &'static Kind,
    at: &At<'_>,
) -> Option<Resolved> {
    let Value::Scalar { text, plain } = &at.node.value else {
        resolver.wrong_type(at, &expected(kind));
        return None;
    };
    if text.contains("${") && !matches!(kind, Kind::Secret) {
        let message = format!("{} cannot come from outside the recipe", at.path);
        let help =
            "${env:NAME} and ${file:PATH} are read in cluster.token only; use --set for other keys";
        resolver.fault(
            Code::Reference,
            at.path,
            at.span,
            &message,
            "a reference",
            Some(help.into()),
        );
        return None;
    }
    let checked = match kind {
        Kind::Bool => boolean(resolver, at, text, *plain),
        Kind::Whole(min, max) => whole(resolver, at, (text, *plain), (*min, *max)),
        Kind::Real { min, max, closed } => {
            real(resolver, at, (text, *plain), (*min, *max, *closed))
        }
        Kind::Word(words) => one_of(resolver, at, text, words),
        Kind::Text => non_empty(resolver, at, text),
        Kind::Name => name(resolver, at, text),
        Kind::DnsName => dns_name(resolver, at, text),
        Kind::Path => non_empty(resolver, at, text)
            .map(|_| Checked::Text(absolute(resolver.base, text).display().to_string())),
        Kind::Uri => uri(resolver, at, text),
        Kind::Secret => secret(resolver, at, text),
        Kind::ShareOrPath if *plain && text.parse::<f64>().is_ok() => {
            let bounds = (0.0, 0.9, true);
            real(resolver, at, (text, true), bounds)
        }
        Kind::ShareOrPath => non_empty(resolver, at, text)
            .map(|_| Checked::Text(absolute(resolver.base, text).display().to_string())),
        Kind::Or(..)
        | Kind::Switch(_)
        | Kind::Section(_)
        | Kind::List(_)
        | Kind::Pair(_)
        | Kind::Targets
        | Kind::Map(_)
        | Kind::Shell
        | Kind::Words
        | Kind::NotBuilt => unreachable!("{kind:?} is not a scalar kind"),
    }?;
    Some(Resolved::new(checked, at.span))
}

fn expected(kind: &Kind) -> String {
    match kind {
        Kind::Bool => "true or false".into(),
        Kind::Whole(..) => "a whole number".into(),
        Kind::Real { .. } => "a number".into(),
        Kind::Word(words) => either(&built(words)),
        Kind::Path => "a path".into(),
        Kind::Uri => "a folder or a URI".into(),
        Kind::ShareOrPath => "a share like 0.01, or a file".into(),
        _ => "text".into(),
    }
}

/// `a`, `a or b`, `a, b or c`.
pub(super) fn either(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [most @ .., last] => format!("{} or {last}", most.join(", ")),
    }
}

fn boolean(resolver: &mut Resolver<'_>, at: &At<'_>, text: &str, plain: bool) -> Option<Checked> {
    match text {
        "true" if plain => Some(Checked::Bool(true)),
        "false" if plain => Some(Checked::Bool(false)),
        _ => {
            resolver.wrong_type(at, "true or false");
            None
        }
    }
}

fn whole(
    resolver: &mut Resolver<'_>,
    at: &At<'_>,
    (text, plain): (&str, bool),
    (min, max): (u64, u64),
) -> Option<Checked> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !plain || !is_number {
        let loose = text.replace(['_', ','], "").parse::<f64>().ok();
        let help = loose
            .filter(|v| v.fract() == 0.0 && *v >= 0.0 && *v < 1e15)
            .map(|v| format!("write {v:.0}"));
        let found = describe(at.node);
        let message = format!("{} is {found}", at.path);
        resolver.fault(
            Code::WrongType,
            at.path,
            at.span,
            &message,
            "expected a whole number",
            help,
        );
        return None;
    }
    let value = text.strip_prefix('+').unwrap_or(text).parse::<u64>().ok();
    match value.filter(|v| (min..=max).contains(v)) {
        Some(value) => Some(Checked::Whole(value)),
        None => {
            let message = format!("{} is {}", at.path, describe(at.node));
            let label = match max {
                _ if min == max => format!("must be {min}"),
                LARGE.. => format!("must be at least {min}"),
                _ => format!("must be {min} to {max}"),
            };
            resolver.fault(Code::OutOfRange, at.path, at.span, &message, &label, None);
            None
        }
    }
}

fn real(
    resolver: &mut Resolver<'_>,
    at: &At<'_>,
    (text, plain): (&str, bool),
    (min, max, closed): (f64, f64, bool),
) -> Option<Checked> {
    let value = text.parse::<f64>().ok().filter(|_| plain);
    let Some(value) = value else {
        resolver.wrong_type(at, "a number");
        return None;
    };
    let fits = value.is_finite() && value <= max && (value > min || (closed && value == min));
    if !fits {
        let message = format!("{} is {}", at.path, describe(at.node));
        let from = if closed { "at least" } else { "above" };
        let to = if max == ALMOST_ONE {
            "below 1".into()
        } else {
            format!("at most {max}")
        };
        let label = format!("must be {from} {min} and {to}");
        resolver.fault(Code::OutOfRange, at.path, at.span, &message, &label, None);
        return None;
    }
    // -0.0 and 0.0 are one recipe.
    Some(Checked::Real(value + 0.0))
}

fn one_of(
    resolver: &mut Resolver<'_>,
    at: &At<'_>,
    text: &str,
    words: &'static [Word],
) -> Option<Checked> {
    match words.iter().find(|w| w.name == text) {
        Some(word) if word.built => Some(Checked::Text(word.name.into())),
        Some(word) => {
            let message = format!("{} {} is not built yet", at.path, word.name);
            let help = format!("use {}", either(&built(words)));
            resolver.fault(
                Code::NotBuilt,
                at.path,
                at.span,
                &message,
                "not built yet",
                Some(help),
            );
            None
        }
        None => {
            let message = format!("{} cannot be {}", at.path, describe(at.node));
            let label = format!("expected {}", either(&built(words)));
            let near = nearest::of(text, words.iter().map(|w| w.name));
            let help = near.map(|n| format!("did you mean {n}?"));
            resolver.fault(Code::UnknownWord, at.path, at.span, &message, &label, help);
            None
        }
    }
}

fn non_empty(resolver: &mut Resolver<'_>, at: &At<'_>, text: &str) -> Option<Checked> {
    if !text.trim().is_empty() && !text.contains('\0') {
        return Some(Checked::Text(text.to_owned()));
    }
    let message = format!("{} is empty text", at.path);
    resolver.fault(
        Code::OutOfRange,
        at.path,
        at.span,
        &message,
        "expected text",
        None,
    );
    None
}

fn name(resolver: &mut Resolver<'_>, at: &At<'_>, text: &str) -> Option<Checked> {
    if is_segment(text) && text.len() <= 64 {
        return Some(Checked::Text(text.to_owned()));
    }
    let message = format!("{} {:?} is not a plain name", at.path, text);
    let label = "only letters, digits and . _ = - (at most 64)";
    let help = Some("it becomes part of storage keys".to_owned());
    resolver.fault(Code::OutOfRange, at.path, at.span, &message, label, help);
    None
}

fn dns_name(resolver: &mut Resolver<'_>, at: &At<'_>, text: &str) -> Option<Checked> {
    if super::map::is_dns_name(text) {
        return Some(Checked::Text(text.to_owned()));
    }
    let message = format!("{} {text:?} is no name in Kubernetes", at.path);
    let label = "only a-z, 0-9, - and . between them";
    let help = Some("such as distillery-runs".to_owned());
    resolver.fault(Code::OutOfRange, at.path, at.span, &message, label, help);
    None
}

fn uri(resolver: &mut Resolver<'_>, at: &At<'_>, text: &str) -> Option<Checked> {
    let mut refuse = |message: String, label: &str, help: &str| {
        resolver.fault(
            Code::Address,
            at.path,
            at.span,
            &message,
            label,
            Some(help.into()),
        );
        None
    };
    let Some((scheme, rest)) = text.split_once("://") else {
        non_empty(resolver, at, text)?;
        let folder = absolute(resolver.base, text);
        return match url::Url::from_directory_path(&folder) {
            Ok(url) => Some(Checked::Text(url.as_str().trim_end_matches('/').to_owned())),
            Err(()) => None,
        };
    };
    if !SCHEMES.contains(&scheme) {
        let help = "use a folder, file://, s3://, gs:// or az://";
        let message = format!("{} has the unknown scheme {scheme}://", at.path);
        return refuse(message, "unknown scheme", help);
    }
    if scheme == "memory" {
        let message = format!("{} would live in one process only", at.path);
        return refuse(message, "memory:// is for tests", "use a folder or file://");
    }
    if rest
        .split('/')
        .next()
        .is_some_and(|host| host.contains('@'))
    {
        let message = format!("{} holds credentials", at.path);
        let help = "give credentials in the environment (AWS_ACCESS_KEY_ID and the like)";
        return refuse(message, "user information in a URI", help);
    }
    let parsed = url::Url::parse(text);
    let plain = parsed
        .as_ref()
        .is_ok_and(|u| u.query().is_none() && u.fragment().is_none());
    let placed = scheme == "file" || parsed.as_ref().is_ok_and(|u| u.has_host());
    if !plain || !placed || (scheme == "file" && !rest.starts_with('/')) {
        let message = format!("{} {text} is not a run URI", at.path);
        let help = "write s3://BUCKET/FOLDER, or file:///ABSOLUTE/FOLDER";
        return refuse(message, "cannot be used", help);
    }
    Some(Checked::Text(text.trim_end_matches('/').to_owned()))
}

/// `${env:NAME}`, `${file:PATH}` or the text itself.
fn secret(resolver: &mut Resolver<'_>, at: &At<'_>, text: &str) -> Option<Checked> {
    let inner = text.strip_prefix("${").and_then(|t| t.strip_suffix('}'));
    let found = match inner.map(|t| t.split_once(':')) {
        None if text.contains("${") => Err("must be the whole value".to_owned()),
        None => Ok(text.to_owned()),
        Some(Some(("env", name))) => match resolver.around.variable(name) {
            Some(value) => Ok(value),
            None => Err(format!("the environment has no {name}")),
        },
        Some(Some(("file", path))) => {
            let path = absolute(resolver.base, path);
            resolver
                .around
                .read(&path)
                .map_err(|e| format!("cannot read {}: {e}", path.display()))
        }
        Some(_) => Err("neither env: nor file:".to_owned()),
    };
    match found.map(|text| text.trim().to_owned()) {
        Ok(text) if !text.is_empty() => Some(Checked::Text(text)),
        outcome => {
            let label = outcome.err().unwrap_or_else(|| "it is empty".into());
            let message = format!("{} cannot be resolved", at.path);
            let help = "write ${env:NAME} or ${file:PATH}, or leave it out: a token is then made"
                .to_owned();
            resolver.fault(
                Code::Reference,
                at.path,
                at.span,
                &message,
                &label,
                Some(help),
            );
            None
        }
    }
}

/// `text` below `base` unless absolute, with `.` and `..` folded away.
pub(super) fn absolute(base: &Path, text: &str) -> PathBuf {
    let mut out = PathBuf::new();
    for part in base.join(text).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            Component::Prefix(_) | Component::RootDir | Component::Normal(_) => out.push(part),
        }
    }
    out
}
