//! Figures of benchmarks, and what they are held against: a goal, and a floor that fails the benchmark.
//!
//! Floors are no goals: they stand where the figures stood on a busy machine of two cores, less its noise.

/// One figure: what it is, what it should be, and what it must be.
#[derive(Debug, Clone)]
pub struct Figure {
    name: &'static str,
    value: f64,
    goal: f64,
    floor: f64,
    /// Whether a larger value is better.
    more: bool,
}

impl Figure {
    /// Whether it reaches its floor.
    pub fn holds(&self) -> bool {
        if self.more {
            self.value >= self.floor
        } else {
            self.value <= self.floor
        }
    }

    /// The figure with its goal and its floor; MISSED where the goal is.
    pub fn text(&self) -> String {
        let (sign, reached) = if self.more {
            ('≥', self.value >= self.goal)
        } else {
            ('≤', self.value <= self.goal)
        };
        let verdict = if reached { "" } else { ", MISSED" };
        let (name, goal, floor) = (self.name, self.goal, self.floor);
        let value = shown(self.value);
        format!("{name} {value} (goal {sign} {goal}{verdict}; floor {sign} {floor})")
    }
}

/// A figure that should be at least `goal` and must be at least `floor`.
pub fn at_least(name: &'static str, value: f64, goal: f64, floor: f64) -> Figure {
    Figure {
        name,
        value,
        goal,
        floor,
        more: true,
    }
}

/// A figure that should be at most `goal` and must be at most `floor`.
pub fn at_most(name: &'static str, value: f64, goal: f64, floor: f64) -> Figure {
    Figure {
        name,
        value,
        goal,
        floor,
        more: false,
    }
}

/// Four digits that matter.
fn shown(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.4}"),
    }
}
