//! The run that is attacked, and what `/proc`, the store and the log say about it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use distillery_common::proto::wire;
use distillery_common::proto::wire::coordinator_client::CoordinatorClient;
use distillery_common::security::{Join, ShowToken};
use distillery_common::telemetry::Stopwatch;
use distillery_tests::harness::{EngineKind, Run, Target, sim_recipe};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks.
const GLANCE: Duration = Duration::from_millis(100);
/// What the coordinator logs of the first connection that it refuses for a reason, and of others in the same window.
const REFUSED: &str = "turned a connection away";
const MORE_REFUSED: &str = "turned more such connections away";
/// The same of a worker whose hello it refuses.
const UNWELCOME: &str = "a worker is not welcome";
/// How long the log may take to tell of a refusal: a window, and much more on a slow machine.
const TOLD: Duration = Duration::from_secs(90);

/// What came of one attack.
#[derive(Debug)]
pub(crate) struct Trial {
    name: String,
    came_of_it: Result<String, String>,
}

impl Trial {
    /// An attack that was refused in the words that `outcome` holds; an error says how it was not.
    pub(crate) fn of(name: impl Into<String>, outcome: Result<String>) -> Self {
        Self {
            name: name.into(),
            came_of_it: outcome.map_err(|error| format!("{error:#}")),
        }
    }

    pub(crate) fn is_good(&self) -> bool {
        self.came_of_it.is_ok()
    }
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.came_of_it {
            Ok(words) => write!(f, "good    {}: {words}", self.name),
            Err(words) => write!(f, "FAILED  {}: {words}", self.name),
        }
    }
}

/// Refusals for one reason, and lines of the log about them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Refusals {
    pub(crate) connections: u64,
    pub(crate) lines: u64,
}

/// What the coordinator holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Holdings {
    pub(crate) files: usize,
    pub(crate) mib: f64,
    processes: usize,
}

impl Holdings {
    pub(crate) fn files_more_than(self, other: Self) -> f64 {
        self.files.saturating_sub(other.files) as f64
    }

    pub(crate) fn mib_more_than(self, other: Self) -> f64 {
        (self.mib - other.mib).max(0.0)
    }

    pub(crate) fn processes_more_than(self, other: Self) -> f64 {
        self.processes.saturating_sub(other.processes) as f64
    }
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            files,
            mib,
            processes,
        } = self;
        write!(
            f,
            "{files} files, {mib:.1} MiB, {processes} processes of its run"
        )
    }
}

/// A run whose workers are started by us, so that it lasts as long as the attacks.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) run: Run,
    pub(crate) join: Join,
    workers: Vec<Child>,
    pid: u32,
}

fn recipe() -> Result<String> {
    let local = "launcher: local, workers: {min: 2, max: 2}";
    let large = "shard_trajectories: 8, batch: 4";
    ensure!(
        sim_recipe().contains(local) && sim_recipe().contains(large),
        "the stand-in's recipe has changed"
    );
    let recipe = sim_recipe().replace(local, "launcher: external, workers: {min: 1, max: 2}");
    // So many tasks that a slow worker is busy for half an hour.
    let recipe = recipe.replace(large, "shard_trajectories: 1, batch: 1");
    Ok(recipe)
}

/// The same run, left in peace.
pub(crate) fn undisturbed(folder: &Path) -> Result<PathBuf> {
    let mut site = Site::start(folder)?;
    site.finish_run()?;
    Ok(site.run.output())
}

impl Site {
    /// Starts a coordinator, and a worker that never gets far.
    pub(crate) fn start(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut run = Run::new(folder, &recipe()?, EngineKind::Sim)?;
        run.start()?;
        let path = run.output().join("join");
        let join = Join::parse(&run.read_when_there(&path, PATIENCE)?, false)?;
        let pid = run.await_process(Target::Coordinator, PATIENCE)?;
        let mut site = Self {
            run,
            join,
            workers: Vec::new(),
            pid,
        };
        site.add_worker("slow", 30_000)?;
        Ok(site)
    }

    fn add_worker(&mut self, name: &str, task_ms: u32) -> Result<()> {
        let join = self.run.output().join("join");
        let mut command = self.run.command("worker");
        command
            .arg("join")
            .arg("--coordinator")
            .arg(format!("@{}", join.display()))
            .args(["--name", name])
            .env("SIM_TASK_MS", task_ms.to_string())
            .stderr(std::fs::File::create(
                self.run.output().with_file_name(name),
            )?);
        self.workers.push(command.spawn()?);
        Ok(())
    }

    /// A connection of somebody who belongs to the run.
    pub(crate) async fn member(
        &self,
    ) -> Result<CoordinatorClient<InterceptedService<Channel, ShowToken>>> {
        let channel = self.join.endpoint()?.connect().await?;
        let token = ShowToken::new(self.join.token());
        Ok(CoordinatorClient::with_interceptor(channel, token))
    }

    /// Names of the run's workers, as the coordinator has them.
    pub(crate) async fn workers(&self) -> Result<Vec<String>> {
        let status = self.member().await?.status(wire::StatusRequest {}).await?;
        let workers = status.into_inner().workers;
        Ok(workers.into_iter().map(|worker| worker.name).collect())
    }

    /// What the coordinator holds now.
    pub(crate) fn holdings(&self) -> Result<Holdings> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = rss.and_then(|line| line.split_whitespace().next());
        Ok(Holdings {
            files: std::fs::read_dir(format!("/proc/{}/fd", self.pid))?.count(),
            mib: kib.context("no VmRSS")?.parse::<f64>()? / 1024.0,
            processes: self.run.processes().len(),
        })
    }

    /// What it holds once its worker and the worker's engine are there and the number of files stands still.
    pub(crate) async fn settled(&self) -> Result<Holdings> {
        let watch = Stopwatch::start();
        let mut last = self.holdings()?;
        let mut same = 0;
        loop {
            tokio::time::sleep(GLANCE).await;
            let now = self.holdings()?;
            same = if now.files == last.files { same + 1 } else { 0 };
            if same >= 10 && now.processes >= 3 {
                return Ok(now);
            }
            ensure!(
                watch.elapsed() < PATIENCE,
                "it does not come to rest: {now}"
            );
            last = now;
        }
    }

    /// What it holds once it holds no more files than `before`, or time is over.
    pub(crate) async fn settled_below(&self, before: Holdings) -> Result<Holdings> {
        let watch = Stopwatch::start();
        loop {
            let now = self.holdings()?;
            if now.files <= before.files || watch.elapsed() > PATIENCE {
                return Ok(now);
            }
            tokio::time::sleep(GLANCE).await;
        }
    }

    /// Everything that the coordinator has logged.
    pub(crate) fn log(&self) -> String {
        let path = self.run.output().with_file_name("coordinator.log");
        std::fs::read_to_string(path).unwrap_or_default()
    }

    /// What the log says so far of connections that were refused for `reason`.
    pub(crate) fn refusals_for(&self, reason: &str) -> Refusals {
        let log = self.log();
        let mut seen = Refusals::default();
        for line in log.lines().filter(|line| line.contains(reason)) {
            let more = line.rsplit_once("more=").map(|(_, count)| count);
            let digits = |text: &str| {
                let end = text.find(|c: char| !c.is_ascii_digit());
                text[..end.unwrap_or(text.len())].parse::<u64>().ok()
            };
            let count = match more.and_then(digits) {
                Some(more) if line.contains(MORE_REFUSED) => more,
                _ if line.contains(REFUSED) => 1,
                _ => continue,
            };
            seen.connections += count;
            seen.lines += 1;
        }
        seen
    }

    /// Lines of the log about workers whose hello was refused.
    pub(crate) fn unwelcome(&self) -> usize {
        let log = self.log();
        log.lines().filter(|line| line.contains(UNWELCOME)).count()
    }

    /// Waits until the log has told of a worker whose hello was refused, with the reason that it was given, once.
    pub(crate) async fn await_unwelcome(&self, reason: &str, before: usize) -> Result<()> {
        let watch = Stopwatch::start();
        while self.unwelcome() == before {
            ensure!(watch.elapsed() < TOLD, "the log does not tell of it");
            tokio::time::sleep(GLANCE).await;
        }
        let log = self.log();
        let told: Vec<_> = log
            .lines()
            .filter(|line| line.contains(UNWELCOME))
            .collect();
        let told = &told[before..];
        // As a logged value it is in quotation marks, in which its own are escaped.
        let reason = format!("{reason:?}");
        ensure!(
            told.len() == 1 && told[0].contains(&reason),
            "told, instead of once with {reason}: {told:?}"
        );
        Ok(())
    }

    /// Connections that came to nothing, as the coordinator's metrics count them.
    pub(crate) fn turned_away(&self) -> Result<usize> {
        let metrics = self.run.metrics()?;
        let series = "distillery_connections_turned_away_total{";
        let counts = metrics.lines().filter(|line| line.starts_with(series));
        let counts = counts.filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok());
        Ok(counts.sum())
    }

    /// Lines of the log about refusals.
    pub(crate) fn refusals_logged(&self) -> usize {
        let log = self.log();
        log.lines().filter(|line| line.contains("turned ")).count()
    }

    /// Waits until the log has told of `count` more connections that were refused for `reason` than `before`, and of no
    /// more: then none of them was an earlier attack's, and the next one begins with none that is not told of.
    pub(crate) async fn await_refusals(
        &self,
        reason: &str,
        before: Refusals,
        count: u64,
    ) -> Result<Refusals> {
        let watch = Stopwatch::start();
        loop {
            let now = self.refusals_for(reason);
            let since = now.connections - before.connections;
            ensure!(
                since <= count,
                "{since} connections were refused for {reason:?} where {count} called"
            );
            if since == count {
                return Ok(Refusals {
                    connections: since,
                    lines: now.lines - before.lines,
                });
            }
            ensure!(
                watch.elapsed() < TOLD,
                "the log tells of {since} refusals for {reason:?}, not of {count}:\n{}",
                self.run.log_tail()
            );
            tokio::time::sleep(GLANCE).await;
        }
    }

    fn finish_run(&mut self) -> Result<()> {
        self.add_worker("quick", 0)?;
        self.run.finish(PATIENCE)?;
        for worker in &mut self.workers {
            worker.wait()?;
        }
        self.run.no_orphans(PATIENCE)
    }

    /// Lets the run end, and compares what it made with `undisturbed`.
    pub(crate) fn finish(&mut self, undisturbed: &Path) -> Result<String> {
        ensure!(
            self.run.ended()?.is_none(),
            "the run ended under the attacks"
        );
        self.finish_run()?;
        let audited = Command::new(self.run.program("audit"))
            .arg(self.run.output())
            .arg("--against")
            .arg(undisturbed)
            .output()?;
        let said = String::from_utf8_lossy(&audited.stdout).into_owned();
        ensure!(audited.status.success(), "the auditor says: {said}");
        let log = self.log();
        ensure!(
            !log.contains("panicked"),
            "the coordinator panicked:\n{log}"
        );
        Ok("the auditor finds no difference".into())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            let _ = worker.kill();
            let _ = worker.wait();
        }
    }
}
