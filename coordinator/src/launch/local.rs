//! Workers on this host, started again when they die, gone when the coordinator is gone.
//!
//! Each worker's standard input is a pipe whose other end only this process holds: however the coordinator ends,
//! the pipe closes and the worker leaves. The join string travels in an environment variable, never in an
//! argument that other users could read.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinSet;

use distillery_common::backoff::Backoff;
use distillery_common::security::Token;
use distillery_common::telemetry::{FORMAT_VARIABLE, Format};

use super::{environment, tail};
use crate::driver::Handle;
use crate::scheduler::Event;

/// A worker that lived this long was well; its failures are counted anew.
const WELL: Duration = Duration::from_secs(30);
/// Deaths in a row after which a worker is not started again.
const DEATHS: u32 = 8;
/// Wait before a second start; doubles.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest wait before a start.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// How long workers may take to end after they were told to.
const FAREWELL: Duration = Duration::from_secs(5);
/// Exit code of a worker that was started wrongly; another start would not help.
const USAGE: i32 = 64;
/// Wait before a worker that left on purpose is started again.
const REST: Duration = Duration::from_secs(1);

/// What is started.
#[derive(Debug, Clone)]
pub struct Workers {
    /// The worker's program.
    pub worker: PathBuf,
    /// The engine's program; the worker looks beside itself when none.
    pub engine: Option<PathBuf>,
    /// How many.
    pub count: u32,
    /// The fewest with which the run goes on: one more that leaves is replaced.
    pub fewest: u32,
    /// Threads of each engine; the worker decides when none.
    pub threads: Option<u32>,
    /// What admits them, with the token: for the environment only.
    pub join: String,
    /// The token, which stands in no other variable of theirs.
    pub token: Token,
    /// Folder for their logs.
    pub logs: PathBuf,
    /// Whether the join string does without TLS for what looks like another host.
    pub insecure: bool,
    /// Form of their logs.
    pub format: Format,
}

/// The started workers. Dropping it kills them.
#[derive(Debug)]
pub struct Launched {
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
}

/// Starts workers and keeps starting them again.
pub fn start(workers: Workers, handle: Handle) -> io::Result<Launched> {
    // For its owner alone, whatever the umask.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&workers.logs)?;
    let (stop, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    let kept = Arc::new(AtomicU32::new(workers.count));
    for index in 0..workers.count {
        tasks.spawn(keep(
            workers.clone(),
            format!("local-{index}"),
            handle.clone(),
            stopped.clone(),
            Arc::clone(&kept),
        ));
    }
    Ok(Launched { tasks, stop })
}

impl Launched {
    /// Waits until all workers have ended; those that do not are killed.
    pub async fn finish(mut self) {
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}

/// One worker, again and again.
///
/// Gives it up after too many deaths in a row; the last to be given up is told of.
async fn keep(
    workers: Workers,
    name: String,
    handle: Handle,
    mut stopped: watch::Receiver<bool>,
    kept: Arc<AtomicU32>,
) {
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    let mut deaths = 0;
    let log = workers.logs.join(format!("{name}.log"));
    while !*stopped.borrow() {
        let started = spawn(&workers, &name, &log);
        let ended = match started {
            Ok(child) => watch(child, &mut stopped).await,
            Err(error) => Ended::Died(format!(
                "{} cannot be started: {error}; say where the worker is with --worker",
                workers.worker.display()
            )),
        };
        match ended {
            Ended::Told => return,
            Ended::Well => {
                deaths = 0;
                backoff.reset();
            }
            Ended::Left => {
                tracing::debug!(worker = name, "a worker left");
                tokio::select! {
                    () = tokio::time::sleep(REST) => {}
                    _ = stopped.changed() => {}
                }
                let fewest = workers.fewest.max(1);
                let spare = |kept: u32| (kept > fewest).then(|| kept - 1);
                let spared = kept.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spare);
                if !*stopped.borrow() && spared.is_ok() {
                    tracing::info!(worker = name, "a worker left, and the run does without it");
                    return;
                }
            }
            Ended::Died(how) => {
                deaths += 1;
                tracing::warn!(worker = name, how, deaths, "a worker ended");
                if deaths >= DEATHS || how == wrong_start() {
                    let message = give_up(&name, &how, deaths, &log);
                    if kept.fetch_sub(1, Ordering::SeqCst) > 1 {
                        tracing::error!("{message}");
                        return;
                    }
                    // The driver may have ended meanwhile; then nobody needs to know.
                    let _ = handle.event(Event::LauncherFailed { message }).await;
                    return;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next_delay(0.0)) => {}
            _ = stopped.changed() => {}
        }
    }
}

fn give_up(name: &str, how: &str, deaths: u32, log: &Path) -> String {
    format!(
        "worker {name} ended {deaths} times in a row without doing anything; the last time: {how}\nThe end of {}:\n{}",
        log.display(),
        tail(log)
    )
}

fn wrong_start() -> String {
    format!("exit code {USAGE}: it was started wrongly")
}

enum Ended {
    /// After we told it to.
    Told,
    /// After a useful life.
    Well,
    /// On purpose: it was drained.
    Left,
    /// Soon, and how.
    Died(String),
}

async fn watch(mut child: Child, stopped: &mut watch::Receiver<bool>) -> Ended {
    // `wait` closes the pipe of a child that still owns it, and the worker would take that for our end.
    let pipe = child.stdin.take();
    let mut was_well = false;
    loop {
        tokio::select! {
            ended = child.wait() => {
                return match ended {
                    Ok(status) if status.success() => Ended::Left,
                    Ok(_) if was_well => Ended::Well,
                    Ok(status) => Ended::Died(describe(status)),
                    Err(error) => Ended::Died(error.to_string()),
                };
            }
            () = tokio::time::sleep(WELL), if !was_well => was_well = true,
            told = stopped.changed() => {
                if told.is_err() || *stopped.borrow() {
                    drop(pipe);
                    end(&mut child).await;
                    return Ended::Told;
                }
            }
        }
    }
}

/// Waits for a worker whose pipe is closed, and kills it if that was not enough.
async fn end(child: &mut Child) {
    if tokio::time::timeout(FAREWELL, child.wait()).await.is_err() {
        // It may have ended just now.
        let _ = child.kill().await;
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(USAGE), _) => wrong_start(),
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

fn spawn(workers: &Workers, name: &str, log: &Path) -> io::Result<Child> {
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(log)?;
    let mut command = Command::new(&workers.worker);
    for name in environment::telling(&workers.token) {
        command.env_remove(name);
    }
    command
        .arg("join")
        .args(["--name", name])
        .arg("--parent-stdin")
        .args(workers.insecure.then_some("--insecure"))
        .env("DISTILLERY_JOIN", &workers.join)
        .env(FORMAT_VARIABLE, workers.format.to_string())
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C at the terminal is for the coordinator, which tells its workers what it means.
        .process_group(0)
        .kill_on_drop(true);
    if let Some(engine) = &workers.engine {
        command.arg("--engine").arg(engine);
    }
    if let Some(threads) = workers.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    command.spawn()
}
