//! Rounds of measurements and their ratios. Reads no clock.

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
