//! `coordinator doctor URI`.

use std::process::ExitCode;

use serde_json::json;

use distillery_common::storage::Store;
use distillery_common::storage::contract::{self, Kept};
use distillery_common::telemetry;

use super::Context;
use crate::console;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Where a run would be stored: a folder that is there, or a bucket.
    uri: String,
}

pub(super) fn run(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    super::runtime()?.block_on(examine(arguments, context))
}

async fn examine(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    let store = Store::open(&arguments.uri)?;
    let kept = contract::check(&store, telemetry::unix_seconds()).await;
    let broken = kept.iter().filter(|kept| kept.result.is_err()).count();
    if context.json {
        let promises: Vec<_> = kept.iter().map(to_json).collect();
        console::result(json!({
            "uri": store.uri(), "promises": promises, "broken": broken,
        }))?;
    } else {
        for kept in &kept {
            console::result(to_text(kept))?;
        }
        let verdict = match broken {
            0 => format!("{} can hold a run", store.uri()),
            _ => format!(
                "{} cannot hold a run: {broken} promises broken",
                store.uri()
            ),
        };
        console::result(verdict)?;
    }
    Ok(ExitCode::from(u8::from(broken > 0)))
}

fn to_text(kept: &Kept) -> String {
    let promise = kept.promise;
    match &kept.result {
        Ok(()) => format!("ok       {promise}"),
        Err(broken) => format!(
            "MISSING  {promise}: {broken}\n         needed so that {}",
            promise.needed_for()
        ),
    }
}

fn to_json(kept: &Kept) -> serde_json::Value {
    let seen = kept.result.as_ref().err().map(ToString::to_string);
    json!({
        "promise": kept.promise.to_string(), "kept": seen.is_none(), "seen": seen,
        "needed_for": kept.promise.needed_for(),
    })
}
