//! Engines that are killed, or stand still for a while.

use std::time::Duration;

use distillery_tests::harness::signal;

use super::site::{Setting, Site};
use super::{Context, Score};

/// Faults of one run.
const PER_RUN: u64 = 5;

/// SIGKILL, or SIGSTOP and later SIGCONT.
pub(crate) fn hurt(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    // Three groups in a row without a checkpoint end a run, as they should: checkpoints come faster than faults.
    let often = [("every_steps: 10", "every_steps: 2")];
    let mut setting = Setting::small(&context.base, &often);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    setting.pace = (250, 40);
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        number += 1;
        let mut site = Site::begin(&setting)?;
        score.runs += 1;
        let mut faults = 0;
        let life = site.lives.len() - 1;
        while faults < PER_RUN && !context.is_over(score.faults) && site.ended(life)?.is_none() {
            std::thread::sleep(Duration::from_millis(stream.below(800).into()));
            let engines = site.engines();
            let Some(&engine) = engines.get(stream.below(engines.len().max(1) as u32) as usize)
            else {
                continue;
            };
            faults += 1;
            score.faults += 1;
            if stream.below(2) == 0 {
                signal(engine, "KILL")?;
            } else {
                signal(engine, "STOP")?;
                // Longer than a group may stand still, now and then.
                std::thread::sleep(Duration::from_millis(100 + u64::from(stream.below(7000))));
                signal(engine, "CONT")?;
            }
        }
        site.finish()?;
        super::workers::check_wins(&site, score)?;
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    Ok(())
}
