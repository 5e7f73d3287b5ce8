//! Workers that are killed, and workers that stand still for longer than their lease.

use std::collections::BTreeMap;
use std::time::Duration;

use distillery_tests::harness::signal;

use super::moment::{self, Said};
use super::site::{Setting, Site, USUAL_WAITS};
use super::{Context, Score};

/// How long a killed worker's task is looked for among the grants.
const LOOK: Duration = Duration::from_secs(10);
/// Longest that the task of a killed worker may wait for another one, mostly and nearly always, in seconds.
const GOALS: [(f64, f64); 2] = [(0.5, 0.5), (0.99, 2.0)];
/// What is measured of it.
const AGAIN: &str = "the task granted again";
/// Workers that stand still at the same time.
const STILL: usize = 3;
/// The same with the usual waiting times; as many go on.
const SILENT: usize = 4;
/// Longest that the task of a worker that falls silent may wait for another one: the lease's 30 s, 5 s more as the coordinator
/// counts, and the second between two of its looks. A connection on which no ping is answered is closed sooner.
const SILENCE: f64 = 36.0;
/// How long it is looked for.
const SILENCE_LOOK: Duration = Duration::from_secs(60);
/// What is measured of it.
const AFTER_SILENCE: &str = "a silent worker's task granted again";

pub(super) fn many_shards(context: &Context, count: u64) -> Setting {
    let wanted = format!(
        "trajectories: {{count: {count}, segments: 4, mode: stratified, shard_trajectories: 1, batch: 1}}"
    );
    let usual =
        "trajectories: {count: 64, segments: 4, mode: stratified, shard_trajectories: 8, batch: 4}";
    Setting::small(&context.base, &[(usual, wanted.as_str())])
}

/// SIGKILL of workers: how soon is the task of each granted to another one?
pub(crate) fn kills(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let mut setting = many_shards(context, (context.number * 16).clamp(64, 3200));
    setting.workers = 4;
    setting.waits = USUAL_WAITS;
    setting.pace = (0, 0);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    setting.pace = (200, 20);
    let (mut idle, mut number) = (0, 0);
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        number += 1;
        let mut site = Site::begin(&setting)?;
        score.runs += 1;
        while !context.is_over(score.faults) && !site.succeeded()? {
            std::thread::sleep(Duration::from_millis(50 + u64::from(stream.below(300))));
            let at = stream.below(site.workers.len() as u32) as usize;
            let victim = site.workers[at].name.clone();
            let killed = moment::now();
            site.workers[at].child.kill()?;
            site.workers[at].child.wait()?;
            site.refill()?;
            match granted_again(&site, &victim, killed)? {
                Some(took) => {
                    score.faults += 1;
                    score.took(AGAIN, took);
                }
                None => idle += 1,
            }
        }
        site.finish()?;
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    for (share, goal) in GOALS {
        score.require_within(AGAIN, share, goal);
    }
    score.note(format!("{idle} more kills met a worker without a task"));
    Ok(())
}

/// Seconds from the kill of `victim` until the task that it held was granted again; none when it held none.
fn granted_again(site: &Site, victim: &str, killed: f64) -> anyhow::Result<Option<f64>> {
    let life = site.lives.len() - 1;
    let until = killed + LOOK.as_secs_f64();
    loop {
        let said = site.said(life);
        let left = format!("worker {victim} left: ");
        let lost = said.iter().position(|said| said.message.starts_with(&left));
        if let Some(lost) = lost {
            if said[lost].message.ends_with(" 0 tasks wait again") {
                return Ok(None);
            }
            let Some(task) = held(&said[..lost], victim) else {
                return Ok(None);
            };
            let again = format!("granted {task} ");
            let found = said[lost..].iter().find(|s| s.message.starts_with(&again));
            if let Some(found) = found {
                return Ok(Some(found.at - killed));
            }
        }
        if said
            .iter()
            .any(|said| said.message.starts_with("run succeeded"))
        {
            return Ok(None);
        }
        anyhow::ensure!(
            moment::now() < until,
            "the task of {victim} was not granted again within {LOOK:?}:\n{}",
            site.tail()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The task that was last granted to `worker`.
fn held(said: &[Said], worker: &str) -> Option<String> {
    let names = [
        format!("worker {worker} joined as "),
        format!("worker {worker} is back as "),
    ];
    let incarnation = said.iter().rev().find_map(|said| {
        let rest = names
            .iter()
            .find_map(|name| said.message.strip_prefix(name));
        rest.map(str::to_owned)
    })?;
    said.iter().rev().find_map(|said| {
        // "granted TASK attempt N by REGISTRATION: why"
        let grant = said.message.strip_prefix("granted ")?;
        let grant = grant.split(':').next()?;
        let (task, by) = (grant.split(' ').next()?, grant.rsplit(' ').next()?);
        (by == incarnation).then(|| task.to_owned())
    })
}

/// SIGSTOP of workers and their engines for longer than their lease, then SIGCONT: nobody commits a second time.
pub(crate) fn stops(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let mut setting = many_shards(context, 400);
    setting.workers = 2 * STILL;
    setting.pace = (0, 0);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    setting.pace = (400, 30);
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        number += 1;
        let mut site = Site::begin(&setting)?;
        score.runs += 1;
        while !context.is_over(score.faults) && !site.succeeded()? {
            std::thread::sleep(Duration::from_millis(stream.below(700).into()));
            let first = stream.below(setting.workers as u32) as usize;
            let mut still = Vec::new();
            for at in (first..first + STILL).map(|at| at % site.workers.len()) {
                let engine = site.engine_of(at);
                let pids = std::iter::once(site.workers[at].child.id()).chain(engine);
                still.extend(pids);
                score.faults += 1;
            }
            still.iter().try_for_each(|&pid| signal(pid, "STOP"))?;
            // The lease's time to live is 2 s and its grace half a second.
            std::thread::sleep(Duration::from_millis(2800 + u64::from(stream.below(800))));
            still.iter().try_for_each(|&pid| signal(pid, "CONT"))?;
        }
        site.finish()?;
        check_wins(&site, score)?;
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    Ok(())
}

/// SIGSTOP of workers and their engines in the middle of a task, with the usual waiting times: how soon is the task of each
/// granted to another one? Then SIGCONT, and nobody commits a second time.
pub(crate) fn silences(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let mut setting = many_shards(context, 160);
    setting.workers = 2 * SILENT;
    setting.waits = USUAL_WAITS;
    setting.pace = (0, 0);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    // Tasks so long that whoever was granted one a moment ago holds it, and so many that there is work all the time.
    setting.pace = (3000, 5);
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        number += 1;
        let mut site = Site::begin(&setting)?;
        score.runs += 1;
        let mut still = Vec::new();
        let mut waiting = Vec::new();
        for at in 0..SILENT {
            let victim = site.workers[at].name.clone();
            let task = fresh_task(&site, &victim)?;
            std::thread::sleep(Duration::from_millis(stream.below(1500).into()));
            let pids: Vec<u32> = std::iter::once(site.workers[at].child.id())
                .chain(site.engine_of(at))
                .collect();
            waiting.push((task, moment::now()));
            pids.iter().try_for_each(|&pid| signal(pid, "STOP"))?;
            still.extend(pids);
            score.faults += 1;
        }
        for (task, since) in waiting {
            let took = granted_after(&site, &task, since)?;
            score.took(AFTER_SILENCE, took);
        }
        still.iter().try_for_each(|&pid| signal(pid, "CONT"))?;
        site.finish()?;
        check_wins(&site, score)?;
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    score.require_within(AFTER_SILENCE, 1.0, SILENCE);
    Ok(())
}

/// The task that `worker` is granted next.
fn fresh_task(site: &Site, worker: &str) -> anyhow::Result<String> {
    let life = site.lives.len() - 1;
    let before = held(&site.said(life), worker);
    let next = || held(&site.said(life), worker).filter(|task| before.as_ref() != Some(task));
    site.await_some(next, "task for a worker that works")
}

/// Seconds from `since` until `task` was granted once more.
fn granted_after(site: &Site, task: &str, since: f64) -> anyhow::Result<f64> {
    let life = site.lives.len() - 1;
    let again = format!("granted {task} ");
    loop {
        let said = site.said(life);
        let found = said
            .iter()
            .find(|said| said.at > since && said.message.starts_with(&again));
        if let Some(found) = found {
            return Ok(found.at - since);
        }
        anyhow::ensure!(!super::interrupted(), "interrupted");
        anyhow::ensure!(
            moment::now() < since + SILENCE_LOOK.as_secs_f64(),
            "{task} was not granted again within {SILENCE_LOOK:?}:\n{}",
            site.tail()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// No COMMIT was won twice, by what workers say themselves.
pub(crate) fn check_wins(site: &Site, score: &mut Score) -> anyhow::Result<()> {
    let wins: BTreeMap<String, u32> = site.wins()?;
    for (key, count) in wins.iter().filter(|(_, count)| **count > 1) {
        score.violated(format!("{key} was won {count} times"));
    }
    if wins.is_empty() {
        score.violated("no worker says that it won a COMMIT");
    }
    Ok(())
}
