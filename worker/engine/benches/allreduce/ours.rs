//! One rank of the ring.

use std::io::{BufRead as _, Write as _};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use distillery_common::group::GroupId;
use distillery_common::ids::Generation;
use distillery_engine::collective::tcp::{Invitation, TcpRing};
use distillery_engine::collective::tree::{Partial, cover};
use distillery_engine::collective::{Collective, leaves_of};
use tch::{Device, Kind, Tensor};

/// Leaves of the fixed tree.
pub(crate) const LEAVES: u32 = 8;

/// Joins the ring, then answers requests until there are none.
pub(crate) fn answer(rank: u32, world: u32) -> Result<()> {
    let (listener, address) = TcpRing::listen(Ipv4Addr::LOCALHOST.into())?;
    say(&address.to_string())?;
    let mut lines = std::io::stdin().lock().lines();
    let peers = lines.next().context("addresses come first")??;
    let peers: Vec<String> = peers.split(' ').map(str::to_owned).collect();
    anyhow::ensure!(peers.len() == world as usize, "{world} ranks listen");
    let mut ring = listener.connect(&Invitation {
        group: &GroupId {
            stage: "bench".to_owned(),
            generation: Generation(1),
        },
        rank,
        peers: &peers,
        token: [7; 32],
        deadline: Duration::from_secs(60),
        ended: Default::default(),
    })?;
    say("ready")?;
    for line in lines {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let number = match words[..] {
            ["check"] => check(&mut ring)?,
            ["sum", bytes, repeats] => sum(&mut ring, bytes.parse()?, repeats.parse()?)?,
            ["tree", bytes, repeats] => tree(&mut ring, bytes.parse()?, repeats.parse()?)?,
            _ => bail!("`{line}` is no request"),
        };
        say(&format!("{number:?}"))?;
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}

fn check(ring: &mut TcpRing) -> Result<f64> {
    let own = Tensor::arange(1000, (Kind::Int64, Device::Cpu)).remainder(7);
    let mut flat = (own + i64::from(ring.rank()) + 1).to_kind(Kind::Float);
    ring.all_reduce_sum(&mut flat)?;
    Ok(flat.sum(Kind::Double).double_value(&[]))
}

/// Seconds of a sum of so many bytes of f32.
fn sum(ring: &mut TcpRing, bytes: i64, repeats: u32) -> Result<f64> {
    let mut flat = Tensor::ones([bytes / 4], (Kind::Float, Device::Cpu));
    measure(ring, repeats, |ring| ring.all_reduce_sum(&mut flat))
}

/// Seconds of a sum along the fixed tree, from the nodes of this rank's leaves.
fn tree(ring: &mut TcpRing, bytes: i64, repeats: u32) -> Result<f64> {
    let own = cover(leaves_of(LEAVES, ring.rank(), ring.world()));
    let values = Tensor::ones([bytes / 4], (Kind::Float, Device::Cpu));
    let mut out = values.zeros_like();
    measure(ring, repeats, |ring| {
        // A power of two of ranks holds one node each, which the sum leaves as it is.
        let partial = own.iter().map(|node| Partial {
            start: node.start,
            level: node.level,
            values: values.shallow_clone(),
        });
        ring.all_reduce_fixed(partial.collect(), LEAVES, &mut out)
    })
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn measure(
    ring: &mut TcpRing,
    repeats: u32,
    mut body: impl FnMut(&mut TcpRing) -> Result<(), distillery_engine::collective::Error>,
) -> Result<f64> {
    // Everybody is here, and has its memory.
    body(ring)?;
    ring.agree(&[0; 32])?;
    let start = Instant::now();
    for _ in 0..repeats {
        body(ring)?;
    }
    Ok(start.elapsed().as_secs_f64() / f64::from(repeats))
}
