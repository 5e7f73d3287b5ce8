//! What a caption states (SPEC.md §1).

use super::Rules;

/// "two red discs": how many, of which colour, of which shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Clause {
    pub(super) count: u64,
    pub(super) colour: Option<String>,
    pub(super) shape: String,
}

/// Where the first clause's object lies, seen from the second's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Relation {
    Left,
    Above,
}

/// Everything a caption states.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Statement {
    pub(super) clauses: Vec<Clause>,
    pub(super) relation: Option<Relation>,
    pub(super) background: Option<String>,
    pub(super) pattern: Option<String>,
}

pub(super) fn read(rules: &Rules, caption: &str) -> Statement {
    let words = &rules.words;
    let mut statement = Statement::default();
    let mut count = 1;
    let mut colour = None;
    for word in caption.to_lowercase().split_whitespace() {
        if let Some(&value) = words.count.get(word) {
            count = value;
        } else if let Some(value) = words.colour.get(word) {
            colour = Some(value.clone());
        } else if let Some(value) = words.shape.get(word) {
            let colour = colour.take();
            statement.clauses.push(Clause {
                count,
                colour,
                shape: value.clone(),
            });
            count = 1;
        } else if let Some(value) = words.relation.get(word) {
            let relation = if value == "left" {
                Relation::Left
            } else {
                Relation::Above
            };
            statement.relation = Some(relation);
        } else if let Some(value) = words.background.get(word) {
            statement.background = Some(value.clone());
        } else if let Some(value) = words.pattern.get(word) {
            statement.pattern = Some(value.clone());
        }
    }
    statement
}
