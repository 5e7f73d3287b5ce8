//! YAML as a tree with positions, before anything is asked of it.
//!
//! Built from the parser's events, so that doubled keys, wrong types and unknown keys survive until the
//! checker can report them together. Bounded: bytes, nesting and nodes (aliases are copied, so a bomb is cut
//! off). This module must never know which keys a recipe has.

use serde_saphyr::granit_parser::{Event, Marker, Options, Parser, ScalarStyle};

use super::fault::{Code, Fault};

/// Where a piece of text came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The recipe file.
    File,
    /// The n-th `--set`.
    Argument(usize),
}

/// A place in the text: within one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Which text.
    pub origin: Origin,
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// In characters, at least 1.
    pub width: usize,
}

/// One value and where it stands; none for values that no text holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) span: Option<Span>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// Nothing, `null` or `~`.
    Null,
    /// A scalar; `plain` when not quoted, so that it may be a number or a boolean.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    /// Entries in the order of the file; keys may stand twice.
    Map(Vec<Entry>),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) key_span: Option<Span>,
    pub(super) node: Node,
}

/// Largest recipe file.
pub(super) const MAX_BYTES: usize = 1 << 20;
/// Most values in one recipe, copies made by aliases included.
const MAX_NODES: usize = 20_000;
/// Deepest nesting.
const MAX_DEPTH: usize = 32;

impl Node {
    /// A value that no text holds.
    pub(super) fn unplaced(value: Value) -> Self {
        Self { value, span: None }
    }

    /// The entries of a map.
    pub(super) fn entries(&self) -> Option<&[Entry]> {
        match &self.value {
            Value::Map(entries) => Some(entries),
            Value::Null | Value::Scalar { .. } | Value::List(_) => None,
        }
    }

    /// The first entry under `key`.
    pub(super) fn get(&self, key: &str) -> Option<&Node> {
        let entry = self.entries()?.iter().find(|e| e.key == key)?;
        Some(&entry.node)
    }

    /// The tree of a stored recipe.
    pub(super) fn from_json(json: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let plain = |text: String| Value::Scalar { text, plain: true };
        Self::unplaced(match json {
            Json::Null => Value::Null,
            Json::Bool(b) => plain(b.to_string()),
            Json::Number(n) => plain(n.to_string()),
            Json::String(s) => Value::Scalar {
                text: s.clone(),
                plain: false,
            },
            Json::Array(items) => Value::List(items.iter().map(Self::from_json).collect()),
            Json::Object(fields) => Value::Map(
                fields
                    .iter()
                    .map(|(key, value)| Entry {
                        key: key.clone(),
                        key_span: None,
                        node: Self::from_json(value),
                    })
                    .collect(),
            ),
        })
    }
}

/// Reads one YAML document from `text`; columns count from `offset` (the value part of a `--set`).
pub(super) fn parse(text: &str, origin: Origin, offset: usize) -> Result<Node, Box<Fault>> {
    let mut options = Options::default();
    options.emit_comments = false;
    options.flow_nesting_limit = MAX_DEPTH;
    options.block_nesting_limit = MAX_DEPTH;
    let mut reader = Reader {
        parser: Parser::new_from_str_with_options(text, options),
        text,
        origin,
        offset,
        anchors: Vec::new(),
        n_nodes: 0,
    };
    reader.document()
}

/// Turns events into nodes.
struct Reader<'a, P> {
    parser: P,
    text: &'a str,
    origin: Origin,
    offset: usize,
    /// Finished anchored nodes by the parser's id.
    anchors: Vec<(usize, Node)>,
    n_nodes: usize,
}

type Spanned<'a> = (Event<'a>, serde_saphyr::granit_parser::Span);
type ScanResult<'a> = Result<Spanned<'a>, serde_saphyr::granit_parser::ScanError>;

impl<'a, P: Iterator<Item = ScanResult<'a>>> Reader<'a, P> {
    fn document(&mut self) -> Result<Node, Box<Fault>> {
        let mut root = None;
        while let Some((event, span)) = self.next()? {
            match event {
                Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
                Event::StreamEnd => break,
                _ if root.is_some() => {
                    let message = "a second document begins here";
                    let help = "a recipe is one document: remove the line ---";
                    return Err(self.shape(self.point(span.start), message, help));
                }
                event => root = Some(self.node(event, &span)?),
            }
        }
        Ok(root.unwrap_or(Node::unplaced(Value::Null)))
    }

    fn next(&mut self) -> Result<Option<Spanned<'a>>, Box<Fault>> {
        match self.parser.next() {
            None => Ok(None),
            Some(Ok(event)) => Ok(Some(event)),
            Some(Err(error)) => Err(Box::new(Fault {
                code: Code::Syntax,
                path: String::new(),
                message: "this is not YAML".into(),
                label: error.info(),
                help: syntax_help(self.text, error.marker().line()),
                span: Some(self.point(*error.marker())),
            })),
        }
    }

    fn node(
        &mut self,
        event: Event<'a>,
        at: &serde_saphyr::granit_parser::Span,
    ) -> Result<Node, Box<Fault>> {
        self.n_nodes += 1;
        let span = self.span(at);
        if self.n_nodes > MAX_NODES {
            let message = format!("more than {MAX_NODES} values");
            return Err(self.shape(span, &message, "a recipe has a few hundred values at most"));
        }
        if event.tag().is_some() {
            let help = "write the value without the tag that begins with !";
            return Err(self.shape(span, "tags mean nothing in a recipe", help));
        }
        let anchor = event.anchor_id();
        let value = match event {
            Event::Scalar(text, style, ..) => scalar(&text, style),
            Event::SequenceStart(..) => self.list()?,
            Event::MappingStart(..) => self.map()?,
            Event::Alias(id) => return self.copy(id, span),
            other => {
                let message = format!("a value was expected here, not {other:?}");
                return Err(self.shape(span, &message, "give the key a value"));
            }
        };
        let node = Node {
            value,
            span: Some(span),
        };
        if let Some(id) = anchor {
            self.anchors.push((id, node.clone()));
        }
        Ok(node)
    }

    fn list(&mut self) -> Result<Value, Box<Fault>> {
        let mut items = Vec::new();
        while let Some((event, span)) = self.next()? {
            if matches!(event, Event::SequenceEnd) {
                break;
            }
            items.push(self.node(event, &span)?);
        }
        Ok(Value::List(items))
    }

    fn map(&mut self) -> Result<Value, Box<Fault>> {
        let mut entries = Vec::new();
        while let Some((event, at)) = self.next()? {
            if matches!(event, Event::MappingEnd) {
                break;
            }
            let key = self.node(event, &at)?;
            let key_span = key.span;
            let Value::Scalar { text: key, .. } = key.value else {
                let span = self.span(&at);
                return Err(self.shape(span, "a key must be one word", "write `key: value`"));
            };
            let Some((event, at)) = self.next()? else {
                break;
            };
            let mut node = self.node(event, &at)?;
            // An absent value has no text of its own: its key is the place to point at.
            if node.value == Value::Null && node.span.is_some_and(|s| s.width <= 1) {
                node.span = key_span;
            }
            entries.push(Entry {
                key,
                key_span,
                node,
            });
        }
        Ok(Value::Map(entries))
    }

    /// A copy of the anchored node `id`, counted node by node.
    fn copy(&mut self, id: usize, span: Span) -> Result<Node, Box<Fault>> {
        let found = self.anchors.iter().find(|(anchor, _)| *anchor == id);
        let Some(node) = found.map(|(_, node)| node.clone()) else {
            let help = "an alias repeats an earlier, finished value";
            return Err(self.shape(span, "this alias stands inside its own value", help));
        };
        self.n_nodes += count(&node);
        if self.n_nodes > MAX_NODES {
            let message = format!("more than {MAX_NODES} values, copies made by aliases included");
            return Err(self.shape(span, &message, "a recipe has a few hundred values at most"));
        }
        Ok(node)
    }

    fn shape(&self, span: Span, message: &str, help: &str) -> Box<Fault> {
        Box::new(Fault {
            code: Code::Shape,
            path: String::new(),
            message: message.into(),
            label: "here".into(),
            help: Some(help.into()),
            span: Some(span),
        })
    }

    fn point(&self, mark: Marker) -> Span {
        Span {
            origin: self.origin,
            line: mark.line().max(1),
            column: mark.col() + 1 + self.offset,
            width: 1,
        }
    }

    fn span(&self, at: &serde_saphyr::granit_parser::Span) -> Span {
        let mut span = self.point(at.start);
        if at.end.line() == at.start.line() {
            span.width = at.end.col().saturating_sub(at.start.col()).max(1);
        } else {
            let line = self.text.lines().nth(span.line - 1).unwrap_or("");
            let rest = line
                .trim_end()
                .chars()
                .count()
                .saturating_sub(at.start.col());
            span.width = rest.max(1);
        }
        span
    }
}

fn count(node: &Node) -> usize {
    1 + match &node.value {
        Value::Null | Value::Scalar { .. } => 0,
        Value::List(items) => items.iter().map(count).sum(),
        Value::Map(entries) => entries.iter().map(|e| 1 + count(&e.node)).sum(),
    }
}

fn scalar(text: &str, style: ScalarStyle) -> Value {
    let plain = style == ScalarStyle::Plain;
    if plain && matches!(text, "" | "~" | "null" | "Null" | "NULL") {
        return Value::Null;
    }
    Value::Scalar {
        text: text.to_owned(),
        plain,
    }
}

/// What people most often do to break YAML.
fn syntax_help(text: &str, line: usize) -> Option<String> {
    let near: Vec<&str> = text.lines().skip(line.saturating_sub(2)).take(2).collect();
    if near.iter().any(|l| l.trim_end().chars().any(|c| c == '\t')) {
        return Some("indent with spaces: YAML allows no tabs there".into());
    }
    let open = |a, b| text.matches(a).count() > text.matches(b).count();
    if open('{', '}') || open('[', ']') {
        return Some("a bracket { or [ is not closed".into());
    }
    Some(
        "look at the indentation, the brackets and the quotes of this line and the one above"
            .into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Node {
        parse(text, Origin::File, 0).expect("test YAML")
    }

    #[test]
    fn values_know_their_line_column_and_width() {
        let root = read("a: 1\nlist:\n  - {name: seg5, segments: 15}\n");
        let item = &root.get("list").expect("list").value;
        let Value::List(items) = item else {
            panic!("{item:?}")
        };
        let span = items[0].get("segments").and_then(|n| n.span).expect("span");
        assert_eq!((span.line, span.column, span.width), (3, 28, 2));
    }

    #[test]
    fn doubled_keys_survive() {
        assert_eq!(read("a: 1\na: 2\n").entries().map(<[Entry]>::len), Some(2));
    }

    #[test]
    fn quoted_words_are_text_and_bare_ones_are_open() {
        let root = read("a: '8'\nb: 8\nc:\nd: ''\n");
        let plain = |key: &str| match root.get(key).map(|n| &n.value) {
            Some(Value::Scalar { plain, .. }) => Some(*plain),
            _ => None,
        };
        assert_eq!(plain("a"), Some(false));
        assert_eq!(plain("b"), Some(true));
        assert_eq!(root.get("c").map(|n| &n.value), Some(&Value::Null));
        assert_eq!(plain("d"), Some(false));
    }

    #[test]
    fn a_bomb_of_aliases_is_cut_off() {
        let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..12 {
            let items = vec![format!("*a{}", i - 1); 10].join(",");
            text += &format!("a{i}: &a{i} [{items}]\n");
        }
        let fault = parse(&text, Origin::File, 0).expect_err("a bomb");
        assert_eq!(fault.code, Code::Shape);
    }

    #[test]
    fn deep_nesting_is_refused_not_overflowed() {
        for open in ["[", "{a: ", "- "] {
            let fault = parse(&open.repeat(100_000), Origin::File, 0);
            assert!(fault.is_err(), "{open}");
        }
    }

    #[test]
    fn an_alias_inside_its_own_value_is_refused() {
        assert!(parse("a: &a [1, *a]", Origin::File, 0).is_err());
    }
}
