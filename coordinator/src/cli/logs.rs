//! `coordinator logs RUN`: what engines have printed, of all workers in one, from the store alone.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::json;

use distillery_common::logs::{self, Line};
use distillery_common::storage::layout::{self, Key};
use distillery_common::storage::{Error, Store};
use distillery_common::telemetry;

use super::Context;
use crate::{console, journal};

/// Between two looks for more.
const LOOK: Duration = Duration::from_secs(2);
/// After the run's end: until the last that engines printed is in the store.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// Parts read at a time.
const AT_A_TIME: usize = 16;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  coordinator logs runs/tiny --lines 50\n  coordinator logs s3://bucket/run -f --worker gpu-07\n\nWorkers keep what their engines print with the run, at most five seconds late and 16 MiB for each engine's life."
)]
pub(super) struct Arguments {
    /// The run URI: what the recipe calls `output`.
    #[arg(default_value = ".")]
    run: String,
    /// Go on until the run ends.
    #[arg(short, long)]
    follow: bool,
    /// Only of this worker; can be repeated.
    #[arg(long, value_name = "NAME")]
    worker: Vec<String>,
    /// Begin with the last lines only.
    #[arg(short = 'n', long, value_name = "NUMBER")]
    lines: Option<usize>,
}

pub(super) fn run(arguments: Arguments, context: Context) -> anyhow::Result<ExitCode> {
    super::runtime()?.block_on(show(arguments, context))
}

async fn show(arguments: Arguments, context: Context) -> anyhow::Result<ExitCode> {
    let store = Store::open(&arguments.run)?;
    let record = store.find(&layout::run_record()).await?;
    record.with_context(|| format!("there is no run at {}", store.uri()))?;
    let mut reader = Reader {
        store,
        only: arguments.worker,
        read: BTreeSet::new(),
        workers: BTreeSet::new(),
    };
    let mut printed = reader.fresh().await?;
    if let Some(lines) = arguments.lines {
        printed.drain(..printed.len().saturating_sub(lines));
    }
    if !arguments.follow {
        if printed.is_empty() {
            console::note(reader.nothing());
        }
        write(&printed, context)?;
        return Ok(ExitCode::SUCCESS);
    }
    loop {
        write(&printed, context)?;
        let ended = journal::read(&reader.store).await?.durable.outcome;
        tokio::time::sleep(if ended.is_some() { LAST_WORDS } else { LOOK }).await;
        printed = reader.fresh().await?;
        if let Some(outcome) = ended {
            write(&printed, context)?;
            console::note(format_args!("the run has ended ({outcome})"));
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// A line and who printed it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Printed {
    line: Line,
    worker: String,
    engine: u64,
}

fn write(printed: &[Printed], context: Context) -> std::io::Result<()> {
    for Printed {
        line,
        worker,
        engine,
    } in printed
    {
        let time = telemetry::moment(line.at_ms);
        if context.json {
            console::result(json!({
                "time": time, "worker": worker, "engine": engine, "text": line.text,
            }))?;
        } else if has_time(&line.text) {
            console::result(format_args!("{worker} | {}", line.text))?;
        } else {
            console::result(format_args!("{worker} | {time} {}", line.text))?;
        }
    }
    Ok(())
}

/// Whether a line begins with a moment of its own, as 2026-11-26T18:31.
fn has_time(text: &str) -> bool {
    let pattern = "dddd-dd-ddTdd:dd";
    let mut chars = text.chars();
    pattern.chars().all(|expected| match chars.next() {
        Some(found) if expected == 'd' => found.is_ascii_digit(),
        found => found == Some(expected),
    })
}

/// Reads every part once.
struct Reader {
    store: Store,
    only: Vec<String>,
    read: BTreeSet<Key>,
    workers: BTreeSet<String>,
}

impl Reader {
    /// Lines of parts that were not there before, by time.
    async fn fresh(&mut self) -> Result<Vec<Printed>, Error> {
        let mut parts = Vec::new();
        for entry in self.store.list(&layout::logs()).await? {
            let Some((worker, _, engine, _)) = layout::parse_log_part(&entry.key) else {
                continue;
            };
            self.workers.insert(worker.to_owned());
            let wanted = self.only.is_empty() || self.only.iter().any(|only| only == worker);
            if wanted && !self.read.contains(&entry.key) {
                parts.push((entry.key.clone(), worker.to_owned(), engine));
            }
        }
        self.read.extend(parts.iter().map(|(key, ..)| key.clone()));
        let store = &self.store;
        let read: Vec<Vec<Printed>> = stream::iter(parts)
            .map(|(key, worker, engine)| async move {
                // An old part may have been removed meanwhile.
                let bytes = store.find(&key).await?.unwrap_or_default();
                let lines = logs::from_bytes(&bytes).into_iter();
                let printed = lines.map(|line| Printed {
                    line,
                    worker: worker.clone(),
                    engine,
                });
                Ok::<_, Error>(printed.collect())
            })
            .buffered(AT_A_TIME)
            .try_collect()
            .await?;
        let mut printed: Vec<Printed> = read.into_iter().flatten().collect();
        // Lines of one moment stay in the order in which their engine printed them.
        printed.sort_by_key(|printed| printed.line.at_ms);
        Ok(printed)
    }

    fn nothing(&self) -> String {
        let known: Vec<_> = self.workers.iter().map(String::as_str).collect();
        match (known.as_slice(), self.only.is_empty()) {
            ([], _) => "no engine has printed anything yet".into(),
            (_, true) => "nothing was printed".into(),
            (known, false) => format!(
                "no engine of that name has printed anything; there are: {}",
                known.join(", ")
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_a_moment_of_its_own_is_given_no_second_one() {
        assert!(has_time("2026-11-26T18:31:00.1Z  INFO task started"));
        for text in ["", "terminate called", "2026-11-26 18:31", "20261126T18:31"] {
            assert!(!has_time(text), "{text:?}");
        }
    }

    #[tokio::test]
    async fn lines_of_all_workers_come_by_time_and_once() {
        let store = Store::in_memory();
        let put = async |worker: &str, seq, lines: &[(i64, &str)]| {
            let lines: Vec<_> = lines
                .iter()
                .map(|&(at_ms, text)| Line {
                    at_ms,
                    text: text.into(),
                })
                .collect();
            let folder = layout::engine_log(worker, distillery_common::ids::Incarnation(1), 1);
            let key = layout::log_part(&folder, seq);
            store.put(&key, logs::to_bytes(&lines)).await.expect("kept");
        };
        let mut reader = Reader {
            store: store.clone(),
            only: vec![],
            read: BTreeSet::new(),
            workers: BTreeSet::new(),
        };
        put("a", 0, &[(1, "a1"), (5, "a5"), (5, "a5 again")]).await;
        put("b", 0, &[(3, "b3")]).await;
        let texts = |printed: Vec<Printed>| -> Vec<String> {
            printed.into_iter().map(|p| p.line.text).collect()
        };
        let first = reader.fresh().await.expect("read");
        assert_eq!(texts(first), ["a1", "b3", "a5", "a5 again"]);
        put("b", 1, &[(4, "b4")]).await;
        assert_eq!(texts(reader.fresh().await.expect("read")), ["b4"]);
        reader.only = vec!["c".into()];
        put("b", 2, &[(9, "b9")]).await;
        assert_eq!(reader.fresh().await.expect("read"), []);
        assert!(reader.nothing().ends_with("there are: a, b"));
    }
}
