//! `coordinator doctor [URI]`.

use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::{Value, json};

use distillery_common::storage::contract::{self, Broken, Kept};
use distillery_common::storage::{Store, chain};
use distillery_common::telemetry;

use super::Context;
use crate::console;
use crate::doctor::{self, Check, State};

/// Seconds that the store's clock may be away from this host's without a word.
const SKEW: i64 = 5;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Where a run would be stored: a folder that is there, or a bucket. Without it only this host is looked at.
    uri: Option<String>,
    /// The engine; found beside this program when not given.
    #[arg(long, env = "DISTILLERY_ENGINE", value_name = "PATH")]
    engine: Option<std::path::PathBuf>,
}

pub(super) fn run(arguments: Arguments, context: Context) -> anyhow::Result<ExitCode> {
    super::runtime()?.block_on(examine(arguments, context))
}

async fn examine(arguments: Arguments, context: Context) -> anyhow::Result<ExitCode> {
    // A folder that is not there is told before anything is looked at.
    let store = arguments.uri.as_deref().map(Store::open).transpose()?;
    let engine = match arguments.engine {
        Some(path) => path,
        None => std::env::current_exe()
            .context("this program does not know where it lies")?
            .with_file_name("engine"),
    };
    let mut checks = doctor::examine(&engine).await;
    let mut kept = Vec::new();
    if let Some(store) = &store {
        kept = contract::check(store, telemetry::unix_seconds()).await;
        checks.extend(clock(store).await);
    }
    let broken = kept.iter().filter(|kept| kept.result.is_err()).count();
    let missing = checks.iter().filter(|c| c.state == State::Missing).count();
    if context.json {
        let promises: Vec<_> = kept.iter().map(promise_json).collect();
        let checks: Vec<_> = checks.iter().map(check_json).collect();
        console::result(json!({
            "uri": store.as_ref().map(Store::uri), "promises": promises, "broken": broken,
            "checks": checks, "missing": missing,
        }))?;
    } else {
        for check in &checks {
            console::result(check_text(check))?;
        }
        for kept in &kept {
            console::result(promise_text(kept))?;
        }
        for line in verdict(store.as_ref(), broken, missing) {
            console::result(line)?;
        }
    }
    Ok(ExitCode::from(u8::from(broken + missing > 0)))
}

/// How far the store's clock is from this host's; nothing where the store cannot be used at all.
async fn clock(store: &Store) -> Option<Check> {
    const NAME: &str = "clock";
    let skew = contract::skew(store, telemetry::unix_seconds())
        .await
        .ok()?;
    Some(if skew.abs() > SKEW {
        Check::warn(
            NAME,
            format!("the store's is {skew} s ahead of this host's"),
            "let NTP set this host's clock; no decision rests on it, but logs and `gc` do",
        )
    } else {
        Check::well(NAME, format!("within {SKEW} s of the store's"))
    })
}

fn verdict(store: Option<&Store>, broken: usize, missing: usize) -> Vec<String> {
    let mut lines = vec![match missing {
        0 => "this host can take part in a run".to_owned(),
        n => format!("this host cannot compute: {n} things are missing"),
    }];
    lines.extend(store.map(|store| match broken {
        0 => format!("{} can hold a run", store.uri()),
        n => format!("{} cannot hold a run: {n} promises broken", store.uri()),
    }));
    lines
}

fn check_text(check: &Check) -> String {
    let mut text = format!("{:<8} {}: {}", check.state.word(), check.name, check.seen);
    if !check.help.is_empty() {
        text.push_str("\n         ");
        text.push_str(&check.help);
    }
    text
}

fn check_json(check: &Check) -> Value {
    json!({
        "name": check.name, "state": check.state.word(), "seen": check.seen, "help": check.help,
    })
}

fn promise_text(kept: &Kept) -> String {
    let promise = kept.promise;
    match &kept.result {
        Ok(()) => format!("ok       {promise}"),
        Err(broken @ Broken::Untried) => format!("MISSING  {promise}: {broken}"),
        Err(broken) => format!(
            "MISSING  {promise}: {}\n         needed so that {}",
            chain(broken),
            promise.needed_for()
        ),
    }
}

fn promise_json(kept: &Kept) -> Value {
    let seen = kept.result.as_ref().err().map(|broken| chain(broken));
    json!({
        "promise": kept.promise.to_string(), "kept": seen.is_none(), "seen": seen,
        "needed_for": kept.promise.needed_for(),
    })
}
