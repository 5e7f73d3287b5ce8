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
        Ok(())
    }
}
