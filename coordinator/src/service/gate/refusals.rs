//! What is said of connections that were turned away: each kind once, then how many more there were.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::metrics::Metrics;

/// Kinds, an address and a reason each, that are told apart in a window.
const KINDS: usize = 32;

/// What is said of a connection on which nothing was said.
pub(super) const WORDLESS: &str = "it left without a word";
/// Of these, so many of one address in a window are nothing to speak of: whoever probes the port leaves like that.
const PROBES: u64 = 10;

/// Refusals of one window.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    metrics: Metrics,
    seen: BTreeMap<(IpAddr, String), u64>,
    others: u64,
}

impl Refusals {
    /// None yet. They are counted in `metrics`, too.
    pub(super) fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            ..Self::default()
        }
    }

    /// Counts one, and logs it if it is the first of its kind in this window.
    pub(super) fn note(&mut self, address: IpAddr, reason: &str) {
        self.metrics.turned_away(reason == WORDLESS);
        let kind = (address, reason.to_owned());
        if let Some(count) = self.seen.get_mut(&kind) {
            *count += 1;
        } else if self.seen.len() < KINDS {
            if reason == WORDLESS {
                tracing::debug!(%address, reason, "a connection ended");
            } else {
                tracing::warn!(%address, reason, "turned a connection away");
            }
            self.seen.insert(kind, 1);
        } else {
            self.others += 1;
        }
    }

    /// Logs what was only counted, and begins anew.
    pub(super) fn close(&mut self) {
        for ((address, reason), count) in std::mem::take(&mut self.seen) {
            if reason == WORDLESS {
                // No first line was written: this one tells of all.
                if count > PROBES {
                    tracing::warn!(%address, count, "many connections left without a word");
                }
            } else if count > 1 {
                let more = count - 1;
                tracing::warn!(%address, reason, more, "turned more such connections away");
            }
        }
        let others = std::mem::take(&mut self.others);
        if others > 0 {
            tracing::warn!(others, "turned connections of many other addresses away");
        }
    }
}
