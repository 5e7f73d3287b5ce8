//! What passes between the coordinator and its workers while a group takes its steps.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use distillery_tests::harness::{EngineKind, Run};

/// Between two looks at the coordinator's counters.
const GLANCE: Duration = Duration::from_millis(100);
/// What workers and the coordinator say to each other whether anything is trained or not.
const BEATS: [&str; 2] = ["beat", "beat_ack"];

/// What was counted between two looks in the middle of a stage.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) steps: u64,
    pub(super) beats: u64,
    /// Every other message, by kind.
    pub(super) others: BTreeMap<String, u64>,
}

/// The counters at one moment.
#[derive(Debug, Clone)]
struct Look {
    step: u64,
    messages: BTreeMap<String, u64>,
}

/// Lets a run of `steps` steps finish, and counts from its first step that is seen to its last one but the final.
pub(super) fn count(recipe: &str, folder: &Path, steps: usize) -> anyhow::Result<Counted> {
    let mut run = Run::new(folder, recipe, EngineKind::Real)?;
    run.start()?;
    let mut seen: Option<(Look, Look)> = None;
    let ended = loop {
        if let Some(ended) = run.ended()? {
            break ended;
        }
        // Before it listens, and when it has ended, it says nothing.
        let look = run.metrics().ok().and_then(|metrics| look(&metrics));
        if let Some(look) = look.filter(|look| (1..steps as u64).contains(&look.step)) {
            let first = seen.map_or_else(|| look.clone(), |(first, _)| first);
            seen = Some((first, look));
        }
        std::thread::sleep(GLANCE);
    };
    anyhow::ensure!(ended.success(), "{ended}: {}", run.log_tail());
    let (first, last) = seen.context("no step was seen")?;
    let mut others = last.messages;
    for (kind, before) in &first.messages {
        if let Some(count) = others.get_mut(kind) {
            *count -= before;
        }
    }
    others.retain(|_, count| *count > 0);
    let beats = BEATS.iter().filter_map(|kind| others.remove(*kind)).sum();
    Ok(Counted {
        steps: last.step - first.step,
        beats,
        others,
    })
}

fn look(metrics: &str) -> Option<Look> {
    let mut step = None;
    let mut messages = BTreeMap::new();
    for line in metrics.lines() {
        let Some((name, value)) = line.split_once(' ') else {
            continue;
        };
        if name.starts_with("distillery_group_step{") {
            step = value.parse::<f64>().ok();
        } else if name.starts_with("distillery_worker_messages_") {
            let kind = name.split('"').nth(1)?;
            messages.insert(kind.to_owned(), value.parse().ok()?);
        }
    }
    Some(Look {
        step: step? as u64,
        messages,
    })
}
