//! Workers as jobs of Slurm: an array of jobs of one host each, so that a lost host ends its own job alone.
//!
//! ```text
//!  look (squeue, who has joined, how jobs ended) ─▶ fleet::decide ─▶ submit, cancel, give up
//! ```
//!
//! Jobs outlive this process. Their name carries the run's id: whoever has the run next finds them by it, and takes
//! them over. Time in the queue is no failure, and neither is a controller that does not answer. Accounting is not
//! asked: not every cluster has it.

mod client;
mod fleet;
mod queue;
mod script;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use distillery_common::recipe::slurm::Slurm;
use distillery_common::security::Token;
use distillery_common::telemetry::Stopwatch;

use self::client::{Client, Trouble};
use self::fleet::{Code, Fleet, Look, Step};
use self::queue::JobId;
use super::{environment, tail};
use crate::console;
use crate::driver::Handle;
use crate::scheduler::Event;

pub use self::script::{Head, Worker, head, heterogeneous, worker};

/// How long workers may take to leave of themselves at the end of a run.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long Slurm may take to end what is left: it kills 30 seconds after it told.
const CLEARANCE: Duration = Duration::from_secs(120);
/// Between two looks while the end is awaited.
const GLANCE: Duration = Duration::from_millis(500);

/// What is submitted.
#[derive(Debug, Clone)]
pub struct Workers {
    /// How Slurm is asked.
    pub slurm: Slurm,
    /// What the jobs are told.
    pub worker: Worker,
    /// What no variable of theirs may hold.
    pub token: Token,
    /// Engines that the run can use.
    pub most: u32,
    /// The fewest with which the run goes on: one more that leaves is not replaced.
    pub fewest: u32,
}

/// How many jobs squeue names in `text`.
pub fn count_jobs(text: &str) -> usize {
    queue::parse(text).len()
}

/// Name of the jobs of a run.
pub fn name_of(run_id: &str) -> String {
    format!("distill-{run_id}")
}

/// Ends the jobs of a run that nobody has. Slurm's programs are handed no variable that holds `token`, if it is known here.
///
/// # Errors
/// When Slurm cannot be asked from here, with what to do.
pub async fn end_jobs(run_id: &str, token: Option<&Token>) -> anyhow::Result<()> {
    let withheld = token.map(environment::telling).unwrap_or_default();
    let client = Client::of(name_of(run_id), withheld)?;
    let name = &client.name;
    client.cancel_all().await.with_context(|| {
        format!("its jobs may still be in Slurm's queue; `scancel --name={name}` ends them")
    })
}

/// What becomes of the jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// They are kept.
    Further,
    /// They stay, for whoever has the run next.
    Left,
    /// They are ended.
    Ended,
}

/// The submitted jobs. Dropping it leaves them alone.
#[derive(Debug)]
pub struct Launched {
    task: JoinHandle<()>,
    until: watch::Sender<Until>,
}

/// Submits jobs and keeps replacing them.
///
/// # Errors
/// When Slurm's programs are not here, or the script cannot be written.
pub fn start(workers: Workers, handle: Handle) -> anyhow::Result<Launched> {
    let missing = Client::missing();
    anyhow::ensure!(
        missing.is_empty(),
        "cluster.launcher slurm needs {} on this host's PATH; run this where jobs can be submitted (Debian: slurm-client)",
        missing.join(", ")
    );
    let logs = &workers.worker.logs;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(logs)
        .with_context(|| format!("{} cannot be made", logs.display()))?;
    let script = logs.join("worker.sbatch");
    std::fs::write(&script, script::worker(&workers.slurm, &workers.worker))
        .with_context(|| format!("{} cannot be written", script.display()))?;
    let jobs = |engines: u32| engines.div_ceil(workers.slurm.engines());
    let keeper = Keeper {
        client: Client::of(
            workers.worker.name.clone(),
            environment::telling(&workers.token),
        )?,
        fleet: Fleet::new(jobs(workers.most), jobs(workers.fewest)),
        logs: logs.clone(),
        script,
        handle,
        watch: Stopwatch::start(),
        is_away: false,
        shown: None,
    };
    let (until, told) = watch::channel(Until::Further);
    let poll = Duration::from_secs(workers.slurm.poll_s.into());
    console::note(format_args!(
        "workers are Slurm jobs named {}; their logs are in {}",
        keeper.client.name,
        keeper.logs.display()
    ));
    let task = tokio::spawn(keeper.keep(poll, told));
    Ok(Launched { task, until })
}

impl Launched {
    /// Ends all jobs, and waits until none is in the queue.
    pub async fn finish(self) {
        self.end(Until::Ended).await;
    }

    /// Leaves the jobs to whoever has the run next.
    pub async fn leave(self) {
        self.end(Until::Left).await;
    }

    async fn end(self, until: Until) {
        self.until.send_replace(until);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the keeper of Slurm's jobs ended badly");
        }
    }
}

struct Keeper {
    client: Client,
    fleet: Fleet,
    logs: PathBuf,
    script: PathBuf,
    handle: Handle,
    watch: Stopwatch,
    /// Slurm gave no answer the last time; people are told of it once.
    is_away: bool,
    /// What `status` was last told of why jobs are missing.
    shown: Option<String>,
}

impl Keeper {
    async fn keep(mut self, poll: Duration, mut told: watch::Receiver<Until>) {
        loop {
            let until = *told.borrow_and_update();
            match until {
                Until::Further => self.turn().await,
                Until::Left => return,
                Until::Ended => return self.clear().await,
            }
            tokio::select! {
                () = tokio::time::sleep(poll) => {}
                changed = told.changed() => if changed.is_err() {
                    return;
                },
            }
        }
    }

    /// Looks, decides, acts. What Slurm does not answer is looked at again later.
    async fn turn(&mut self) {
        let queue = match self.client.queue().await {
            Ok(queue) => queue,
            Err(trouble) => return self.not_answered(&trouble),
        };
        if std::mem::take(&mut self.is_away) {
            tracing::warn!("Slurm answers again");
        }
        // The driver may have ended meanwhile; then nobody has joined any more.
        let snapshot = self.handle.snapshot().await;
        let is_ending = match &snapshot {
            Ok(snapshot) => snapshot.view.state == "stopping",
            Err(_) => true,
        };
        let workers = snapshot.map(|s| s.view.workers).unwrap_or_default();
        let joined: BTreeSet<JobId> = workers
            .iter()
            .filter_map(|worker| JobId::of_worker(&worker.name))
            .collect();
        let gone = self.fleet.gone(&queue).into_iter();
        let ends: BTreeMap<JobId, Code> = gone.map(|id| (id.clone(), self.code(&id))).collect();
        let steps = self.fleet.decide(Look {
            now: self.watch.elapsed(),
            queue: &queue,
            ends: &ends,
            joined: &joined,
            is_ending,
        });
        for step in steps {
            self.take(step).await;
        }
        self.show().await;
    }

    /// Has `status` say why jobs are missing, until they are not.
    async fn show(&mut self) {
        let lack = self.fleet.lack();
        if lack != self.shown {
            self.shown.clone_from(&lack);
            // The driver may have ended meanwhile; then nobody needs to know.
            let _ = self.handle.launcher_waits(lack).await;
        }
    }

    async fn take(&mut self, step: Step) {
        match step {
            Step::Tell(_) | Step::GiveUp(..) => self.say(step).await,
            Step::Cancel(ids) => {
                if let Err(trouble) = self.client.cancel(&ids).await {
                    tracing::warn!(%trouble, "jobs cannot be cancelled");
                }
            }
            Step::Submit(count) => match self.client.submit(&self.script, count).await {
                Ok(array) => {
                    tracing::info!(array, count, "submitted workers");
                    self.fleet.submitted(&array, count);
                }
                Err(trouble) => {
                    if let Trouble::Away(_) = trouble {
                        self.not_answered(&trouble);
                    }
                    let now = self.watch.elapsed();
                    let steps = self.fleet.not_submitted(now, &trouble);
                    for step in steps {
                        self.say(step).await;
                    }
                }
            },
        }
    }

    /// What only has to be told: to people, or to the run.
    async fn say(&self, step: Step) {
        let (why, job) = match step {
            Step::GiveUp(why, job) => (why, job),
            Step::Tell(text) => return tracing::warn!("{text}"),
            Step::Submit(_) | Step::Cancel(_) => return,
        };
        let evidence = job.map_or_else(String::new, |id| self.evidence(&id));
        let message = format!("{why}{evidence}");
        // The driver may have ended meanwhile; then nobody needs to know.
        let _ = self.handle.event(Event::LauncherFailed { message }).await;
    }

    fn not_answered(&mut self, trouble: &Trouble) {
        if !std::mem::replace(&mut self.is_away, true) {
            tracing::warn!(%trouble, "Slurm does not answer; jobs that run go on, and it is asked again");
        }
    }

    /// What the script of a job wrote last.
    fn code(&self, id: &JobId) -> Code {
        let text = std::fs::read_to_string(self.logs.join(format!("{id}.ended"))).ok()?;
        text.trim().parse().ok()
    }

    fn evidence(&self, id: &JobId) -> String {
        let log = self.logs.join(format!("{id}.log"));
        if Path::new(&log).exists() {
            return format!("\nThe end of {}:\n{}", log.display(), tail(&log));
        }
        format!(
            "\nIt left no log at {}: is that folder on a file system which all nodes share, under the same path?",
            log.display()
        )
    }

    /// Lets workers leave, ends those that do not, and waits until the queue has none.
    async fn clear(&self) {
        let watch = Stopwatch::start();
        let (mut cancelled, mut told, mut left) = (false, false, None);
        while watch.elapsed() < FAREWELL + CLEARANCE {
            if let Ok(queue) = self.client.queue().await {
                let live = queue
                    .into_iter()
                    .filter(|job| !matches!(job.state, queue::State::Ended(_)));
                let live: Vec<_> = live.map(|job| job.id.to_string()).collect();
                if live.is_empty() {
                    return;
                }
                left = Some(live);
            }
            if !cancelled && watch.elapsed() >= FAREWELL {
                match self.client.cancel_all().await {
                    Ok(()) => cancelled = true,
                    Err(_) if told => {}
                    Err(trouble) => {
                        tracing::warn!(%trouble, "jobs cannot be cancelled; it is tried again");
                        told = true;
                    }
                }
            }
            tokio::time::sleep(GLANCE).await;
        }
        let Client { name, user, .. } = &self.client;
        let what = match left {
            Some(left) => format!(
                "jobs of this run are still in Slurm's queue: {}",
                left.join(", ")
            ),
            None => {
                "Slurm does not answer, so that jobs of this run may still be in its queue".into()
            }
        };
        console::note(format_args!(
            "{what}; `scancel --user={user} --name={name}` ends them"
        ));
    }
}
