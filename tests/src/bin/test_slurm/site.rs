//! One run on a cluster: its coordinators on the head, and what Slurm says of its workers.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::telemetry::Stopwatch;
use distillery_tests::harness::{EngineKind, Made, Run, Target, programs, signal, sim_recipe};

use super::cluster::{Cluster, HEAD};

/// Longest that anything may take before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(240);
/// Pause between two looks.
const GLANCE: Duration = Duration::from_millis(50);
/// Exit code of a coordinator whose run the same command resumes.
const TRY_AGAIN: i32 = 75;
/// Waits so short that everything that only time tells is told soon.
const WAITS: &str = "beat=200ms,suspect=600ms,lease_ttl=1500ms,lease_grace=500ms,\
     member_silence=1500ms,hang=20s,reattach=2s,first_formation=500ms,\
     last_call=200ms,keep_for_group=2s,sweep=200ms,retry=200ms,retry_cap=2s";

/// Milliseconds that a task takes, and a step: so slow that whatever happens to a run meets it at work.
const PACE: (u32, u32) = (100, 150);

/// What is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Work {
    /// Every kind of stage, on the stand-in for the engine.
    StandIn,
    /// Training of the real engine, in reproducible mode.
    Real,
}

impl Work {
    /// The recipe with two workers that `cluster` names.
    fn recipe(self, cluster: &str) -> String {
        let (text, own) = match self {
            Self::StandIn => (
                sim_recipe(),
                "cluster: {launcher: local, workers: {min: 2, max: 2}}",
            ),
            Self::Real => (
                include_str!("../../../recipes/elastic.yaml"),
                "cluster: {launcher: external, workers: {min: 1, max: 4}}",
            ),
        };
        assert!(text.contains(own), "the recipe has no {own}");
        text.replace(own, cluster)
    }

    fn engine(self) -> EngineKind {
        match self {
            Self::StandIn => EngineKind::Sim,
            Self::Real => EngineKind::Real,
        }
    }

    /// A run in `folder`.
    fn run_in(self, folder: &tempfile::TempDir, cluster: &str) -> anyhow::Result<Run> {
        Ok(
            Run::new(folder.path(), &self.recipe(cluster), self.engine())?
                .with("DISTILLERY_TIMINGS", WAITS),
        )
    }
}

/// What a run on this host's own workers makes that nobody disturbs.
pub(crate) struct Undisturbed {
    run: Run,
    made: Made,
    _folder: tempfile::TempDir,
}

impl Undisturbed {
    pub(crate) fn new(work: Work) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let cluster = "cluster: {launcher: local, workers: {min: 2, max: 2}}";
        let mut run = work.run_in(&folder, cluster)?;
        run.finish(PATIENCE).context("the undisturbed run")?;
        let made = run.made()?;
        Ok(Self {
            run,
            made,
            _folder: folder,
        })
    }
}

/// A job in the queue.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// As `12_0`.
    pub(crate) id: String,
    pub(crate) state: String,
    /// Number of the node.
    pub(crate) node: u32,
}

/// One run on a cluster.
pub(crate) struct Site {
    lives: Vec<Child>,
    // Before cluster and folder: its processes must be gone when those are removed.
    run: Run,
    pub(crate) cluster: Cluster,
    folder: tempfile::TempDir,
}

impl Site {
    /// Brings up a cluster and starts a run on it.
    pub(crate) fn begin(work: Work) -> anyhow::Result<Self> {
        let mut site = Self::new(work, &format!("{HEAD}:0"))?;
        site.coordinate()?;
        Ok(site)
    }

    /// Brings up a cluster and submits the scripts of `coordinator render slurm`.
    pub(crate) fn rendered(work: Work, style: &str) -> anyhow::Result<Self> {
        let site = Self::new(work, "0.0.0.0:0")?;
        let scripts = site.folder.path().join("scripts");
        let mut render = site.run.command("coordinator");
        render
            .args(["render", "slurm", "--style", style, "--folder"])
            .arg(&scripts)
            .arg(site.folder.path().join("recipe.yaml"))
            .args(["--set", &format!("output={}", site.run.output().display())]);
        let output = render.output().context("render")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        anyhow::ensure!(output.status.success(), "render: {said}");
        for script in said.lines() {
            let mut submit = Command::new("sbatch");
            submit.arg(script);
            for (name, value) in site.run.command("coordinator").get_envs() {
                submit.env(name, value.unwrap_or_default());
            }
            let output = site
                .cluster
                .command(&submit)
                .current_dir(&scripts)
                .output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            anyhow::ensure!(output.status.success(), "sbatch {script}: {said}");
        }
        Ok(site)
    }

    fn new(work: Work, listen: &str) -> anyhow::Result<Self> {
        let cluster = Cluster::new().context("the cluster")?;
        let folder = tempfile::tempdir()?;
        let engine = programs()?.join(work.engine().program());
        let section = format!(
            "cluster: {{launcher: slurm, workers: {{min: 2, max: 2}}, listen: \"{listen}\", \
             slurm: {{poll: 1, cpus: 2, engine: \"{}\"}}}}",
            engine.display()
        );
        let run = work
            .run_in(&folder, &section)?
            .with("SIM_TASK_MS", PACE.0)
            .with("SIM_STEP_MS", PACE.1);
        Ok(Self {
            lives: Vec::new(),
            run,
            cluster,
            folder,
        })
    }

    /// Starts the command, or the same command again.
    pub(crate) fn coordinate(&mut self) -> anyhow::Result<()> {
        let log = File::create(self.log(self.lives.len()))?;
        let mut command = self.cluster.command(&self.run.run_command());
        command
            .env("RUST_LOG", "warn,distillery_coordinator=info")
            .stdout(log.try_clone()?)
            .stderr(log);
        self.lives.push(command.spawn().context("the coordinator")?);
        Ok(())
    }

    fn log(&self, life: usize) -> PathBuf {
        self.folder.path().join(format!("life-{life}.log"))
    }

    fn last(&mut self) -> anyhow::Result<&mut Child> {
        self.lives.last_mut().context("a coordinator was started")
    }

    /// How the coordinator that we started ended, if it has.
    fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        match self.lives.last_mut() {
            Some(last) => Ok(last.try_wait()?),
            None => Ok(None),
        }
    }

    /// SIGKILL of the coordinator.
    pub(crate) fn kill_coordinator(&mut self) -> anyhow::Result<()> {
        let last = self.last()?;
        let ended = last.try_wait()?;
        anyhow::ensure!(ended.is_none(), "the coordinator had ended: {ended:?}");
        last.kill()?;
        last.wait()?;
        Ok(())
    }

    /// SIGKILL of the worker of a job.
    pub(crate) fn kill_a_worker(&self) -> anyhow::Result<()> {
        let workers = self.run.processes_of(Target::Worker);
        let worker = workers.first().context("no worker lives")?;
        Ok(signal(*worker, "KILL")?)
    }

    /// Living workers, wherever they run.
    pub(crate) fn workers(&self) -> usize {
        self.run.processes_of(Target::Worker).len()
    }

    /// All jobs, those that have ended too.
    pub(crate) fn jobs(&self) -> anyhow::Result<Vec<Job>> {
        let text = self
            .cluster
            .slurm("squeue", &["-h", "-r", "-t", "all", "-o", "%i|%T|%N"])?;
        let read = |line: &str| {
            let mut columns = line.trim().split('|').map(str::to_owned);
            let (id, state, node) = (columns.next()?, columns.next()?, columns.next()?);
            let node = node.trim_start_matches('n').parse().unwrap_or(0);
            Some(Job { id, state, node })
        };
        Ok(text.lines().filter_map(read).collect())
    }

    /// A job whose worker takes part in training, which has begun and will take some seconds more.
    pub(crate) fn at_work(&mut self) -> anyhow::Result<Job> {
        let trained = self.run.output().join("checkpoints");
        self.await_some("first checkpoint", |_| Ok(trained.is_dir().then_some(())))?;
        let jobs = self.jobs()?;
        let running = jobs.into_iter().find(|job| job.state == "RUNNING");
        running.context("no job runs")
    }

    /// Waits for incarnation `restarts` of a job to begin.
    pub(crate) fn await_restart(&mut self, job: &Job, restarts: u32) -> anyhow::Result<()> {
        let name = format!("{}.started", job.id);
        let file = self.run.output().join("logs/slurm").join(name);
        let what = format!("incarnation {restarts} of {}", job.id);
        self.await_some(&what, |_| {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            Ok((text.trim() == restarts.to_string()).then_some(()))
        })
    }

    /// Looks until there is something to see, while the coordinator lives.
    pub(crate) fn await_some<T>(
        &mut self,
        what: &str,
        look: impl Fn(&Self) -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let watch = Stopwatch::start();
        loop {
            if let Some(found) = look(self)? {
                return Ok(found);
            }
            anyhow::ensure!(!super::interrupted(), "interrupted");
            let ended = self.ended()?;
            anyhow::ensure!(
                watch.elapsed() < PATIENCE && ended.is_none(),
                "no {what} ({ended:?}):\n{}",
                self.tail()
            );
            std::thread::sleep(GLANCE);
        }
    }

    /// Runs to a good end: the same command again where it says so.
    fn finish(&mut self) -> anyhow::Result<()> {
        let watch = Stopwatch::start();
        loop {
            let ended = self.last()?.try_wait()?;
            match ended.map(|status: ExitStatus| status.code()) {
                Some(Some(0)) => return Ok(()),
                Some(Some(TRY_AGAIN)) => self.coordinate()?,
                Some(code) => anyhow::bail!("the run ended with {code:?}:\n{}", self.tail()),
                None => std::thread::sleep(GLANCE),
            }
            anyhow::ensure!(!super::interrupted(), "interrupted");
            anyhow::ensure!(
                watch.elapsed() < PATIENCE,
                "the run does not end:\n{}",
                self.tail()
            );
        }
    }

    /// Waits for the end of job `id`, which must be a good one.
    pub(crate) fn await_job(&mut self, id: &str) -> anyhow::Result<()> {
        let state = self.await_some("end of the head's job", |site| {
            let head = site.jobs()?.into_iter().find(|job| job.id == id);
            let state = head.map_or_else(|| "gone".to_owned(), |head| head.state);
            let lives = ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING"];
            Ok((!lives.contains(&state.as_str())).then_some(state))
        })?;
        anyhow::ensure!(state == "COMPLETED", "job {id}: {state}\n{}", self.tail());
        // Workers may take a moment to see it.
        self.await_some("empty queue", |site| {
            let left = site.cluster.slurm("squeue", &["-h"])?;
            Ok(left.is_empty().then_some(()))
        })
    }

    /// Runs to the end, which must be as if nothing had happened.
    pub(crate) fn end_well(&mut self, undisturbed: &Undisturbed) -> anyhow::Result<()> {
        if !self.lives.is_empty() {
            self.finish()?;
        }
        let left = self.cluster.slurm("squeue", &["-h"])?;
        anyhow::ensure!(left.is_empty(), "left in the queue after the run: {left}");
        let made = self.run.made()?;
        anyhow::ensure!(made == undisturbed.made, "it made something else: {made:?}");
        let audit = Command::new(self.run.program("audit"))
            .arg(self.run.output())
            .arg("--quiet")
            .arg("--against")
            .arg(undisturbed.run.output())
            .output()
            .context("the auditor")?;
        let said = String::from_utf8_lossy(&audit.stdout).into_owned();
        anyhow::ensure!(audit.status.success(), "the auditor: {said}");
        self.run.no_orphans(Duration::from_secs(60))
    }

    /// The last lines of everybody.
    pub(crate) fn tail(&self) -> String {
        let mut tail = String::new();
        let logs = self.run.output().join("logs/slurm");
        let folders = [logs, self.folder.path().join("scripts")].into_iter();
        let of_jobs = folders.filter_map(|folder| std::fs::read_dir(folder).ok());
        let of_jobs = of_jobs.flatten().flatten();
        let of_jobs = of_jobs
            .map(|entry| entry.path())
            .filter(|p| p.extension().is_some_and(|e| e == "log"));
        let of_lives = (0..self.lives.len()).map(|life| self.log(life));
        for log in of_lives.chain(of_jobs) {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            tail.push_str(&format!("{}:\n", log.display()));
            tail.push_str(&lines[lines.len().saturating_sub(15)..].join("\n"));
            tail.push('\n');
        }
        tail.push_str(&format!("squeue: {:?}\n", self.jobs()));
        tail
    }

    /// Keeps the run for whoever looks for what went wrong.
    pub(crate) fn keep(&self) -> PathBuf {
        let kept = self.folder.path().with_extension("kept");
        // Whoever looks finds nothing then; the failure was told all the same.
        let _ = Command::new("cp")
            .arg("-r")
            .arg(self.folder.path())
            .arg(&kept)
            .status();
        kept
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for life in &mut self.lives {
            // One that has ended is no error.
            let _ = life.kill();
            let _ = life.wait();
        }
    }
}
