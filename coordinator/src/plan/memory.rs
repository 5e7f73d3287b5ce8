//! What the training stages take of an engine's memory, as a table.

use std::fmt;

use distillery_common::footprint::{self, Footprint, Teacher};
use distillery_common::recipe::Recipe;

use super::bytes;

/// What one training stage takes of each engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Memory {
    /// Its name.
    pub stage: String,
    /// Whether it computes activations again instead of keeping them.
    pub recompute: bool,
    /// Whether a group shares the moments out.
    pub shares_moments: bool,
    /// Its parts, in bytes.
    pub footprint: Footprint,
}

/// What every training stage of `recipe` takes.
pub fn memory(recipe: &Recipe, teacher: &Teacher) -> Vec<Memory> {
    let stages = recipe.stages.iter();
    stages
        .map(|stage| Memory {
            stage: stage.name.clone(),
            recompute: stage.compute.recompute,
            shares_moments: stage.optimizer.sharded,
            footprint: footprint::training(recipe, stage, teacher),
        })
        .collect()
}

/// A table with a line for each stage.
#[derive(Debug)]
pub struct MemoryTable<'a>(pub &'a [Memory]);

impl fmt::Display for MemoryTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<14} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}  activations",
            "memory", "weights", "masters", "gradient", "moments", "average", "device", "host"
        )?;
        for Memory {
            stage,
            recompute,
            footprint,
            ..
        } in self.0
        {
            let [kept, recomputed] = footprint.kept_or_recomputed.map(bytes);
            let activations = match recompute {
                true => format!("{recomputed} (kept {kept})"),
                false => format!("{kept} (recomputed {recomputed})"),
            };
            writeln!(
                f,
                "{stage:<14} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}  {activations}",
                bytes(footprint.teacher + footprint.frozen + footprint.trained),
                bytes(footprint.masters),
                bytes(footprint.gradient),
                bytes(footprint.moments),
                bytes(footprint.average),
                bytes(footprint.device()),
                bytes(footprint.host()),
            )?;
        }
        let sharing = self.0.iter().filter(|memory| memory.shares_moments);
        let sharing: Vec<&str> = sharing.map(|memory| &*memory.stage).collect();
        if !sharing.is_empty() {
            writeln!(
                f,
                "moments are shared out by the fewest workers in {}: a group that changes goes on from its newest checkpoint",
                sharing.join(", ")
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(stage: &str, shares_moments: bool) -> Memory {
        let footprint = Footprint {
            teacher: 8 << 20,
            frozen: 0,
            trained: 1 << 20,
            masters: 1 << 20,
            gradient: 1 << 20,
            moments: 2 << 20,
            average: 0,
            activations: 5 << 20,
            kept_or_recomputed: [5 << 20, 3 << 20],
            snapshot: 4 << 20,
        };
        Memory {
            stage: stage.to_owned(),
            recompute: false,
            shares_moments,
            footprint,
        }
    }

    #[test]
    fn a_table_says_what_shared_moments_cost() {
        let table = |memory: &[Memory]| MemoryTable(memory).to_string();
        let whole = table(&[memory("a", false), memory("b", false)]);
        assert_eq!(whole.lines().count(), 3, "{whole}");
        let mixed = table(&[memory("a", false), memory("b", true)]);
        let said = mixed.strip_prefix(&whole).expect("the same and a line");
        assert!(said.contains(" in b: ") && said.contains("newest checkpoint"));
    }
}
