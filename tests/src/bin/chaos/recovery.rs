//! How soon a group trains again when one of its engines is killed, stopped or cut off, and whether a step is lost.

use std::time::Duration;

use distillery_tests::harness::{EngineKind, signal};

use super::moment::{self, Said};
use super::site::{Setting, Site};
use super::{Context, Score, elastic};

/// How long a group that lost an engine is looked after.
const LOOK: Duration = Duration::from_secs(30);
/// What the issue allows, in seconds.
const P95: f64 = 2.0;
/// Kills before another run begins.
const PER_RUN: u64 = 25;

/// The usual waits: recovery must not need short ones. Only beginnings are.
const WAITS: &str = "first_formation=1s,keep_for_group=2s,grow=0s";

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
    kills(context, score, &setting)
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
    kills(context, score, &setting)
}

fn kills(context: &Context, score: &mut Score, setting: &Setting) -> anyhow::Result<()> {
    let mut setting = setting.clone();
    setting.waits = WAITS;
    let mut redone = 0;
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        number += 1;
        let mut site = Site::begin(&setting)?;
        score.runs += 1;
        trains_since(&site, 0.0)?;
        let mut kills = 0;
        while kills < PER_RUN && !context.is_over(score.faults) {
            std::thread::sleep(Duration::from_millis(500 + u64::from(stream.below(1500))));
            let engines = site.engines();
            let Some(&engine) = engines.get(stream.below(engines.len().max(1) as u32) as usize)
            else {
                continue;
            };
            let killed = moment::now();
            signal(engine, "KILL")?;
            let (took, before, after) = trains_since(&site, killed)?;
            score.took("training again", took);
            kills += 1;
            score.faults += 1;
            redone = redone.max(before.saturating_sub(after));
        }
        // Nobody waits for thousands of steps: what was done is in order so far.
        let life = site.lives.len() - 1;
        site.kill_life(life)?;
        if let Some(complaint) = site.audit_unfinished()? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    score.note(format!(
        "at most {redone} steps known to be applied were taken again (goal 1)"
    ));
    if redone > 1 {
        score.violated(format!("{redone} applied steps were lost"));
    }
    score.require_within("training again", 0.95, P95);
    Ok(())
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
