//! Ray, Dask and torchft beside us: a script installs them into a scratch environment and prints JSON.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use distillery_tests::harness::repository;
use serde_json::Value;

/// What the peers did, each a JSON object by its name.
pub(crate) struct Peers(Vec<Value>);

impl Peers {
    /// Runs them in the environment at `folder`, which is made where it is not there.
    pub(crate) fn measure(folder: &Path, short: bool) -> Result<Self> {
        let script = repository().join("tests/python/bench_peers.sh");
        let output = Command::new(script)
            .arg(folder)
            .args(short.then_some("--short"))
            .stderr(Stdio::inherit())
            .output()
            .context("the script of the peers cannot be run")?;
        let text = String::from_utf8_lossy(&output.stdout);
        for line in text.lines() {
            println!("peer: {line}");
        }
        let values = text
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?;
        Ok(Self(values))
    }

    /// Nobody.
    pub(crate) fn none() -> Self {
        Self(Vec::new())
    }

    /// A figure of a peer, where it was measured.
    pub(crate) fn figure(&self, peer: &str, name: &str) -> Option<f64> {
        let of_peer = self.0.iter().find(|value| value["peer"] == peer)?;
        of_peer[name].as_f64()
    }

    /// Says how many times faster we are: `ours` and the peer's in the same unit, `more` where larger is better.
    pub(crate) fn compare(&self, what: &str, ours: f64, peer: &str, name: &str, more: bool) {
        match self.figure(peer, name) {
            Some(theirs) => {
                let ratio = if more { ours / theirs } else { theirs / ours };
                println!("{what}: ours {ours:.3}, {peer} {theirs:.3}: {ratio:.1} times as good");
            }
            None => println!("{what}: ours {ours:.3}, {peer} NOT measured"),
        }
    }
}
