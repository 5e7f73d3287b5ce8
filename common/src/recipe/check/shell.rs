//! Lines of shell in a recipe: nothing in them is ours to read, not even what looks like a reference.

use super::super::fault::Code;
use super::super::raw::{Node, Value};
use super::resolve::{At, Checked, Resolved, Resolver};
use super::words::{describe, join};

impl Resolver<'_> {
    /// A list of lines, or one text of several; none when a fault was reported.
    pub(super) fn shell(&mut self, at: &At<'_>) -> Option<Resolved> {
        let lines: Vec<&Node> = match &at.node.value {
            Value::Scalar { .. } => vec![at.node],
            Value::List(items) => items.iter().collect(),
            Value::Null | Value::Map(_) => Vec::new(),
        };
        if lines.is_empty() {
            self.wrong_type(at, "lines of shell, as a list or one text");
            return None;
        }
        let mut checked = Vec::new();
        for (i, node) in lines.iter().enumerate() {
            let Value::Scalar { text, .. } = &node.value else {
                let path = join(at.path, &i.to_string());
                let line = At {
                    path: &path,
                    node,
                    span: node.span.or(at.span),
                };
                self.wrong_type(&line, "a line of shell");
                return None;
            };
            if text.contains('\0') {
                let message = format!("{} holds a NUL: {}", at.path, describe(node));
                let label = "no shell reads this";
                self.fault(Code::OutOfRange, at.path, at.span, &message, label, None);
                return None;
            }
            let line = |line: &str| Resolved::new(Checked::Text(line.to_owned()), node.span);
            checked.extend(text.trim_end().split('\n').map(line));
        }
        Some(Resolved::new(Checked::List(checked), at.span))
    }
}
