//! From a raw tree to a resolved one: every key of the table has a checked value, its own, an inherited one or
//! the default. Faults are collected; a faulty value is replaced by one of the right type and marked, so that
//! the rest can be checked all the same. This module must never know what a key means to another key.

use std::collections::BTreeMap;
use std::path::Path;

use super::super::fault::{Code, Fault};
use super::super::raw::{self, Entry, Node, Origin, Span, Value};
use super::super::table::{Fallback, Field, Kind, Section};
use super::words::{describe, is_text, join, same_scalar, unknown_key_help, unplaced};
use super::{map, scalar};

/// A checked value.
#[derive(Debug, Clone)]
pub(super) struct Resolved {
    pub(super) value: Checked,
    /// Where it, or what it was inherited from, stands; none for defaults.
    pub(super) span: Option<Span>,
    /// A fault was reported: the value is a placeholder.
    pub(super) faulty: bool,
}

#[derive(Debug, Clone)]
pub(super) enum Checked {
    /// Not given and left open, or one of the words none and auto.
    Absent,
    Bool(bool),
    Whole(u64),
    Real(f64),
    Text(String),
    List(Vec<Resolved>),
    /// Keys of the user's own choice.
    Map(BTreeMap<String, String>),
    Section(BTreeMap<&'static str, Resolved>),
}

impl Resolved {
    pub(super) fn new(value: Checked, span: Option<Span>) -> Self {
        Self {
            value,
            span,
            faulty: false,
        }
    }

    /// The value under `key`, if this is a section.
    pub(super) fn child(&self, key: &str) -> Option<&Self> {
        match &self.value {
            Checked::Section(fields) => fields.get(key),
            Checked::List(items) => items.get(key.parse::<usize>().ok()?),
            Checked::Absent
            | Checked::Bool(_)
            | Checked::Whole(_)
            | Checked::Real(_)
            | Checked::Text(_)
            | Checked::Map(_) => None,
        }
    }
}

/// Walks the table beside the tree.
pub(super) struct Resolver<'a> {
    /// Folder of the recipe file, absolute.
    pub(super) base: &'a Path,
    pub(super) around: &'a dyn super::Surroundings,
    pub(super) faults: Vec<Fault>,
}

/// A value on its way: where it stands in the recipe and in the text.
pub(super) struct At<'a> {
    pub(super) path: &'a str,
    pub(super) node: &'a Node,
    pub(super) span: Option<Span>,
}

impl Resolver<'_> {
    /// Resolves `node` (none: not given) against `section`; keys it lacks come from `parent`, then from the
    /// table.
    pub(super) fn section(
        &mut self,
        section: &'static Section,
        path: &str,
        node: Option<&Node>,
        parent: Option<&Resolved>,
    ) -> Resolved {
        let span = node.and_then(|n| n.span);
        let node = node.filter(|n| n.value != Value::Null);
        let (entries, faulty) = match node.map(|n| (n, n.entries())) {
            None => (&[][..], false),
            Some((_, Some(entries))) => (entries, false),
            Some((node, None)) => {
                self.wrong_type(
                    &At { path, node, span },
                    &format!("keys of {}", section.name),
                );
                (&[][..], true)
            }
        };
        let before = self.faults.len();
        self.unknown_and_doubled(section, path, entries);
        let mut fields = BTreeMap::new();
        for field in section.fields {
            let given = entries.iter().find(|e| e.key == field.key);
            let value = self.field(section, field, path, (given, span), parent, &fields);
            fields.insert(field.key, value);
        }
        let mut resolved = Resolved::new(Checked::Section(fields), span);
        resolved.faulty = faulty;
        if faulty {
            // One fault is enough for something that is no section at all.
            self.faults.truncate(before);
        }
        resolved
    }

    fn field(
        &mut self,
        section: &'static Section,
        field: &'static Field,
        path: &str,
        (given, around): (Option<&Entry>, Option<Span>),
        parent: Option<&Resolved>,
        earlier: &BTreeMap<&'static str, Resolved>,
    ) -> Resolved {
        let path = join(path, field.key);
        if let Some((key, word)) = field.only {
            let neighbour = earlier.get(key);
            let applies = neighbour.is_some_and(|n| n.faulty || is_text(n, word));
            if !applies {
                self.not_applicable(section, field, &path, given, neighbour);
                return Resolved::new(Checked::Absent, None);
            }
        }
        let parent = parent.and_then(|p| p.child(field.key));
        match (given, parent) {
            (Some(entry), _) => {
                let span = entry.node.span.or(entry.key_span);
                let at = At {
                    path: &path,
                    node: &entry.node,
                    span,
                };
                let key_span = entry.key_span.or(span);
                self.value(&field.kind, &at, key_span, parent)
                    .unwrap_or_else(|| self.placeholder(field, &path, span))
            }
            (None, Some(parent)) => parent.clone(),
            (None, None) if matches!(field.default, Fallback::Required) => {
                self.missing(section, field, &path, around);
                self.placeholder(field, &path, around)
            }
            (None, None) => self.default(field, &path),
        }
    }

    /// What the table says when nobody else does.
    fn default(&mut self, field: &'static Field, path: &str) -> Resolved {
        match (&field.kind, &field.default) {
            (Kind::Section(section), _) => self.section(section, path, None, None),
            (kind, Fallback::Yaml(text)) => {
                let node = raw::parse(text, Origin::File, 0).expect("defaults are YAML");
                let node = Node::unplaced(node.value);
                let at = At {
                    path,
                    node: &node,
                    span: None,
                };
                let value = self.value(kind, &at, None, None).map(unplaced);
                value.expect("a test checks every default")
            }
            (_, Fallback::Open | Fallback::Required) => Resolved::new(Checked::Absent, None),
        }
    }

    /// A usable value in place of a faulty one.
    fn placeholder(&mut self, field: &'static Field, path: &str, span: Option<Span>) -> Resolved {
        let before = self.faults.len();
        let value = match field.default {
            Fallback::Yaml(_) => self.default(field, path).value,
            Fallback::Required | Fallback::Open => self.filler(&field.kind, path),
        };
        self.faults.truncate(before);
        Resolved {
            value,
            span,
            faulty: true,
        }
    }

    fn filler(&mut self, kind: &'static Kind, path: &str) -> Checked {
        match kind {
            Kind::Whole(min, _) => Checked::Whole(*min),
            Kind::Section(section) => self.section(section, path, None, None).value,
            Kind::List(_) | Kind::Words => Checked::List(Vec::new()),
            Kind::Text | Kind::Name | Kind::Path | Kind::Uri | Kind::DnsName => {
                Checked::Text("-".into())
            }
            Kind::Word(words) => Checked::Text(words[0].name.into()),
            Kind::Real { max, .. } => Checked::Real(*max),
            Kind::Bool
            | Kind::Or(..)
            | Kind::Switch(_)
            | Kind::Pair(_)
            | Kind::ShareOrPath
            | Kind::Targets
            | Kind::Shell
            | Kind::Secret
            | Kind::Map(_)
            | Kind::NotBuilt => Checked::Absent,
        }
    }

    /// Checks one given value; none when a fault was reported.
    fn value(
        &mut self,
        kind: &'static Kind,
        at: &At<'_>,
        key_span: Option<Span>,
        parent: Option<&Resolved>,
    ) -> Option<Resolved> {
        match kind {
            Kind::Section(section) => Some(self.section(section, at.path, Some(at.node), parent)),
            Kind::Switch(section) => self.switch(section, at, parent),
            Kind::Or(word, inner) => {
                let absent = match &at.node.value {
                    Value::Scalar { text, .. } => text == word,
                    Value::Null => *word == "none",
                    Value::List(_) | Value::Map(_) => false,
                };
                if absent {
                    return Some(Resolved::new(Checked::Absent, at.span));
                }
                self.value(inner, at, key_span, None)
            }
            Kind::List(of) => self.list(of, at, None, true),
            Kind::Words => self.list(&Kind::Text, at, None, false),
            Kind::Pair(of) => self.list(of, at, Some(2), false),
            Kind::Targets => self.targets(at),
            Kind::Map(of) => map::check(self, *of, at),
            Kind::Shell => self.shell(at),
            Kind::NotBuilt => {
                let key = at.path.rsplit('.').next().unwrap_or(at.path);
                let message = format!("{key} is not built yet");
                self.fault(
                    Code::NotBuilt,
                    at.path,
                    key_span,
                    &message,
                    "not built yet",
                    Some("remove it".into()),
                );
                None
            }
            Kind::Secret if at.node.value == Value::Null => {
                Some(Resolved::new(Checked::Absent, at.span))
            }
            Kind::Bool
            | Kind::Whole(..)
            | Kind::Real { .. }
            | Kind::Word(_)
            | Kind::Text
            | Kind::Name
            | Kind::Path
            | Kind::Uri
            | Kind::Secret
            | Kind::DnsName
            | Kind::ShareOrPath => scalar::check(self, kind, at),
        }
    }

    fn switch(
        &mut self,
        section: &'static Section,
        at: &At<'_>,
        parent: Option<&Resolved>,
    ) -> Option<Resolved> {
        let parent = parent.filter(|p| matches!(p.value, Checked::Section(_)));
        match &at.node.value {
            Value::Scalar { text, plain: true } if text == "false" => {
                Some(Resolved::new(Checked::Bool(false), at.span))
            }
            Value::Scalar { text, plain: true } if text == "true" => {
                Some(self.section(section, at.path, None, parent))
            }
            Value::Null | Value::Scalar { .. } | Value::List(_) => {
                self.wrong_type(at, &format!("false, true or keys of {}", section.name));
                None
            }
            Value::Map(_) => Some(self.section(section, at.path, Some(at.node), parent)),
        }
    }

    /// A list of `len` values, or of any number; none twice when `distinct`.
    fn list(
        &mut self,
        of: &'static Kind,
        at: &At<'_>,
        len: Option<usize>,
        distinct: bool,
    ) -> Option<Resolved> {
        let Value::List(items) = &at.node.value else {
            self.wrong_type(at, "a list");
            return None;
        };
        if len.is_some_and(|n| n != items.len()) || items.is_empty() {
            let wanted = len.map_or("at least one value".into(), |n| format!("{n} values"));
            let message = format!("{} has {} values", at.path, items.len());
            self.fault(
                Code::OutOfRange,
                at.path,
                at.span,
                &message,
                &format!("needs {wanted}"),
                None,
            );
            return None;
        }
        let mut checked: Vec<Resolved> = Vec::new();
        let mut faulty = false;
        for (i, node) in items.iter().enumerate() {
            let path = join(at.path, &i.to_string());
            let item = At {
                path: &path,
                node,
                span: node.span.or(at.span),
            };
            let Some(value) = self.value(of, &item, item.span, None) else {
                faulty = true;
                continue;
            };
            if distinct && items[..i].iter().any(|n| same_scalar(n, node)) {
                let message = format!("{} stands twice in {}", describe(node), at.path);
                self.fault(
                    Code::Duplicate,
                    &path,
                    item.span,
                    &message,
                    "already in the list",
                    Some("remove it".into()),
                );
                faulty = true;
            }
            checked.push(value);
        }
        if faulty && len.is_some() {
            return None;
        }
        let mut list = Resolved::new(Checked::List(checked), at.span);
        list.faulty = faulty;
        Some(list)
    }

    fn targets(&mut self, at: &At<'_>) -> Option<Resolved> {
        match &at.node.value {
            Value::Scalar { text, .. } if text == "lcm" => {
                Some(Resolved::new(Checked::Text(text.clone()), at.span))
            }
            Value::List(_) => self.list(&Kind::Text, at, None, true),
            Value::Null | Value::Scalar { .. } | Value::Map(_) => {
                let found = describe(&at.node.clone());
                let message = format!("{} is neither a preset nor a list: {found}", at.path);
                let help = "write lcm, or a list like [to_q, to_k, to_v, to_out.0]";
                self.fault(
                    Code::UnknownWord,
                    at.path,
                    at.span,
                    &message,
                    "expected lcm or a list",
                    Some(help.into()),
                );
                None
            }
        }
    }

    fn unknown_and_doubled(&mut self, section: &'static Section, path: &str, entries: &[Entry]) {
        for (i, entry) in entries.iter().enumerate() {
            let here = join(path, &entry.key);
            if !section.fields.iter().any(|f| f.key == entry.key) {
                let message = format!("{} has no key {:?}", section.name, entry.key);
                let help = unknown_key_help(section, &entry.key);
                self.fault(
                    Code::UnknownKey,
                    &here,
                    entry.key_span,
                    &message,
                    "unknown key",
                    Some(help),
                );
            } else if let Some(first) = entries[..i].iter().find(|e| e.key == entry.key) {
                let message = format!("{} stands twice", here);
                let label = match first.key_span {
                    Some(span) => format!("first on line {}", span.line),
                    None => "stands before".into(),
                };
                self.fault(
                    Code::Duplicate,
                    &here,
                    entry.key_span,
                    &message,
                    &label,
                    Some("remove one of them".into()),
                );
            }
        }
    }

    fn not_applicable(
        &mut self,
        section: &'static Section,
        field: &Field,
        path: &str,
        given: Option<&Entry>,
        neighbour: Option<&Resolved>,
    ) {
        // An empty key is one that was taken back.
        let given = given.filter(|entry| entry.node.value != Value::Null);
        let (Some(entry), Some((key, word))) = (given, field.only) else {
            return;
        };
        let is = match neighbour.map(|n| &n.value) {
            Some(Checked::Text(text)) => text.as_str(),
            _ => "another",
        };
        let message = format!("{} means nothing when {key} is {is}", field.key);
        let label = format!("belongs to {key} {word}");
        let help = format!("remove it, or set {key}: {word} in {}", section.name);
        self.fault(
            Code::NotApplicable,
            path,
            entry.key_span,
            &message,
            &label,
            Some(help),
        );
    }

    fn missing(&mut self, section: &Section, field: &Field, path: &str, around: Option<Span>) {
        let message = format!("{} lacks {}", section.name, field.key);
        let help = format!("{}: {}", field.key, field.about);
        let label = format!("{} is missing", field.key);
        // Of the whole recipe no line is the right one.
        let span = around
            .filter(|_| path.contains('.'))
            .map(|s| Span { width: 1, ..s });
        self.fault(Code::Missing, path, span, &message, &label, Some(help));
    }

    pub(super) fn wrong_type(&mut self, at: &At<'_>, expected: &str) {
        let found = describe(at.node);
        let what = if at.path.is_empty() {
            "the recipe"
        } else {
            at.path
        };
        let message = format!("{what} is {found}");
        self.fault(
            Code::WrongType,
            at.path,
            at.span,
            &message,
            &format!("expected {expected}"),
            None,
        );
    }

    pub(super) fn fault(
        &mut self,
        code: Code,
        path: &str,
        span: Option<Span>,
        message: &str,
        label: &str,
        help: Option<String>,
    ) {
        self.faults.push(Fault {
            code,
            path: path.into(),
            message: message.into(),
            label: label.into(),
            help,
            span,
        });
    }
}
