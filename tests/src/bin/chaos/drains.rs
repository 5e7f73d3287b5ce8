//! Workers that are told to leave, half of them with no time for it: what each held is committed or given back, and nothing
//! is committed twice.

use std::collections::BTreeSet;
use std::time::Duration;

use distillery_common::telemetry::Stopwatch;
use distillery_tests::harness::signal;

use super::moment::{self, Said};
use super::site::{Site, USUAL_WAITS};
use super::{Context, Score, workers};

/// Seconds that workers get to finish what they have in hand, in turn: what a scheduler in a hurry gives, and what Slurm gives.
const GRACES: [u64; 2] = [0, 25];
/// Workers of a run.
const WORKERS: usize = 4;
/// How long a worker may take to end beyond its grace, and the coordinator to say that it did.
const LOOK: Duration = Duration::from_secs(10);

/// What became of leases of workers that left.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    drains: u64,
    committed: u64,
    given_back: u64,
    /// Neither: the coordinator had to find out by itself.
    left_behind: u64,
}

/// Random workers are told to leave by a signal or by the run's owner, at random moments.
pub(crate) fn drains(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let mut setting = workers::many_shards(context, (context.number * 16).clamp(64, 3200));
    setting.workers = WORKERS;
    setting.waits = USUAL_WAITS;
    setting.pace = (0, 0);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    setting.pace = (200, 20);
    let mut tallies = [Tally::default(); GRACES.len()];
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        number += 1;
        let mut site = Site::new(&setting)?;
        site.coordinate(&[])?;
        // Which of the graces each worker has, in the order of the site's list.
        let mut graces = Vec::new();
        for at in 0..WORKERS {
            hire(&mut site, &mut graces, at % GRACES.len())?;
        }
        score.runs += 1;
        while !context.is_over(score.faults) && !site.succeeded()? {
            std::thread::sleep(Duration::from_millis(50 + u64::from(stream.below(300))));
            let at = stream.below(WORKERS as u32) as usize;
            let victim = site.workers[at].name.clone();
            let grace = graces[at];
            if !tell_to_leave(&site, at, stream.below(2) == 0)? {
                break;
            }
            await_end(&mut site, at, Duration::from_secs(GRACES[grace]) + LOOK)?;
            site.workers.remove(at);
            graces.remove(at);
            hire(&mut site, &mut graces, grace)?;
            score.faults += 1;
            follow(&site, &victim, GRACES[grace], &mut tallies[grace], score)?;
        }
        site.finish()?;
        workers::check_wins(&site, score)?;
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    for (grace, tally) in GRACES.iter().zip(tallies) {
        score.headline(format!(
            "{grace} s of grace: {} drains, {} leases committed, {} given back, {} neither{}",
            tally.drains,
            tally.committed,
            tally.given_back,
            tally.left_behind,
            if *grace > 0 { " (goal 0)" } else { "" },
        ));
    }
    Ok(())
}

fn hire(site: &mut Site, graces: &mut Vec<usize>, grace: usize) -> anyhow::Result<()> {
    site.arguments = vec!["--drain-grace".into(), GRACES[grace].to_string()];
    site.hire(1)?;
    graces.push(grace);
    Ok(())
}

/// By a signal, or by the run's owner; false when the run has ended before it could be asked.
fn tell_to_leave(site: &Site, at: usize, by_signal: bool) -> anyhow::Result<bool> {
    let worker = &site.workers[at];
    if by_signal {
        signal(worker.child.id(), "TERM")?;
        return Ok(true);
    }
    let joined = format!("worker {} joined as ", worker.name);
    let life = site.lives.len() - 1;
    let ended = |said: &Said| said.message.starts_with("run succeeded");
    let told = |said: &Said| said.message.starts_with(&joined) || ended(said);
    let is_known = || site.said(life).iter().any(told).then_some(());
    // Who is not here yet cannot be asked to leave.
    site.await_some(is_known, "worker that joined")?;
    let said = site.ask(&["drain", &site.output(), &worker.name])?;
    if let Some(refusal) = said {
        anyhow::ensure!(
            site.said(life).iter().any(ended),
            "a drain was refused: {refusal}"
        );
        return Ok(false);
    }
    Ok(true)
}

fn await_end(site: &mut Site, at: usize, patience: Duration) -> anyhow::Result<()> {
    let watch = Stopwatch::start();
    while site.workers[at].child.try_wait()?.is_none() {
        anyhow::ensure!(!super::interrupted(), "interrupted");
        anyhow::ensure!(
            watch.elapsed() < patience,
            "{} was told to leave and did not end within {patience:?}:\n{}",
            site.workers[at].name,
            site.worker_tail()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Waits until the coordinator knows that `victim` is gone, and counts what became of all that it ever held.
fn follow(
    site: &Site,
    victim: &str,
    grace: u64,
    tally: &mut Tally,
    score: &mut Score,
) -> anyhow::Result<()> {
    let life = site.lives.len() - 1;
    let gone = format!("worker {victim} left: ");
    let until = moment::now() + LOOK.as_secs_f64();
    let said = loop {
        let said = site.said(life);
        let is_over = |said: &Said| said.message.starts_with("run succeeded");
        // One that was told before it had joined never was there; one that outlived the run is not missed.
        let never_came = !said.iter().any(|said| joined_as(said, victim).is_some());
        if never_came
            || said
                .iter()
                .any(|s| s.message.starts_with(&gone) || is_over(s))
        {
            break said;
        }
        anyhow::ensure!(
            moment::now() < until,
            "nobody said within {LOOK:?} that {victim} left:\n{}",
            site.tail()
        );
        std::thread::sleep(Duration::from_millis(20));
    };
    tally.drains += 1;
    let committed = site.shards_put_by(victim)?;
    for lease in leases(&said, victim) {
        let failed = format!("{lease} failed: ");
        let failure = said.iter().find(|said| said.message.starts_with(&failed));
        if failure.is_some_and(|said| said.message.contains("(Preempted)")) {
            tally.given_back += 1;
        } else if shard_of(&lease).is_some_and(|shard| committed.contains(&shard)) {
            tally.committed += 1;
        } else {
            tally.left_behind += 1;
            if grace > 0 {
                let how = failure.map_or("nothing was said of it", |said| &said.message);
                score.violated(format!(
                    "{victim} left with {grace} s of grace, and {lease} was neither committed nor given back: {how}"
                ));
            }
        }
    }
    Ok(())
}

/// As which registration `victim` joined or came back, if this says so.
fn joined_as<'a>(said: &'a Said, victim: &str) -> Option<&'a str> {
    let rest = said.message.strip_prefix("worker ")?.strip_prefix(victim)?;
    let joined = rest.strip_prefix(" joined as ");
    joined.or_else(|| rest.strip_prefix(" is back as "))
}

/// Every lease that `victim` was given: "TASK attempt N by REGISTRATION".
fn leases(said: &[Said], victim: &str) -> BTreeSet<String> {
    let own: BTreeSet<&str> = said.iter().filter_map(|s| joined_as(s, victim)).collect();
    let granted = said.iter().filter_map(|said| {
        let (lease, _) = said.message.strip_prefix("granted ")?.split_once(": ")?;
        let (_, by) = lease.rsplit_once(" by ")?;
        own.contains(by).then(|| lease.to_owned())
    });
    granted.collect()
}

/// The shard of a lease on "trajectories/SHARD".
fn shard_of(lease: &str) -> Option<u64> {
    let task = lease.split(' ').next()?;
    task.strip_prefix("trajectories/")?.parse().ok()
}
