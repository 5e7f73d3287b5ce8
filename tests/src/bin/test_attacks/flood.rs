//! Thousands of connections that say nothing: those who belong to the run must hardly notice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use distillery_common::proto::wire;
use distillery_common::telemetry::Stopwatch;
use distillery_tests::figure::{Figure, at_most};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::site::{Holdings, Site, Trial};

/// All of them must be gone after this.
const GONE: Duration = Duration::from_secs(180);
/// Looks, one after the other, at a coordinator that holds no stranger.
const QUIET: u32 = 30;
/// Connections of this program that ask meanwhile.
const OWN: usize = 2;
/// Between two questions of a member.
const ASK: Duration = Duration::from_millis(100);
/// Tenths of the connections that must be closed, and told of by the metrics.
const MOST: usize = 8;
/// Files of this process beside the connections.
const OTHER_FILES: u64 = 200;

/// The worst that a member, a newcomer and the coordinator's memory saw.
#[derive(Debug, Default)]
struct Worst {
    member_ms: f64,
    newcomer_ms: f64,
    files: usize,
    mib: f64,
}

/// Opens `count` connections at once and waits until the coordinator has closed all of them. Where they are not the `whole`
/// of it, times are not measured.
pub(crate) async fn idle(site: &Site, count: usize, whole: bool) -> Result<(Trial, Vec<Figure>)> {
    allow_files(count as u64 + OTHER_FILES)?;
    let before = site.holdings()?;
    let turned_away = site.turned_away()?;
    let closed = Arc::new(AtomicUsize::new(0));
    let watch = Stopwatch::start();
    let mut connections = open(site.join.address(), count, &closed);
    let over = AtomicBool::new(false);
    let wait = async {
        let ended = tokio::time::timeout(GONE, quiet(site, before.files, count, &closed)).await;
        over.store(true, Ordering::SeqCst);
        ended
    };
    let (ended, worst) = tokio::join!(wait, watch_on(site, &over));
    connections.shutdown().await;
    let worst = worst?;
    let workers = site.workers().await?;
    let turned_away = site.turned_away()? - turned_away;
    let outcome = (|| {
        let gone = closed.load(Ordering::SeqCst);
        ensure!(
            ended.is_ok(),
            "only {gone} of {count} are closed after {GONE:?}"
        );
        ensure!(
            10 * turned_away >= MOST * count,
            "the metrics tell of {turned_away} of {count}"
        );
        ensure!(
            workers.contains(&"slow".to_owned()),
            "the worker was lost: {workers:?}"
        );
        let (seconds, rest) = (watch.elapsed().as_secs_f64(), count - gone);
        Ok(format!(
            "closed within {seconds:.0} s, {turned_away} counted; {rest} never came out of the kernel's queue"
        ))
    })();
    let trial = Trial::of(format!("{count} connections that say nothing"), outcome);
    Ok((trial, figures(&worst, before, whole)))
}

fn figures(worst: &Worst, before: Holdings, whole: bool) -> Vec<Figure> {
    let files = worst.files.saturating_sub(before.files) as f64;
    let mut figures = vec![
        at_most(
            "descriptors of the flood at a time",
            files,
            1_100.0,
            1_200.0,
        ),
        at_most(
            "MiB of memory for the flood",
            worst.mib - before.mib,
            32.0,
            96.0,
        ),
    ];
    if whole {
        figures.extend([
            at_most(
                "ms until a member is answered in the flood, at worst",
                worst.member_ms,
                100.0,
                2_000.0,
            ),
            at_most(
                "ms until a newcomer is answered in the flood, at worst",
                worst.newcomer_ms,
                5_000.0,
                30_000.0,
            ),
        ]);
    }
    figures
}

/// Connections that wait for their end, and count it.
fn open(address: &str, count: usize, closed: &Arc<AtomicUsize>) -> JoinSet<()> {
    let mut connections = JoinSet::new();
    for _ in 0..count {
        let (address, closed) = (address.to_owned(), Arc::clone(closed));
        connections.spawn(async move {
            // One that was never let in is none that was closed.
            let Ok(mut stream) = TcpStream::connect(address).await else {
                return;
            };
            let mut heard = [0; 64];
            while matches!(stream.read(&mut heard).await, Ok(count) if count > 0) {}
            closed.fetch_add(1, Ordering::SeqCst);
        });
    }
    connections
}

/// Waits until the coordinator has closed most of them and holds none any more. What its queue in the kernel had no place
/// for is open on this side alone, and only a kernel's retries, minutes later, would tell.
async fn quiet(site: &Site, files: usize, count: usize, closed: &AtomicUsize) -> Result<()> {
    let mut looks = 0;
    while looks < QUIET {
        tokio::time::sleep(ASK).await;
        let now = site.holdings()?.files;
        let is_quiet = now <= files + OWN && 10 * closed.load(Ordering::SeqCst) >= MOST * count;
        looks = if is_quiet { looks + 1 } else { 0 };
    }
    Ok(())
}

/// Asks as a member and as a newcomer, and looks at the coordinator, until it is over.
async fn watch_on(site: &Site, over: &AtomicBool) -> Result<Worst> {
    let mut worst = Worst::default();
    let mut member = site.member().await?;
    while !over.load(Ordering::SeqCst) {
        let now = site.holdings()?;
        worst.files = worst.files.max(now.files);
        worst.mib = worst.mib.max(now.mib);
        let watch = Stopwatch::start();
        let answer = member.status(wire::StatusRequest {}).await;
        answer.context("a member was not answered in the flood")?;
        worst.member_ms = worst.member_ms.max(watch.elapsed().as_secs_f64() * 1e3);
        let watch = Stopwatch::start();
        let workers = site.workers().await;
        workers.context("a newcomer was not answered in the flood")?;
        worst.newcomer_ms = worst.newcomer_ms.max(watch.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(ASK).await;
    }
    Ok(worst)
}

fn allow_files(count: u64) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    ensure!(
        limit.maximum.is_none_or(|maximum| maximum >= count),
        "{count} open files are needed and {:?} allowed; raise the hard limit, or say --idle",
        limit.maximum
    );
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).context("raising the limit on open files")
}
