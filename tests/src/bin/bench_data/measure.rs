//! What is measured, and what it is held against. Reads no clock.

/// One figure: what it is, what it should be, and what it must be.
pub(crate) struct Figure {
    name: &'static str,
    value: f64,
    goal: f64,
    floor: f64,
    /// Whether a larger value is better.
    more: bool,
}

impl Figure {
    pub(crate) fn holds(&self) -> bool {
        if self.more {
            self.value >= self.floor
        } else {
            self.value <= self.floor
        }
    }

    pub(crate) fn text(&self) -> String {
        let (sign, reached) = if self.more {
            ('≥', self.value >= self.goal)
        } else {
            ('≤', self.value <= self.goal)
        };
        let verdict = if reached { "" } else { ", MISSED" };
        let (name, value, goal, floor) = (self.name, self.value, self.goal, self.floor);
        format!("{name} {value:.4} (goal {sign} {goal}{verdict}; floor {sign} {floor})")
    }
}

pub(crate) fn at_least(name: &'static str, value: f64, goal: f64, floor: f64) -> Figure {
    Figure {
        name,
        value,
        goal,
        floor,
        more: true,
    }
}

pub(crate) fn at_most(name: &'static str, value: f64, goal: f64, floor: f64) -> Figure {
    Figure {
        name,
        value,
        goal,
        floor,
        more: false,
    }
}

/// How fast we are: 1 is as fast as the other.
pub(crate) struct Ratios {
    /// Against the bytes themselves.
    pub(crate) raw: f64,
    /// Against pyarrow, where there is one.
    pub(crate) pyarrow: Option<f64>,
}

/// Seconds of interleaved rounds.
#[derive(Default)]
pub(crate) struct Rounds {
    pub(crate) ours: Vec<f64>,
    pub(crate) raw: Vec<f64>,
    pub(crate) pyarrow: Vec<f64>,
}

impl Rounds {
    /// Ratios of medians; tells all three in bytes a second.
    pub(crate) fn ratios(self, what: &str, bytes: u64) -> Ratios {
        let rate = |seconds: f64| bytes as f64 / seconds / f64::from(1 << 20);
        let has_peer = !self.pyarrow.is_empty();
        let (ours, raw) = (median(self.ours), median(self.raw));
        let pyarrow = has_peer.then(|| median(self.pyarrow));
        let shown = pyarrow.map(|s| format!(", pyarrow {:.0}", rate(s)));
        println!(
            "{what}, MiB/s: ours {:.0}, raw {:.0}{}",
            rate(ours),
            rate(raw),
            shown.unwrap_or_default()
        );
        Ratios {
            raw: raw / ours,
            pyarrow: pyarrow.map(|pyarrow| pyarrow / ours),
        }
    }
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
