//! `coordinator gc RUN`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::json;

use distillery_common::storage::{Store, layout};

use super::Context;
use crate::garbage::{self, Found, Why};
use crate::{app, console};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The run URI: what the recipe calls `output`.
    run: String,
    /// Remove what was found. Without it nothing is changed.
    #[arg(long)]
    delete: bool,
    /// What may still be committed counts as left behind once it is this old by the store's clock.
    #[arg(long, value_name = "HOURS", default_value_t = 24)]
    older_than: u32,
}

pub(super) fn run(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    super::runtime()?.block_on(collect(arguments, context))
}

async fn collect(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    let store = Store::open(&arguments.run)?;
    store
        .find(&layout::run_record())
        .await?
        .with_context(|| format!("there is no run at {}", store.uri()))?;
    if arguments.delete {
        refuse_if_live(&arguments.run).await?;
    }
    let found = garbage::find(&store, u64::from(arguments.older_than) * 3600).await?;
    let kept = if arguments.delete {
        garbage::delete(&store, &found.garbage).await?
    } else {
        0
    };
    show(&found, arguments.delete, kept, context)?;
    Ok(ExitCode::from(u8::from(!found.unreadable.is_empty())))
}

/// While a coordinator has the run its workers may commit what looks abandoned: only whoever has the term may delete.
async fn refuse_if_live(uri: &str) -> anyhow::Result<()> {
    let mut found = app::find(uri).await?;
    anyhow::ensure!(
        found.client()?.is_none(),
        "a coordinator at {} has the run at {uri}; nothing is deleted while it does: `coordinator stop {uri}` first",
        found.durable.endpoint
    );
    Ok(())
}

fn show(found: &Found, deleted: bool, kept: usize, context: Context) -> std::io::Result<()> {
    let mut kinds: BTreeMap<Why, (usize, u64)> = BTreeMap::new();
    for garbage in &found.garbage {
        let (files, bytes) = kinds.entry(garbage.why).or_default();
        *files += 1;
        *bytes += garbage.len;
    }
    let bytes: u64 = found.garbage.iter().map(|garbage| garbage.len).sum();
    if context.json {
        let objects: Vec<_> = found
            .garbage
            .iter()
            .map(|g| json!({"name": g.name, "bytes": g.len, "why": g.why.text()}))
            .collect();
        return console::result(json!({
            "objects": objects, "bytes": bytes, "deleted": deleted, "left": kept,
            "unreadable": found.unreadable,
        }));
    }
    for garbage in &found.garbage {
        console::result(format_args!("{:>12}  {}", garbage.len, garbage.name))?;
    }
    for (why, (files, bytes)) in kinds {
        console::result(format_args!("{files} files {}: {bytes} bytes", why.text()))?;
    }
    for (folder, reason) in &found.unreadable {
        console::note(format_args!("warning: {folder} is left alone: {reason}"));
    }
    if kept > 0 {
        console::note(format_args!(
            "{kept} files stay: they were committed meanwhile or cannot be deleted"
        ));
    }
    let verdict = match (found.garbage.len(), deleted) {
        (0, _) => "nothing is left behind".into(),
        (n, true) => format!("deleted {} files, {bytes} bytes", n - kept),
        (n, false) => format!("{n} files, {bytes} bytes could go; --delete removes them"),
    };
    console::result(verdict)
}
