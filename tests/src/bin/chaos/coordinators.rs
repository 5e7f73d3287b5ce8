//! Coordinators that are killed at any moment of a run of many tasks, and started again by the same command.

use std::time::Duration;

use super::site::{Setting, Site, USUAL_WAITS};
use super::{Context, Score};

/// A life lasts less than this; a life that grants nothing in [`GOAL`] is one of the figures.
const LIFE_MS: u32 = 2500;
/// Longest that a coordinator may take to grant again.
const GOAL: f64 = 2.0;

/// A run of many tasks in three stages of tasks and two of training.
fn many_tasks(context: &Context) -> Setting {
    let count = format!(
        "trajectories: {{count: {}, segments: 4, mode: stratified, shard_trajectories: 1, batch: 1}}",
        context.tasks
    );
    let evaluation = "evaluate: {samples: 64, batch: 4, steps: [4], teacher_steps: [4], \
                      samplers: [tlcm9], metrics: [latent_frechet, teacher_distance]}";
    let changes = [
        (
            "trajectories: {count: 64, segments: 4, mode: stratified, shard_trajectories: 8, batch: 4}",
            count.as_str(),
        ),
        ("evaluate: false", evaluation),
    ];
    let mut setting = Setting::small(&context.base, &changes);
    setting.workers = 4;
    setting.waits = USUAL_WAITS;
    setting
}

/// SIGKILL of the coordinator, over and over.
pub(crate) fn kills(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let mut setting = many_tasks(context);
    setting.pace = (0, 1);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    let expected = undisturbed.output();
    // So slow that the run lasts about as long as all its lives.
    let lives = context.number.clamp(1, 100) as f64 * f64::from(LIFE_MS) / 2.0;
    let pace = lives * setting.workers as f64 / context.tasks as f64 / 2.0;
    setting.pace = (pace as u32, 20);
    for number in 0.. {
        if context.is_over(score.faults) {
            break;
        }
        let mut stream = context.stream(number);
        let mut site = Site::begin(&setting)?;
        score.runs += 1;
        loop {
            let life = site.lives.len() - 1;
            std::thread::sleep(Duration::from_millis(stream.below(LIFE_MS).into()));
            let enough = context.is_over(score.faults);
            if enough || site.succeeded()? || !site.kill_life(life)? {
                break;
            }
            score.faults += 1;
            site.refill()?;
            site.coordinate(&[])?;
        }
        site.finish()?;
        measure(&site, score);
        if let Some(complaint) = site.audit(Some(&expected))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    Ok(())
}

/// Whether a stage of tasks is said to have begun with some of them open.
fn open_tasks(message: &str) -> bool {
    let counts = || {
        let (stage, rest) = message
            .strip_prefix("stage ")?
            .split_once(" started with ")?;
        let mut counts = rest
            .split_whitespace()
            .filter_map(|word| word.parse::<u64>().ok());
        let (done, total) = (counts.next()?, counts.next()?);
        Some(["trajectories", "reference", "evaluate"].contains(&stage) && done < total)
    };
    counts().unwrap_or(false)
}

/// From the start of each life but the first to its first grant.
fn measure(site: &Site, score: &mut Score) {
    let (mut late, mut short) = (Vec::new(), 0);
    for (number, life) in site.lives.iter().enumerate().skip(1) {
        let said = site.said(number);
        // A life that begins while a group trains has nothing to grant until that is done.
        let has_tasks = said
            .iter()
            .any(|said| said.at - life.started <= GOAL && open_tasks(&said.message));
        let first = said
            .iter()
            .find(|said| said.message.starts_with("granted "));
        match first {
            Some(first) if has_tasks => {
                let took = first.at - life.started;
                score.took("grants again after a restart", took);
                late.extend((took > GOAL).then_some((number, took)));
            }
            None if has_tasks || said.is_empty() => {
                let lived = said.last().map_or(0.0, |last| last.at - life.started);
                late.extend((lived > GOAL).then_some((number, lived)));
                short += 1;
            }
            Some(_) | None => {}
        }
    }
    score.note(format!(
        "{} lives granted nothing within {GOAL} s; {short} were killed before they could",
        late.len()
    ));
    for (number, took) in late {
        score.violated(format!(
            "life {number} of a coordinator granted nothing for {took:.2} s after its start; it has {GOAL} s"
        ));
    }
}
