//! Random histories of kills, joins and leaves in reproducible mode, with the real engine: one and the same student.

use std::collections::BTreeMap;
use std::time::Duration;

use distillery_common::seed::Stream;
use distillery_tests::harness::{EngineKind, signal};

use super::site::{SHORT_WAITS, Setting, Site};
use super::{Context, Score};

/// Engines of a group, at most; as many workers at a time.
const MOST: u32 = 4;

/// Waits with which a group grows at its next checkpoint.
pub(crate) const WAITS: &str = "beat=200ms,suspect=600ms,lease_ttl=1500ms,lease_grace=500ms,\
     member_silence=1500ms,hang=20s,reattach=2s,first_formation=200ms,grow=0s,\
     keep_for_group=2s,sweep=200ms,retry=200ms,retry_cap=2s";

/// What the members of a group keep or write in shares. The student is the same.
const SHARES: [&str; 3] = [
    "checkpoint: {every_steps: 10}",
    "checkpoint: {every_steps: 10, sharded: true}",
    "checkpoint: {every_steps: 10, sharded: true}\noptimizer: {sharded: true}",
];

/// The setting of history `number`.
fn setting_of(context: &Context, number: u64) -> Setting {
    let shares = SHARES[(number % SHARES.len() as u64) as usize];
    let setting = setting(context);
    Setting {
        recipe: setting.recipe.replace(SHARES[0], shares),
        ..setting
    }
}

/// The setting of a run in which nothing is shared out.
pub(crate) fn setting(context: &Context) -> Setting {
    Setting {
        recipe: include_str!("../../../recipes/elastic.yaml").to_owned(),
        engine: EngineKind::Real,
        waits: WAITS,
        ..Setting::small(&context.base, &[])
    }
}

/// Lives through histories and compares what they made with each other and with runs that nobody disturbed.
pub(crate) fn histories(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    debug_assert_ne!(WAITS, SHORT_WAITS);
    let mut students: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut undisturbed = None;
    for world in [1, 2, 3, MOST as usize] {
        let mut setting = setting(context);
        setting.workers = world;
        let mut site = Site::begin(&setting)?;
        site.finish()?;
        let made = format!("{:?}", site.made()?.students);
        students
            .entry(made)
            .or_default()
            .push(format!("undisturbed on {world}"));
        undisturbed = Some(site);
    }
    let undisturbed = undisturbed.map(|site| (site.output(), site));
    let mut generations = 0;
    while !context.is_over(score.faults) {
        let number = score.faults;
        let mut stream = context.stream(number);
        let mut site = live(&setting_of(context, number), &mut stream)?;
        site.finish()?;
        score.faults += 1;
        score.runs += 1;
        generations += site.said_of_all().matches("formed seg").count();
        let made = format!("{:?}", site.made()?.students);
        students
            .entry(made)
            .or_default()
            .push(format!("history {number}"));
        let against = undisturbed.as_ref().map(|(output, _)| output.as_str());
        if let Some(complaint) = site.audit(against)? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    for student in students.keys() {
        score.note(format!("student {student}"));
    }
    score.headline(format!(
        "{} distinct students of {} histories and 4 undisturbed runs, {generations} groups (goal 1)",
        students.len(),
        score.runs
    ));
    if students.len() != 1 {
        let mut groups: Vec<_> = students.values().collect();
        groups.sort_by_key(|of| std::cmp::Reverse(of.len()));
        for odd in &groups[1..] {
            score.violated(format!("another student: {}", odd.join(", ")));
        }
    }
    Ok(())
}

/// A run to which something happens until it is nearly done.
fn live(setting: &Setting, stream: &mut Stream) -> anyhow::Result<Site> {
    let mut setting = setting.clone();
    setting.workers = 1 + stream.below(MOST) as usize;
    let mut site = Site::begin(&setting)?;
    // Whoever is missing at the end is hired then.
    site.setting.workers = 1;
    let events = 4 + stream.below(8);
    for _ in 0..events {
        std::thread::sleep(Duration::from_millis(200 + u64::from(stream.below(1200))));
        let life = site.lives.len() - 1;
        if site.ended(life)?.is_some() {
            break;
        }
        happen(&mut site, stream)?;
    }
    Ok(site)
}

/// One of: an engine is killed, a worker is killed or told to leave, one joins, the coordinator is killed.
fn happen(site: &mut Site, stream: &mut Stream) -> anyhow::Result<()> {
    let at = stream.below(site.workers.len().max(1) as u32) as usize;
    match stream.below(10) {
        0..=3 => {
            let engines = site.engines();
            if let Some(&engine) = engines.get(stream.below(engines.len().max(1) as u32) as usize) {
                signal(engine, "KILL")?;
            }
        }
        4 if site.workers.len() > 1 => site.workers[at].child.kill()?,
        5 | 6 if site.workers.len() > 1 => signal(site.workers[at].child.id(), "TERM")?,
        7 => {
            let life = site.lives.len() - 1;
            if site.kill_life(life)? {
                site.coordinate(&[])?;
            }
        }
        _ if (site.workers.len() as u32) < MOST => site.hire(1)?,
        _ => {}
    }
    site.forget_the_gone()
}
