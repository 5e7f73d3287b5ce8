//! The curves of the live page: what groups have said of themselves since this process began.

use std::collections::BTreeMap;

use crate::scheduler::View;

/// Points kept of a curve. One that is full loses every other point, so that a long run keeps its shape.
const POINTS: usize = 600;

/// (step, loss) of each stage.
#[derive(Debug, Default)]
pub(super) struct History {
    losses: BTreeMap<String, Vec<(f64, f64)>>,
}

impl History {
    /// Takes in the run at one moment.
    pub(super) fn note(&mut self, view: &View) {
        for stage in &view.stages {
            let Some(group) = &stage.group else { continue };
            let curve = self.losses.entry(stage.name.clone()).or_default();
            let step = group.step as f64;
            // A group that was given up goes on at an earlier step.
            curve.retain(|&(earlier, _)| earlier < step);
            if group.step > 0 && group.loss.is_finite() {
                curve.push((step, group.loss));
            }
            if curve.len() > POINTS {
                let mut nth = 0;
                curve.retain(|_| {
                    nth += 1;
                    nth % 2 == 0
                });
            }
        }
    }

    /// Stages and their curves.
    pub(super) fn losses(&self) -> impl Iterator<Item = (&str, &[(f64, f64)])> {
        let losses = self.losses.iter();
        losses.map(|(stage, curve)| (stage.as_str(), curve.as_slice()))
    }
}
