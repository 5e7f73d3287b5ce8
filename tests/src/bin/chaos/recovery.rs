//! How soon a group trains again when one of its engines is killed, stopped or cut off, and whether a step is lost.

use std::time::Duration;

use distillery_common::seed::Stream;
use distillery_tests::harness::{EngineKind, signal};

use super::hosts::{self, Hosts, address};
use super::moment::{self, Said};
use super::site::{Setting, Site, Wrap};
use super::{Context, Score, elastic};

/// How long a group that lost an engine is looked after.
const LOOK: Duration = Duration::from_secs(120);
/// Faults before another run begins.
const PER_RUN: u64 = 25;
/// Of so many kills, one more fault of each other way.
const KILLS_PER_OTHER: u64 = 40;
/// How often a slow engine stands still, and each time for how long.
const HALTS: u32 = 40;
const HALT: Duration = Duration::from_millis(150);

/// The usual waits: recovery must not need short ones. Only beginnings are.
const WAITS: &str = "first_formation=1s,keep_for_group=2s,grow=0s";

/// What happens to one member of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Its engine is killed.
    Kill,
    /// Worker and engine stand still: silence, which takes 15 s to be believed.
    StopWorker,
    /// Its engine alone stands still, and its worker goes on saying so: a hang, which takes a minute to be believed.
    StopEngine,
    /// No packet reaches its host or leaves it.
    CutOff,
}

impl Way {
    fn what(self) -> &'static str {
        match self {
            Self::Kill => "training again, engine killed",
            Self::StopWorker => "training again, worker stopped",
            Self::StopEngine => "training again, engine stopped",
            Self::CutOff => "training again, host cut off",
        }
    }

    /// Which share must train again within how many seconds. Silence counts after 15 s, and is looked for each second; a hang
    /// counts after a minute, and the worker then gets 10 s to end its engine.
    fn goal(self) -> (f64, f64) {
        match self {
            Self::Kill => (0.95, 2.0),
            Self::StopWorker | Self::CutOff => (1.0, 16.0),
            Self::StopEngine => (1.0, 72.0),
        }
    }
}

/// Sixteen stand-ins.
pub(crate) fn simulated(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let many = [
        ("workers: {min: 1, max: 2}", "workers: {min: 8, max: 16}"),
        ("batch: {global: 8}", "batch: {global: 16}"),
        ("steps: 40", "steps: 4000"),
        ("every_steps: 10", "every_steps: 20"),
    ];
    let mut setting = Setting::small(&context.base, &many);
    setting.workers = 16;
    setting.pace = (20, 20);
    let others = [(Way::StopWorker, others(context))];
    all(context, score, &setting, &others)
}

/// Four real engines.
pub(crate) fn real(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let mut setting = elastic::setting(context);
    setting.engine = EngineKind::Real;
    setting.recipe = setting
        .recipe
        .replace("steps: 40", "steps: 4000")
        .replace("steps: 30", "steps: 10");
    setting.workers = 4;
    let number = others(context);
    let others = [
        (Way::StopWorker, number),
        (Way::StopEngine, number.div_ceil(3)),
        (Way::CutOff, number),
    ];
    all(context, score, &setting, &others)?;
    slow(context, score, &setting)
}

fn others(context: &Context) -> u64 {
    context.number.div_ceil(KILLS_PER_OTHER)
}

fn all(
    context: &Context,
    score: &mut Score,
    setting: &Setting,
    others: &[(Way, u64)],
) -> anyhow::Result<()> {
    let setting = Setting {
        waits: WAITS,
        ..setting.clone()
    };
    let mut redone = 0;
    let kills = [(Way::Kill, context.number)];
    for (number, &(way, faults)) in (0..).zip(kills.iter().chain(others)) {
        let first = number << 32;
        redone = redone.max(suffer(context, score, &setting, way, faults, first)?);
        let (share, seconds) = way.goal();
        score.require_within(way.what(), share, seconds);
    }
    score.note(format!(
        "at most {redone} steps known to be applied were taken again (goal 1)"
    ));
    if redone > 1 {
        score.violated(format!("{redone} applied steps were lost"));
    }
    Ok(())
}

/// Does `way` to `faults` members, and gives the most steps that were taken again. Runs are numbered from `number` on.
fn suffer(
    context: &Context,
    score: &mut Score,
    setting: &Setting,
    way: Way,
    faults: u64,
    mut number: u64,
) -> anyhow::Result<u64> {
    let (mut redone, mut done) = (0, 0);
    while done < faults && !super::interrupted() {
        let mut stream = context.stream(number);
        let Some((mut site, hosts)) = begin(setting, way, number)? else {
            score.skipped(hosts::NEEDED);
            return Ok(redone);
        };
        number += 1;
        score.runs += 1;
        trains_since(&site, 0.0)?;
        let until = (done + PER_RUN).min(faults);
        while done < until && !super::interrupted() {
            std::thread::sleep(Duration::from_millis(500 + u64::from(stream.below(1500))));
            let Some(heal) = hurt(&site, way, hosts.as_ref(), &mut stream)? else {
                continue;
            };
            let (took, before, after) = trains_since(&site, heal.since)?;
            heal.whole(hosts.as_ref())?;
            score.took(way.what(), took);
            done += 1;
            score.faults += 1;
            redone = redone.max(before.saturating_sub(after));
        }
        end(&mut site, score)?;
    }
    Ok(redone)
}

/// Nobody waits for thousands of steps: what was done is in order so far.
fn end(site: &mut Site, score: &mut Score) -> anyhow::Result<()> {
    let life = site.lives.len() - 1;
    site.kill_life(life)?;
    if let Some(complaint) = site.audit_unfinished()? {
        score.violated(format!("{complaint}kept in {}", site.keep().display()));
    }
    Ok(())
}

/// A run with its workers, each on a host of its own where hosts are cut off; none where there can be no such hosts.
fn begin(
    setting: &Setting,
    way: Way,
    number: u64,
) -> anyhow::Result<Option<(Site, Option<Hosts>)>> {
    if way != Way::CutOff {
        return Ok(Some((Site::begin(setting)?, None)));
    }
    let workers = setting.workers as u32;
    let Some(hosts) = Hosts::new(number, workers + 1)? else {
        return Ok(None);
    };
    let mut setting = setting.clone();
    let there = format!(
        "cluster: {{launcher: external, listen: \"{}:0\", tls: \"on\",",
        address(1)
    );
    setting.recipe = setting
        .recipe
        .replace("cluster: {launcher: external,", &there);
    let mut site = Site::new(&setting)?;
    site.wrap.coordinator = hosts.on(1);
    site.coordinate(&[])?;
    for host in 2..=workers + 1 {
        site.wrap = Wrap {
            worker: hosts.on(host),
            ..site.wrap.clone()
        };
        site.hire(1)?;
    }
    Ok(Some((site, Some(hosts))))
}

/// A fault that is there, and what it takes to end it.
struct Hurt {
    /// In seconds since 1970.
    since: f64,
    stopped: Vec<u32>,
}

impl Hurt {
    fn whole(self, hosts: Option<&Hosts>) -> anyhow::Result<()> {
        for pid in self.stopped {
            // It may have been killed meanwhile, as it should.
            let _ = signal(pid, "CONT");
        }
        hosts.map_or(Ok(()), Hosts::heal)
    }
}

/// Does `way` to a member that `stream` names; none when it has no engine just now.
fn hurt(
    site: &Site,
    way: Way,
    hosts: Option<&Hosts>,
    stream: &mut Stream,
) -> anyhow::Result<Option<Hurt>> {
    let at = stream.below(site.workers.len().max(1) as u32);
    let Some(engine) = site.engine_of(at as usize) else {
        return Ok(None);
    };
    let since = moment::now();
    let worker = site.workers[at as usize].child.id();
    let stopped = match (way, hosts) {
        (Way::Kill, _) => {
            signal(engine, "KILL")?;
            Vec::new()
        }
        (Way::CutOff, Some(hosts)) => {
            hosts.rule(&format!("-s {} -j DROP", address(at + 2)))?;
            hosts.rule(&format!("-d {} -j DROP", address(at + 2)))?;
            Vec::new()
        }
        (Way::StopEngine, _) => vec![engine],
        (Way::StopWorker | Way::CutOff, _) => vec![worker, engine],
    };
    stopped.iter().try_for_each(|&pid| signal(pid, "STOP"))?;
    Ok(Some(Hurt { since, stopped }))
}

/// An engine that is slower than the others slows its group down, and that is all.
fn slow(context: &Context, score: &mut Score, setting: &Setting) -> anyhow::Result<()> {
    let mut setting = setting.clone();
    setting.waits = WAITS;
    let mut site = Site::begin(&setting)?;
    score.runs += 1;
    trains_since(&site, 0.0)?;
    for number in 0..others(context) {
        let at = context.stream(number).below(site.workers.len() as u32) as usize;
        let Some(engine) = site.engine_of(at) else {
            anyhow::bail!("worker {at} has no engine:\n{}", site.worker_tail());
        };
        let since = moment::now();
        for _ in 0..HALTS {
            signal(engine, "STOP")?;
            std::thread::sleep(HALT);
            signal(engine, "CONT")?;
            std::thread::sleep(HALT / 3);
        }
        score.faults += 1;
        let life = site.lives.len() - 1;
        let said = || site.said(life).into_iter().filter(move |s| s.at > since);
        let saved = || said().find(|said| said.message.starts_with("checkpoint of "));
        site.await_some(saved, "checkpoint by a group with a slow engine")?;
        if let Some(given_up) = said().find(|said| said.message.starts_with("gave up ")) {
            score.violated(format!(
                "a slow engine ended its group: {}",
                given_up.message
            ));
        }
    }
    score.note("slow engines, still three quarters of the time: their groups went on");
    end(&mut site, score)
}

/// Waits for the first step that a group formed after `since` has applied: the seconds it took, the last step known of
/// before, and that step.
fn trains_since(site: &Site, since: f64) -> anyhow::Result<(f64, u64, u64)> {
    let life = site.lives.len() - 1;
    let until = moment::now() + LOOK.as_secs_f64();
    loop {
        let said = site.said(life);
        let formed = said
            .iter()
            .position(|said| said.at > since && said.message.starts_with("formed "));
        if let Some(formed) = formed {
            let before = said[..formed].iter().filter_map(known).max().unwrap_or(0);
            let trains = said[formed..]
                .iter()
                .find_map(|s| Some((s.at, step_of(s)?)));
            if let Some((at, step)) = trains {
                return Ok((at - since, before, step.saturating_sub(1)));
            }
        }
        anyhow::ensure!(!super::interrupted(), "interrupted");
        anyhow::ensure!(
            moment::now() < until,
            "no group trained within {LOOK:?}:\n{}\n{}",
            site.tail(),
            site.worker_tail()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The last step that a group was known to have applied when it was given up.
fn known(said: &Said) -> Option<u64> {
    let (_, rest) = said
        .message
        .strip_prefix("gave up ")?
        .split_once(" at step ")?;
    rest.split(':').next()?.parse().ok()
}

/// The step that a group is said to have applied first.
fn step_of(said: &Said) -> Option<u64> {
    let (_, rest) = said.message.split_once(" trains: step ")?;
    rest.split_whitespace().next()?.parse().ok()
}
