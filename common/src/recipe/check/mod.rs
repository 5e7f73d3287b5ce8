//! From a raw tree to a checked recipe, with every complaint at once.
//!
//! `resolve` gives every key of the table a value (with `scalar` for single ones), `sections` makes the
//! recipe's types of them, `cross` relates keys to each other, `files` looks at the disk. This module must
//! never know how a fault is shown.

mod cross;
mod files;
mod map;
mod numbers;
mod resolve;
mod scalar;
mod sections;
mod shell;
#[cfg(test)]
mod tests;
mod words;

use std::path::Path;

use super::Recipe;
use super::fault::{Code, Fault};
use super::raw::{Node, Span, Value};
use super::table::{INHERITED, Kind, RECIPE};
use resolve::{At, Checked, Resolved, Resolver};

pub(crate) use sections::LCM_TARGETS;

/// What a recipe may ask of its host.
pub(super) trait Surroundings {
    /// An environment variable.
    fn variable(&self, name: &str) -> Option<String>;
    /// The text of a small file.
    fn read(&self, path: &Path) -> std::io::Result<String>;
    /// Whether `path` is a file.
    fn is_file(&self, path: &Path) -> bool;
    /// Whether `path` is a folder.
    fn is_dir(&self, path: &Path) -> bool;
}

/// Checks `root`; relative paths start at `base`. With `look`, what it names must exist.
pub(super) fn check(
    root: &Node,
    base: &Path,
    around: &dyn Surroundings,
    look: bool,
) -> Result<Recipe, Vec<Fault>> {
    let mut resolver = Resolver {
        base,
        around,
        faults: Vec::new(),
    };
    if root.value == Value::Null {
        resolver.fault(
            Code::Shape,
            "",
            None,
            "the recipe is empty",
            "",
            Some("start with `version: 1`; see configs/quickstart.yaml".into()),
        );
        return Err(resolver.faults);
    }
    if root.entries().is_none() {
        let at = At {
            path: "",
            node: root,
            span: root.span,
        };
        resolver.wrong_type(&at, "keys of the recipe, like `version: 1`");
        return Err(resolver.faults);
    }
    let (root, stages) = without_stages(root);
    let mut top = resolver.section(&RECIPE, "", Some(&root), None);
    stages_of(&mut resolver, &mut top, stages.as_ref(), root.span);
    decide_switches(&mut resolver, &mut top);
    let scorer = files::has_scorer(Path::new(text_at(&top, "teacher", "model")), around);
    let recipe = sections::recipe(&top, scorer);
    let mut faults = resolver.faults;
    faults.extend(cross::check(&recipe, &top));
    if look {
        let known: Vec<String> = faults.iter().map(|f| f.path.clone()).collect();
        let looked = files::check(&recipe, &top, around);
        faults.extend(looked.into_iter().filter(|f| !concerns(&known, &f.path)));
    }
    if faults.is_empty() {
        Ok(recipe)
    } else {
        Err(faults)
    }
}

/// Whether one of `known` is `path`, or lies above or below it.
fn concerns(known: &[String], path: &str) -> bool {
    let below = |a: &str, b: &str| {
        a.strip_prefix(b)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    known.iter().any(|k| below(k, path) || below(path, k))
}

/// Where the value at `path` stands; a default stands where the nearest section around it does.
fn place(top: &Resolved, path: &str) -> Option<Span> {
    let mut at = top;
    let mut span = None;
    for key in path.split('.') {
        let Some(child) = at.child(key) else { break };
        at = child;
        span = at.span.or(span);
    }
    span
}

fn text_at<'a>(top: &'a Resolved, section: &str, key: &str) -> &'a str {
    match top
        .child(section)
        .and_then(|s| s.child(key))
        .map(|r| &r.value)
    {
        Some(Checked::Text(text)) => text,
        _ => "",
    }
}

/// Stages inherit from the sections above them, wherever those stand in the file: they are set aside first.
fn without_stages(root: &Node) -> (Node, Option<Node>) {
    let mut top = root.clone();
    let mut stages = None;
    if let Value::Map(entries) = &mut top.value {
        for entry in entries.iter_mut().filter(|e| e.key == "stages") {
            let empty = Node {
                value: Value::List(vec![Node::unplaced(Value::Null)]),
                span: entry.node.span,
            };
            let whole = std::mem::replace(&mut entry.node, empty);
            stages.get_or_insert(whole);
        }
    }
    (top, stages)
}

/// Resolves the stages with the top's sections as their parents.
fn stages_of(
    resolver: &mut Resolver<'_>,
    top: &mut Resolved,
    stages: Option<&Node>,
    around: Option<Span>,
) {
    let field = RECIPE.fields.iter().find(|f| f.key == "stages");
    let Some(Kind::List(Kind::Section(section))) = field.map(|f| &f.kind) else {
        unreachable!("stages is a list of sections");
    };
    resolver.faults.retain(|f| !f.path.starts_with("stages."));
    let Some(node) = stages else {
        return;
    };
    let inherited = INHERITED.map(|key| (key, top.child(key).expect("the table has it").clone()));
    let parent = Resolved::new(Checked::Section(inherited.into_iter().collect()), None);
    let mut list = Resolved::new(Checked::List(Vec::new()), node.span.or(around));
    match &node.value {
        Value::List(items) if !items.is_empty() => {
            let stage = |(i, item): (usize, &Node)| {
                resolver.section(section, &format!("stages.{i}"), Some(item), Some(&parent))
            };
            list.value = Checked::List(items.iter().enumerate().map(stage).collect());
        }
        Value::Null | Value::List(_) | Value::Scalar { .. } | Value::Map(_) => {
            let at = At {
                path: "stages",
                node,
                span: node.span,
            };
            resolver.wrong_type(&at, "a list of at least one stage");
            list.faulty = true;
        }
    }
    if let Checked::Section(fields) = &mut top.value {
        fields.insert("stages", list);
    }
}

/// `export` is on unless said otherwise, `evaluate` where the teacher brings a scorer.
fn decide_switches(resolver: &mut Resolver<'_>, top: &mut Resolved) {
    let scorer = files::has_scorer(Path::new(text_at(top, "teacher", "model")), resolver.around);
    for (key, on) in [("export", true), ("evaluate", scorer)] {
        let field = RECIPE.fields.iter().find(|f| f.key == key);
        let Some(Kind::Switch(section)) = field.map(|f| &f.kind) else {
            unreachable!("{key} is a switch");
        };
        let open = top
            .child(key)
            .is_some_and(|r| matches!(r.value, Checked::Absent) && !r.faulty);
        if open && on {
            let defaults = resolver.section(section, key, None, None);
            if let Checked::Section(fields) = &mut top.value {
                fields.insert(key, defaults);
            }
        }
    }
}
