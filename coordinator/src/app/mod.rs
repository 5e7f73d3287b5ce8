//! A run from the recipe to its end: prepare, claim, serve, launch, drive.
//!
//! Puts the other modules together; must never decide what the scheduler decides.

mod access;
mod attach;
mod control;
mod find;
mod memo;
mod prepare;
mod progress;
mod prompt_lists;
mod sight;
mod signals;
mod waits;
mod workers;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use distillery_common::checkpoint;
use distillery_common::recipe::{Launcher, Recipe, Tls};
use distillery_common::run::RunRecord;
use distillery_common::storage::Store;
use distillery_common::storage::layout::{self, Key};
use distillery_common::telemetry::Format;

use crate::console;
use crate::driver::{self, Clock, Driver, Errands};
use crate::journal::{self, Folded, Journal};
use crate::launch::Launched;
use crate::report;
use crate::scheduler::{Machine, Outcome, Timings};
use crate::service::{self, Door};
use crate::spans;

pub use access::Access;
pub use control::{Heard, control};
pub use find::{Found, find};
pub use prepare::{Prepared, Refused, facts, open_teacher, prepare};
pub use waits::Wait;

/// Exit code of a run that can be resumed by the same command.
const TRY_AGAIN: u8 = 75;

/// How long the last spans may take to reach their collector.
const LAST_SPANS: std::time::Duration = std::time::Duration::from_secs(3);

/// How this process runs a recipe; none of it changes a result.
#[derive(Debug, Clone)]
pub struct Config {
    /// The worker's program.
    pub worker: PathBuf,
    /// The engine's program.
    pub engine: PathBuf,
    /// Do not ask whether another coordinator still has the run.
    pub takeover: bool,
    /// Serve without TLS on more than 127.0.0.1.
    pub insecure: bool,
    /// Where a collector of OpenTelemetry listens; where the environment says when none.
    pub otlp: Option<String>,
    /// Waiting times in place of the usual ones.
    pub waits: Vec<Wait>,
    /// Results are for programs.
    pub json: bool,
    /// Form of the logs of workers that this process starts.
    pub log_format: Format,
}

/// Runs `recipe` until it ends or is stopped.
pub async fn run(recipe: Recipe, config: Config, clock: Clock) -> anyhow::Result<ExitCode> {
    // Before anything is made: a teacher that cannot be used leaves no folder behind.
    let teacher = open_teacher(&recipe)?;
    let store = Store::open_or_create(&recipe.output)?;
    let prepared = prepare(&recipe, teacher, &store, &config.engine).await?;
    let Folded { durable, next, .. } = journal::read(&store).await?;
    if let Some(Outcome::Cancelled { reason }) = &durable.outcome {
        anyhow::bail!(
            "the run at {} was cancelled ({reason}); use another output",
            store.uri()
        );
    }
    if durable.outcome == Some(Outcome::Succeeded) {
        console::note(format_args!("run {} has succeeded already", recipe.name));
        show_results(&recipe, &store, &prepared.record, config.json).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let given = recipe.cluster.token.as_ref();
    if !config.takeover && next > 0 && !durable.endpoint.is_empty() {
        // A token that nobody has had yet would be none of a coordinator's that lives.
        let known = match given {
            Some(_) => Some(Access::of_run(&store, &prepared.record, given)?),
            None => Access::find(&store, &prepared.record)?,
        };
        let tls = recipe.cluster.tls == Tls::On;
        if let Some(client) = attach::coordinator(known.as_ref(), &durable, tls).await? {
            if attach::follow(client).await? == attach::Left::Detached {
                console::note(format_args!(
                    "detached; the run goes on. `coordinator stop {}` stops it",
                    store.uri()
                ));
                return Ok(ExitCode::from(TRY_AGAIN));
            }
            return end_elsewhere(&recipe, &store, &prepared.record, config.json).await;
        }
    }
    let access = Access::of_run(&store, &prepared.record, given)?;
    coordinate(recipe, config, clock, store, prepared, access).await
}

/// This process has the run.
async fn coordinate(
    recipe: Recipe,
    config: Config,
    clock: Clock,
    store: Store,
    prepared: Prepared,
    access: Access,
) -> anyhow::Result<ExitCode> {
    let timings = timings(&recipe, &config.waits)?;
    let tls = recipe.cluster.tls == Tls::On;
    let door = listen(&recipe, config.insecure).await?;
    let endpoint = endpoint(&recipe, &door)?;
    let join = access.join(&endpoint, tls)?;
    let run_id = prepared.record.run_id.to_string();
    let port = sight::bind(&recipe, &access, &run_id, config.insecure).await?;
    let journal = Journal::claim(&store, &endpoint, driver::unique_id(), clock.spent()).await?;
    tell_if_paused(&journal, &store);
    let machine = Machine::new(
        prepared.plan.clone(),
        timings.clone(),
        journal.durable().clone(),
    );
    let term = journal.term();
    tracing::info!(%term, endpoint, run_id = %prepared.record.run_id, "claimed the run");
    let errands = Errands::new(
        store.clone(),
        prepared.plan.clone(),
        prepared.dataset.clone(),
    );
    let (driver, handle) = Driver::new(machine, journal, errands, clock);
    let identity = service::Identity {
        run_id,
        run_uri: recipe.output.clone(),
        name: recipe.name.clone(),
        term: term.0,
        timings,
    };
    let (spans, sending) = spans::start(config.otlp.as_deref(), &identity)?.unzip();
    let driver = driver.told_to(spans);
    let metrics = driver.metrics();
    let page = port
        .map(|port| sight::open(port, &access, &identity, &handle, &metrics))
        .transpose()?;
    let (end_service, service_ends) = oneshot::channel::<()>();
    let serving = tokio::spawn(service::serve(
        door,
        identity,
        access.token().clone(),
        join.authority().cloned(),
        handle.clone(),
        metrics,
        async move {
            // A dropped sender means the end as well.
            let _ = service_ends.await;
        },
    ));
    if !config.json {
        console::note(&prepared.plan);
    }
    let launched = workers::launch(&recipe, &config, &access, &join, handle.clone(), clock).await?;
    let watching = signals::watch(handle.clone(), &recipe);
    let showing = tokio::spawn(progress::show(handle, term.0 > 1));
    let ended = driver.run().await;
    watching.abort();
    showing.abort();
    page.iter().for_each(JoinHandle::abort);
    see_off(launched, sending, ended.is_ok()).await;
    drop(end_service);
    serving.abort();
    let ended = match ended {
        Ok(Outcome::Succeeded) => {
            return succeed(&recipe, &store, &prepared.record, config.json).await;
        }
        Ok(outcome) => Ending::of(outcome),
        Err(error) => Ending::interrupted(&error.to_string()),
    };
    Ok(ended.tell(&recipe, config.json))
}

/// Waits for workers that this process started, and for the last spans to reach their collector.
async fn see_off(launched: Option<Launched>, sending: Option<JoinHandle<()>>, is_over: bool) {
    match launched {
        Some(launched) if is_over => launched.finish().await,
        Some(launched) => launched.leave().await,
        None => {}
    }
    if let Some(sending) = sending {
        // A collector that does not answer holds nobody up.
        let _ = tokio::time::timeout(LAST_SPANS, sending).await;
    }
}

fn tell_if_paused(journal: &Journal, store: &Store) {
    if journal.durable().paused.is_some() {
        console::note(format_args!(
            "the run is paused; `coordinator resume {}` lets it go on",
            store.uri()
        ));
    }
}

/// Says how the run ended that another process had. Both write the same report.
async fn end_elsewhere(
    recipe: &Recipe,
    store: &Store,
    record: &RunRecord,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let ended = match journal::read(store).await?.durable.outcome {
        Some(Outcome::Succeeded) => return succeed(recipe, store, record, json).await,
        Some(outcome) => Ending::of(outcome),
        None => Ending::interrupted("the coordinator is gone"),
    };
    Ok(ended.tell(recipe, json))
}

/// What is left to do after the last stage.
async fn succeed(
    recipe: &Recipe,
    store: &Store,
    record: &RunRecord,
    json: bool,
) -> anyhow::Result<ExitCode> {
    forget_earlier_stages(recipe, store).await?;
    show_results(recipe, store, record, json).await?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the report of a run that has succeeded, and shows what it found. Its files follow from the run's other
/// objects alone, so that writing them again changes nothing.
async fn show_results(
    recipe: &Recipe,
    store: &Store,
    record: &RunRecord,
    json: bool,
) -> anyhow::Result<()> {
    let report = report::gather(store, record, recipe)
        .await
        .context("collecting the results")?;
    report.publish(store).await?;
    if json {
        console::result(&report.summary)?;
        return Ok(());
    }
    if !report.figures.is_empty() {
        console::result(report.table())?;
    }
    console::note(format_args!("run {} succeeded", recipe.name));
    let place = |key: &Key| match store.local_file(key) {
        Some(path) => path.display().to_string(),
        None => format!("{}/{key}", store.uri()),
    };
    console::note(format_args!(
        "report:  {}",
        place(&layout::report("report.html"))
    ));
    if let (Some(_), Some(last)) = (&recipe.export, recipe.stages.last()) {
        let student =
            layout::export_file(&layout::export(&last.name), "diffusers/model_index.json");
        console::note(format_args!(
            "student: {}",
            place(&student).trim_end_matches("/model_index.json")
        ));
    }
    Ok(())
}

/// Deletes the checkpoints of all stages but the last, if the recipe does not keep them.
async fn forget_earlier_stages(recipe: &Recipe, store: &Store) -> Result<(), checkpoint::Error> {
    let earlier = recipe.stages.split_last().map_or(&[][..], |(_, all)| all);
    if recipe.checkpoint.keep_every_stage {
        return Ok(());
    }
    for stage in earlier {
        for folder in checkpoint::folders(store, &stage.name).await? {
            checkpoint::delete(store, &stage.name, folder).await?;
        }
    }
    Ok(())
}

fn timings(recipe: &Recipe, waits: &[Wait]) -> anyhow::Result<Timings> {
    let mut timings = Timings::default();
    if recipe.cluster.launcher == Launcher::Local {
        // Local workers cannot outlive their coordinator, and need no more than an engine's step to leave.
        timings.reattach = std::time::Duration::ZERO;
        timings.drain = std::time::Duration::from_secs(30);
    }
    waits::apply(waits, &mut timings).context("--timings or DISTILLERY_TIMINGS")?;
    Ok(timings)
}

async fn listen(recipe: &Recipe, insecure: bool) -> anyhow::Result<Door> {
    let address = &recipe.cluster.listen;
    let door = Door::bind(address)
        .await
        .with_context(|| format!("cluster.listen: {address} cannot be served"))?;
    let is_loopback = door.local_addr()?.ip().is_loopback();
    anyhow::ensure!(
        is_loopback || recipe.cluster.tls == Tls::On || insecure,
        "cluster.listen {address} can be reached from other hosts and cluster.tls is off, so the token could be read on the way; turn tls on, or say --insecure"
    );
    if !is_loopback && recipe.cluster.tls == Tls::Off {
        console::note(format_args!(
            "WARNING: --insecure: the token of this run, and everything that workers say, crosses the network in plain \
             text; whoever reads it on the way has the run"
        ));
    }
    let (wanted, members) = (recipe.cluster.max_workers as usize, door.members());
    if wanted > members {
        console::note(format_args!(
            "WARNING: cluster.workers.max is {wanted}, and the limit on open files of this process leaves room for {members} \
             connections; raise it (ulimit -n)"
        ));
    }
    Ok(door)
}

/// Where workers reach `door`.
fn endpoint(recipe: &Recipe, door: &Door) -> anyhow::Result<String> {
    match &recipe.cluster.kubernetes {
        // Whoever starts them: pods know the coordinator's Service, and no pod by its name.
        Some(pods) => Ok(pods.endpoint(door.local_addr()?.port())),
        None => advertised(door.local_addr()?),
    }
}

/// Where workers on other hosts reach `listener`.
fn advertised(address: SocketAddr) -> anyhow::Result<String> {
    if !address.ip().is_unspecified() {
        return Ok(address.to_string());
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .context("this host's name is not known; name an address in cluster.listen")?;
    Ok(format!("{}:{}", host.trim(), address.port()))
}

/// How a run ended that did not succeed.
struct Ending {
    state: &'static str,
    message: String,
    code: u8,
}

impl Ending {
    fn of(outcome: Outcome) -> Self {
        let (state, message, code) = match outcome {
            Outcome::Succeeded => ("succeeded", String::new(), 0),
            Outcome::Failed { message } => ("failed", message, 1),
            Outcome::Cancelled { reason } => ("cancelled", reason, 1),
            Outcome::Stopped { reason } => (
                "stopped",
                format!("{reason}; run the same command to resume"),
                TRY_AGAIN,
            ),
        };
        Self {
            state,
            message,
            code,
        }
    }

    fn interrupted(why: &str) -> Self {
        Self {
            state: "interrupted",
            message: format!("{why}; nothing is lost, run the same command to resume"),
            code: TRY_AGAIN,
        }
    }

    fn tell(self, recipe: &Recipe, json: bool) -> ExitCode {
        let Self {
            state,
            message,
            code,
        } = self;
        if json {
            let summary = serde_json::json!({
                "name": recipe.name, "output": recipe.output, "state": state, "message": message,
            });
            // The exit code says it too.
            let _ = console::result(summary);
        } else if code == 1 {
            console::note(format_args!(
                "error: run {} {state}: {message}",
                recipe.name
            ));
        } else {
            console::note(format_args!("run {} {state}: {message}", recipe.name));
        }
        ExitCode::from(code)
    }
}
