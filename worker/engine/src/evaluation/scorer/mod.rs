//! Prompt adherence without a learned judge: the scorer that travels with a teacher folder.
//!
//! `scorer/scorer.json` holds the rules, `scorer/SPEC.md` beside it the arithmetic that this module follows to
//! the letter, and `scorer/golden.json` cases that both must agree on. Sums are exact integers; only ratios are
//! f64, so every implementation gives the same verdicts.

mod caption;
mod ground;
mod objects;

use caption::{Relation, Statement};
pub use distillery_common::teacher::scorer::{Error, Rules};
use objects::Object;

use super::picture::Picture;

/// How many attributes that a caption states came true in a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    /// True ones.
    pub right: u32,
    /// Stated ones; 0 when the caption states nothing.
    pub total: u32,
}

/// Scores `picture` by what `caption` states. The picture must have the size that the rules name.
pub fn score(rules: &Rules, caption: &str, picture: &Picture) -> Result<Score, Error> {
    rules.check_size(picture.width, picture.height)?;
    let verdicts = verdicts(rules, &caption::read(rules, caption), picture);
    let right = verdicts.iter().filter(|&&verdict| verdict).count();
    Ok(Score {
        right: right as u32,
        total: verdicts.len() as u32,
    })
}

/// The truth of every stated attribute, in the order of the specification (§4).
fn verdicts(rules: &Rules, statement: &Statement, picture: &Picture) -> Vec<bool> {
    let bright = objects::bright(rules, picture);
    let objects = objects::find(rules, picture, &bright);
    let clauses = &statement.clauses;
    let meant = |colour: Option<&str>| -> Vec<&Object> {
        objects
            .iter()
            .filter(|o| colour.is_none_or(|c| o.colour == c))
            .collect()
    };
    let stray = clauses.iter().all(|c| c.colour.is_some())
        && objects.iter().any(|o| {
            clauses
                .iter()
                .all(|c| c.colour.as_deref() != Some(o.colour.as_str()))
        });
    let mut verdicts = Vec::new();
    for clause in clauses {
        let found = meant(clause.colour.as_deref());
        verdicts.push(found.len() as u64 == clause.count);
        if clause.colour.is_some() {
            verdicts.push(!found.is_empty() && !stray);
        }
        verdicts.push(!found.is_empty() && found.iter().all(|o| o.shape == clause.shape));
    }
    if let Some(relation) = statement.relation {
        let largest = |i: usize| {
            let found = meant(clauses.get(i)?.colour.as_deref());
            found
                .into_iter()
                .reduce(|best, o| if o.area > best.area { o } else { best })
        };
        verdicts.push(match (largest(0), largest(1)) {
            (Some(first), Some(second)) => {
                let distance = match relation {
                    Relation::Left => second.centre.0 - first.centre.0,
                    Relation::Above => second.centre.1 - first.centre.1,
                };
                distance >= rules.relation.min_distance
            }
            _ => false,
        });
    }
    let ground = ground::read(rules, picture, &bright);
    if let Some(stated) = &statement.background {
        verdicts.push(ground.as_ref().is_some_and(|g| g.family == *stated));
    }
    if let Some(stated) = &statement.pattern {
        verdicts.push(ground.as_ref().is_some_and(|g| g.pattern == stated));
    }
    verdicts
}

#[cfg(test)]
mod tests;
