//! Several coordinators of one run that live together: each forced in while the ones before are running, or are
//! stopped and go on later.

use std::time::Duration;

use distillery_common::seed::Stream;
use distillery_tests::harness::signal;

use super::site::{Setting, Site};
use super::{Context, Score};

/// Coordinators that take one run after the other.
const CHAIN: u64 = 6;
/// Runs at the same time.
const BESIDE: u64 = 3;

/// Chains of takeovers.
pub(crate) fn chains(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let mut setting = Setting::small(&context.base, &[]);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    let expected = undisturbed.output();
    setting.pace = (250, 25);
    let mut next = 0;
    while !context.is_over(score.faults) {
        let done = std::thread::scope(|scope| {
            let threads: Vec<_> = (next..next + BESIDE)
                .map(|number| {
                    let (setting, expected) = (&setting, &expected);
                    let stream = context.stream(number);
                    scope.spawn(move || {
                        let mut score = Score::default();
                        let ended = chain(setting, stream, expected, &mut score);
                        ended.map(|()| score)
                    })
                })
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, anyhow::Result<Score>>| {
                thread.join().expect("a chain does not panic")
            };
            threads.into_iter().map(join).collect::<Vec<_>>()
        });
        next += BESIDE;
        for done in done {
            match done {
                Ok(found) => score.add(found),
                Err(error) => score.violated(format!("{error:#}")),
            }
        }
    }
    Ok(())
}

fn chain(
    setting: &Setting,
    mut stream: Stream,
    expected: &str,
    score: &mut Score,
) -> anyhow::Result<()> {
    let mut site = Site::begin(setting)?;
    score.runs += 1;
    let mut stopped = Vec::new();
    for _ in 0..CHAIN {
        std::thread::sleep(Duration::from_millis(stream.below(700).into()));
        let last = site.lives.len() - 1;
        if site.ended(last)?.is_some() {
            break;
        }
        let way = stream.below(3);
        if way > 0 {
            signal(site.pid(last), "STOP")?;
            stopped.push(last);
        }
        let next = site.coordinate(&["--takeover"])?;
        let claimed = |site: &Site| {
            let said = site.said(next);
            said.iter().any(|said| said.message == "claimed the run")
        };
        site.await_some(|| claimed(&site).then_some(()), "claim")?;
        score.faults += 1;
        // The workers of a stopped coordinator notice it after a while only.
        site.hire(1)?;
        if way == 1 {
            std::thread::sleep(Duration::from_millis(stream.below(400).into()));
            signal(site.pid(last), "CONT")?;
        }
    }
    let ended = site.finish();
    for &life in &stopped {
        signal(site.pid(life), "CONT")?;
    }
    ended?;
    for life in 0..site.lives.len() {
        let code = site.wait(life)?.code();
        if !matches!(code, Some(0 | 75)) {
            score.violated(format!(
                "coordinator {life} ended with {code:?}:\n{}",
                site.tail()
            ));
        }
    }
    if let Some(complaint) = site.audit(Some(expected))? {
        score.violated(format!("{complaint}kept in {}", site.keep().display()));
    }
    Ok(())
}
