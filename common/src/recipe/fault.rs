//! What can be wrong with a recipe, and how it is shown: code, place, caret, way out.
//!
//! Rendering never prints a secret: what stands behind a key named `token` and in front of an `@` in a URL is
//! masked in every excerpt. This module must never know what a recipe means.

use std::fmt::{self, Write as _};

use super::raw::{Origin, Span};

/// The kind of a fault. Codes are stable: they are never renumbered and never used again for something else.
///
/// | code | means |
/// |---|---|
/// | E0201 | the file cannot be read |
/// | E0202 | it is not YAML |
/// | E0203 | it is YAML, but not one plain tree of sections |
/// | E0204 | a key stands twice |
/// | E0205 | an unknown key |
/// | E0206 | a key is missing |
/// | E0207 | a value of the wrong type |
/// | E0208 | a value out of range |
/// | E0209 | an unknown word |
/// | E0210 | something that is not built yet |
/// | E0211 | a key that does not apply here |
/// | E0212 | a `${…}` that cannot be resolved |
/// | E0213 | a `--set` that points nowhere |
/// | E0214 | segments that cannot follow each other, or coarser data than stored |
/// | E0215 | a stage's name |
/// | E0216 | a time grid without the milestones |
/// | E0217 | a skip that leaves the time grid |
/// | E0218 | a global batch that cannot be shared out |
/// | E0219 | shards that cut a batch in two |
/// | E0220 | a method that cannot train these segments |
/// | E0221 | a student that cannot start from the stage it should |
/// | E0222 | an export that the student does not allow |
/// | E0223 | samplers and step counts that do not go together |
/// | E0224 | a file or folder that is not there |
/// | E0225 | a run URI or an address that cannot be used |
/// | E0226 | a rate schedule longer than its stage |
/// | E0227 | a stage to start from that is not there, or not yet |
/// | E0228 | moments that are shared out where checkpoints are not |
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Code {
    /// The file cannot be read.
    Unreadable,
    /// It is not YAML.
    Syntax,
    /// It is YAML, but not one plain tree of sections.
    Shape,
    /// A key stands twice.
    Duplicate,
    /// An unknown key.
    UnknownKey,
    /// A key is missing.
    Missing,
    /// A value of the wrong type.
    WrongType,
    /// A value out of range.
    OutOfRange,
    /// An unknown word.
    UnknownWord,
    /// Something that is not built yet.
    NotBuilt,
    /// A key that does not apply here.
    NotApplicable,
    /// A `${…}` that cannot be resolved.
    Reference,
    /// A `--set` that points nowhere.
    Set,
    /// Segments that cannot follow each other, or coarser data than stored.
    Segments,
    /// A stage's name.
    StageName,
    /// A time grid without the milestones.
    Grid,
    /// A skip that leaves the time grid.
    Skip,
    /// A global batch that cannot be shared out.
    Batch,
    /// Shards that cut a batch in two.
    Shards,
    /// A method that cannot train these segments.
    Method,
    /// A student that cannot start from the stage it should.
    Student,
    /// An export that the student does not allow.
    Export,
    /// Samplers and step counts that do not go together.
    Sampling,
    /// A file or folder that is not there.
    NoFile,
    /// A run URI or an address that cannot be used.
    Address,
    /// A rate schedule longer than its stage.
    Schedule,
    /// A stage to start from that is not there, or not yet.
    Lineage,
    /// Moments that are shared out where checkpoints are not.
    Moments,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "E{:04}", 201 + *self as u16)
    }
}

/// One complaint.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// Its kind.
    pub code: Code,
    /// Path of the value it is about (`stages.0.steps`); empty for the whole recipe.
    pub path: String,
    /// What is wrong, in one line.
    pub message: String,
    /// Said beside the caret.
    pub label: String,
    /// The way out.
    pub help: Option<String>,
    /// Where; none for the whole file.
    pub span: Option<Span>,
}

/// Everything that is wrong with one recipe, in the order of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Faults {
    file: String,
    source: String,
    arguments: Vec<String>,
    faults: Vec<Fault>,
}

/// So many faults are shown; a file with more is something else than a recipe.
const MAX_SHOWN: usize = 100;

/// Columns of source shown round a caret.
const EXCERPT_COLUMNS: usize = 100;

impl Faults {
    /// Faults found in `source`, which was read from `file` and changed by the `--set` texts `arguments`.
    pub(super) fn new(
        file: String,
        source: String,
        arguments: Vec<String>,
        mut faults: Vec<Fault>,
    ) -> Self {
        faults.sort_by_key(|f| f.span.map(|s| (s.origin, s.line, s.column)));
        Self {
            file,
            source,
            arguments,
            faults,
        }
    }

    /// The faults in the order of the file.
    pub fn list(&self) -> &[Fault] {
        &self.faults
    }

    /// For people: plain, or with terminal colours.
    pub fn render(&self, color: bool) -> String {
        let paint = Paint { color };
        let mut out = String::new();
        for fault in self.faults.iter().take(MAX_SHOWN) {
            self.render_one(&mut out, fault, &paint);
        }
        if self.faults.len() > MAX_SHOWN {
            let _ = writeln!(out, "… and {} more\n", self.faults.len() - MAX_SHOWN);
        }
        let noun = if self.faults.len() == 1 {
            "fault"
        } else {
            "faults"
        };
        let _ = writeln!(out, "{} {noun} in {}", self.faults.len(), self.file);
        out
    }

    /// For programs: a list of {code, path, message, label, help, file, line, column, width, argument}.
    pub fn to_json(&self) -> serde_json::Value {
        let list = self.faults.iter().map(|fault| {
            let line = |s: Span| matches!(s.origin, Origin::File).then_some(s.line);
            serde_json::json!({
                "code": fault.code.to_string(),
                "path": fault.path,
                "message": fault.message,
                "label": fault.label,
                "help": fault.help,
                "file": self.file,
                "line": fault.span.and_then(line),
                "column": fault.span.map(|s| s.column),
                "width": fault.span.map(|s| s.width),
                "argument": fault.span.and_then(|s| self.argument(s)).map(mask_secrets),
            })
        });
        serde_json::json!({ "faults": list.collect::<Vec<_>>() })
    }

    fn argument(&self, span: Span) -> Option<&str> {
        match span.origin {
            Origin::File => None,
            Origin::Argument(i) => self.arguments.get(i).map(String::as_str),
        }
    }

    fn render_one(&self, out: &mut String, fault: &Fault, paint: &Paint) {
        let title = paint.error(&format!("error[{}]", fault.code));
        let _ = writeln!(out, "{title}: {}", paint.bold(&one_line(&fault.message)));
        match fault.span {
            None => {
                let _ = writeln!(out, "  {} {}", paint.rule("-->"), self.file);
                if !fault.label.is_empty() {
                    let _ = writeln!(out, "   {} {}", paint.rule("="), fault.label);
                }
            }
            Some(span) => self.render_place(out, fault, span, paint),
        }
        if let Some(help) = &fault.help {
            let _ = writeln!(out, "{}: {help}", paint.help("help"));
        }
        out.push('\n');
    }

    fn render_place(&self, out: &mut String, fault: &Fault, span: Span, paint: &Paint) {
        let (place, number, text) = match self.argument(span) {
            Some(argument) => ("--set".to_owned(), String::new(), argument),
            None => (
                format!("{}:{}:{}", self.file, span.line, span.column),
                span.line.to_string(),
                self.source
                    .lines()
                    .nth(span.line.saturating_sub(1))
                    .unwrap_or(""),
            ),
        };
        let width = number.len().max(2);
        let _ = writeln!(out, "  {} {place}", paint.rule("-->"));
        let _ = writeln!(out, "{:width$} {}", "", paint.rule("|"));
        let (excerpt, indent, carets) = excerpt(&mask_secrets(text), span);
        let _ = writeln!(
            out,
            "{} {} {excerpt}",
            paint.rule(&format!("{number:width$}")),
            paint.rule("|")
        );
        let marks = paint.error(&format!(
            "{} {}",
            "^".repeat(carets),
            one_line(&fault.label)
        ));
        let _ = writeln!(
            out,
            "{:width$} {} {:indent$}{marks}",
            "",
            paint.rule("|"),
            ""
        );
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Faults {}

/// A window of one line round `span`: (text, columns before the caret, carets).
fn excerpt(line: &str, span: Span) -> (String, usize, usize) {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    let columns: Vec<char> = line.chars().map(shown).collect();
    let at = (span.column.max(1) - 1).min(columns.len());
    let carets = span.width.clamp(1, (columns.len() - at).max(1));
    let start = if at + carets.min(40) <= EXCERPT_COLUMNS {
        0
    } else {
        at - 20
    };
    let end = (start + EXCERPT_COLUMNS).min(columns.len());
    let mut text: String = columns[start..end].iter().collect();
    let mut indent = at - start;
    if start > 0 {
        text.insert_str(0, "… ");
        indent += 2;
    }
    if end < columns.len() {
        text.push_str(" …");
    }
    (
        text.trim_end().to_owned(),
        indent,
        carets.min(end.max(at + 1) - at),
    )
}

/// `text` on one line and without control characters, whatever a file put into it.
fn one_line(text: &str) -> String {
    let plain: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    plain.trim_end().to_owned()
}

/// Replaces, character by character, what follows a key `token` and what precedes an `@` in a URL.
fn mask_secrets(line: &str) -> String {
    let mut chars: Vec<char> = line.chars().collect();
    mask_tokens(&mut chars);
    mask_user_info(&mut chars);
    chars.into_iter().collect()
}

fn mask_tokens(chars: &mut [char]) {
    let key: Vec<char> = "token".chars().collect();
    let mut i = 0;
    while i + key.len() < chars.len() {
        if chars[i..i + key.len()] != key[..] {
            i += 1;
            continue;
        }
        i += key.len();
        let quote = usize::from(matches!(chars.get(i), Some('"' | '\'')));
        if !matches!(chars.get(i + quote), Some(':' | '=')) {
            continue;
        }
        i += quote + 1;
        while chars
            .get(i)
            .is_some_and(|c| c.is_whitespace() || "\"'".contains(*c))
        {
            i += 1;
        }
        if chars[i..].starts_with(&['$', '{']) {
            continue;
        }
        while chars.get(i).is_some_and(|c| !",}\"'#".contains(*c)) {
            chars[i] = '•';
            i += 1;
        }
    }
}

fn mask_user_info(chars: &mut [char]) {
    for start in 0..chars.len().saturating_sub(2) {
        if chars[start..start + 2] != ['/', '/'] {
            continue;
        }
        let rest = start + 2;
        let stop = chars[rest..]
            .iter()
            .position(|c| *c == '/' || c.is_whitespace());
        let stop = stop.map_or(chars.len(), |n| rest + n);
        if let Some(at) = chars[rest..stop].iter().rposition(|c| *c == '@') {
            chars[rest..rest + at].fill('•');
        }
    }
}

/// Terminal colours, or none.
struct Paint {
    color: bool,
}

impl Paint {
    fn with(&self, code: &str, text: &str) -> String {
        if self.color {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn error(&self, text: &str) -> String {
        self.with("1;31", text)
    }

    fn help(&self, text: &str) -> String {
        self.with("1;32", text)
    }

    fn rule(&self, text: &str) -> String {
        self.with("1;34", text)
    }

    fn bold(&self, text: &str) -> String {
        self.with("1", text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_masked_in_every_notation() {
        for (line, masked) in [
            (
                "cluster: {token: hunter2, listen: x}",
                "cluster: {token: •••••••, listen: x}",
            ),
            ("  token: 'a b'", "  token: '•••'"),
            ("cluster.token=hunter2", "cluster.token=•••••••"),
            ("{\"token\": \"hunter2\"}", "{\"token\": \"•••••••\"}"),
            ("token: ${env:TOKEN}", "token: ${env:TOKEN}"),
            (
                "output: s3://KEY:SECRET@bucket/x",
                "output: s3://••••••••••@bucket/x",
            ),
            ("tokens are fine", "tokens are fine"),
        ] {
            assert_eq!(mask_secrets(line), masked);
        }
    }

    #[test]
    fn carets_stay_under_their_value_in_long_lines() {
        let line = format!("{}BAD{}", "x".repeat(300), "y".repeat(300));
        let span = Span {
            origin: Origin::File,
            line: 1,
            column: 301,
            width: 3,
        };
        let (text, indent, carets) = excerpt(&line, span);
        let under: String = text.chars().skip(indent).take(carets).collect();
        assert_eq!(under, "BAD");
        assert!(text.chars().count() <= EXCERPT_COLUMNS + 4);
    }

    #[test]
    fn codes_are_pinned_by_their_table() {
        assert_eq!(Code::Unreadable.to_string(), "E0201");
        assert_eq!(Code::Segments.to_string(), "E0214");
        assert_eq!(Code::Schedule.to_string(), "E0226");
        assert_eq!(Code::Lineage.to_string(), "E0227");
    }
}
