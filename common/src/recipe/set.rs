//! `--set a.b=c`: changes to the tree before it is checked, so that a fault in one points at the argument.
//!
//! This module must never know which keys a recipe has: an unknown key is the checker's to report.

use super::fault::{Code, Fault};
use super::raw::{self, Entry, Node, Origin, Span, Value};

/// Applies `arguments` in order to `root`; later ones win.
pub(super) fn apply(root: &mut Node, arguments: &[String]) -> Vec<Fault> {
    let change = |(i, argument): (usize, &String)| one(root, i, argument).err();
    let faults = arguments.iter().enumerate().filter_map(change);
    faults.map(|fault| *fault).collect()
}

/// One step of a path and where it stands in the argument.
struct Step<'a> {
    key: &'a str,
    /// The path up to and including this step.
    path: &'a str,
    span: Span,
}

fn one(root: &mut Node, index: usize, argument: &str) -> Result<(), Box<Fault>> {
    let origin = Origin::Argument(index);
    let whole = Span {
        origin,
        line: 1,
        column: 1,
        width: argument.chars().count().max(1),
    };
    let Some((path, text)) = argument.split_once('=') else {
        let message = format!("{argument:?} sets nothing");
        return Err(refuse(
            "",
            whole,
            message,
            "expected KEY=VALUE",
            "write stages.0.steps=100",
        ));
    };
    let offset = path.chars().count() + 1;
    let mut value = raw::parse(text, origin, offset)?;
    value.span.get_or_insert(Span {
        column: offset + 1,
        width: text.chars().count().max(1),
        ..whole
    });
    let mut at = root;
    let mut column = 1;
    let mut end = 0;
    for key in path.split('.') {
        let width = key.chars().count();
        end += key.len();
        let span = Span {
            column,
            width: width.max(1),
            ..whole
        };
        if key.is_empty() {
            let message = format!("{path:?} is not a path of keys");
            return Err(refuse(
                path,
                span,
                message,
                "a key is missing here",
                "write stages.0.steps=100",
            ));
        }
        let step = Step {
            key,
            path: &path[..end],
            span,
        };
        at = descend(at, &step)?;
        column += width + 1;
        end += 1;
    }
    *at = value;
    Ok(())
}

/// The node under one step, made when there is none yet.
fn descend<'n>(at: &'n mut Node, step: &Step<'_>) -> Result<&'n mut Node, Box<Fault>> {
    let off = matches!(&at.value, Value::Scalar { text, plain: true } if text == "false");
    if off || at.value == Value::Null {
        at.value = Value::Map(Vec::new());
    }
    match &mut at.value {
        Value::Map(entries) => Ok(under_key(entries, step)),
        Value::List(items) => {
            let i = position(items, step)?;
            Ok(&mut items[i])
        }
        Value::Null | Value::Scalar { .. } => {
            let parent = step.path.rsplit_once('.').map_or("", |(parent, _)| parent);
            let message = format!("{parent} is a single value");
            let help = format!("set {parent} itself");
            Err(refuse(
                step.path,
                step.span,
                message,
                "has no keys below it",
                &help,
            ))
        }
    }
}

fn under_key<'n>(entries: &'n mut Vec<Entry>, step: &Step<'_>) -> &'n mut Node {
    let found = entries.iter().position(|e| e.key == step.key);
    let i = found.unwrap_or_else(|| {
        entries.push(Entry {
            key: step.key.to_owned(),
            key_span: Some(step.span),
            node: Node {
                value: Value::Null,
                span: Some(step.span),
            },
        });
        entries.len() - 1
    });
    &mut entries[i].node
}

/// The item that a step names by position or by its `name`.
fn position(items: &[Node], step: &Step<'_>) -> Result<usize, Box<Fault>> {
    let name = |item: &Node| match item.get("name").map(|n| &n.value) {
        Some(Value::Scalar { text, .. }) => Some(text.clone()),
        _ => None,
    };
    let by_name = items
        .iter()
        .position(|i| name(i).as_deref() == Some(step.key));
    let by_number = step.key.parse().ok().filter(|i: &usize| *i < items.len());
    by_name.or(by_number).ok_or_else(|| {
        let names: Vec<String> = items.iter().filter_map(name).take(20).collect();
        let message = format!("there is no {}", step.path);
        let help = match (names.is_empty(), items.len()) {
            (_, 0) => "the list is empty".to_owned(),
            (true, n) => format!("write a number from 0 to {}", n - 1),
            (false, n) => format!(
                "write a number from 0 to {}, or one of {}",
                n - 1,
                names.join(", ")
            ),
        };
        refuse(step.path, step.span, message, "no such item", &help)
    })
}

fn refuse(path: &str, span: Span, message: String, label: &str, help: &str) -> Box<Fault> {
    Box::new(Fault {
        code: Code::Set,
        path: path.into(),
        message,
        label: label.into(),
        help: Some(help.into()),
        span: Some(span),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(yaml: &str, sets: &[&str]) -> Result<Node, Vec<Fault>> {
        let mut root = raw::parse(yaml, Origin::File, 0).expect("test YAML");
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        let faults = apply(&mut root, &sets);
        if faults.is_empty() {
            Ok(root)
        } else {
            Err(faults)
        }
    }

    fn text(node: &Node, path: &[&str]) -> String {
        let found = path.iter().try_fold(node, |at, key| match &at.value {
            Value::List(items) => items.get(key.parse::<usize>().expect("index")),
            _ => at.get(key),
        });
        match found.map(|n| &n.value) {
            Some(Value::Scalar { text, .. }) => text.clone(),
            other => panic!("{path:?} is {other:?}"),
        }
    }

    const STAGES: &str =
        "seed: 1\nevaluate: false\nstages:\n  - {name: a, steps: 1}\n  - {name: b, steps: 2}\n";

    #[test]
    fn items_are_found_by_number_and_by_name() {
        let root = after(STAGES, &["stages.1.steps=10", "stages.a.steps=20"]).expect("sets");
        assert_eq!(text(&root, &["stages", "1", "steps"]), "10");
        assert_eq!(text(&root, &["stages", "0", "steps"]), "20");
    }

    #[test]
    fn sections_are_made_and_the_last_set_wins() {
        let sets = ["loss={kind: huber, c: 1}", "loss.c=2", "evaluate.samples=4"];
        let root = after(STAGES, &sets).expect("sets");
        assert_eq!(text(&root, &["loss", "c"]), "2");
        assert_eq!(text(&root, &["evaluate", "samples"]), "4");
    }

    #[test]
    fn values_may_hold_equal_signs_and_point_into_the_argument() {
        let root = after(STAGES, &["output='a=b'"]).expect("sets");
        assert_eq!(text(&root, &["output"]), "a=b");
        let span = root.get("output").and_then(|n| n.span).expect("span");
        assert_eq!((span.origin, span.column), (Origin::Argument(0), 8));
    }

    #[test]
    fn what_points_nowhere_is_refused_at_its_step() {
        for (set, column) in [
            ("steps", 1),
            ("stages.c.steps=1", 8),
            ("seed.x=1", 6),
            ("a..b=1", 3),
        ] {
            let faults = after(STAGES, &[set]).expect_err(set);
            let span = faults[0].span.expect("span");
            assert_eq!((faults[0].code, span.column), (Code::Set, column), "{set}");
        }
    }
}
