//! One run on a cluster: its coordinators on the head, and what Slurm says of its workers.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::telemetry::Stopwatch;
use distillery_tests::harness::{EngineKind, Made, Run, Target, programs, signal, sim_recipe};

use super::cluster::{Cluster, HEAD};

/// Pause between two looks.
const GLANCE: Duration = Duration::from_millis(50);
/// Exit code of a coordinator whose run the same command resumes.
const TRY_AGAIN: i32 = 75;
/// Waits so short that everything that only time tells is told soon.
const WAITS: &str = "beat=200ms,suspect=600ms,lease_ttl=1500ms,lease_grace=500ms,\
     member_silence=1500ms,hang=20s,reattach=2s,first_formation=500ms,\
     last_call=200ms,grow=0s,keep_for_group=2s,sweep=200ms,retry=200ms,retry_cap=2s";

/// What is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Work {
    /// Every kind of stage, on the stand-in for the engine.
    StandIn,
    /// The tiny recipe on the real engine, in reproducible mode, with more steps than its own, which would be over before
    /// anything happens to it.
    Tiny,
    /// The quickstart, as it is: it is only for runs that nobody disturbs.
    Quickstart,
}

/// What a case asks of a run and of its cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    /// The fewest workers with which the run goes on; it asks for two.
    pub(crate) fewest: u32,
    /// Milliseconds that a step of the stand-in takes: so slow that whatever happens to a run meets it at work.
    pub(crate) step_ms: u32,
    /// More of the recipe's section, each after a comma.
    pub(crate) slurm: &'static str,
    /// A script that stands before the worker, which it is handed as `$worker`, and has `$folder`.
    pub(crate) before: Option<&'static str>,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            fewest: 2,
            step_ms: 150,
            slurm: "",
            before: None,
        }
    }
}

impl Work {
    /// The recipe with two workers that `cluster` names.
    fn recipe(self, cluster: &str) -> String {
        let own = "cluster: {launcher: local, workers: {min: 2, max: 2}}";
        let (text, changes): (_, &[(&str, &str)]) = match self {
            Self::StandIn => (sim_recipe(), &[]),
            Self::Tiny => (
                include_str!("../../../../configs/tiny.yaml"),
                &[
                    ("teachers/", "{repository}/configs/teachers/"),
                    ("prompts/", "{repository}/configs/prompts/"),
                    (
                        "batch: {global: 8}",
                        "batch: {global: 8, reproducible: true, virtual_ranks: 4}",
                    ),
                    ("steps: 6}", "steps: 40}"),
                    ("every_steps: 2", "every_steps: 10"),
                ],
            ),
            Self::Quickstart => (
                include_str!("../../../../configs/quickstart.yaml"),
                &[
                    ("teachers/", "{repository}/configs/teachers/"),
                    ("prompts/", "{repository}/configs/prompts/"),
                ],
            ),
        };
        let mut recipe = text.to_owned();
        for (from, to) in changes.iter().chain(&[(own, cluster)]) {
            assert!(recipe.contains(from), "{self:?} has no {from}");
            recipe = recipe.replace(from, to);
        }
        recipe
    }

    fn engine(self) -> EngineKind {
        match self {
            Self::StandIn => EngineKind::Sim,
            Self::Tiny | Self::Quickstart => EngineKind::Real,
        }
    }

    /// Longest that anything may take before it counts as stuck.
    fn patience(self) -> Duration {
        match self {
            Self::StandIn | Self::Tiny => Duration::from_secs(240),
            Self::Quickstart => Duration::from_secs(2400),
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
    work: Work,
    run: Run,
    made: Made,
    _folder: tempfile::TempDir,
}

impl Undisturbed {
    pub(crate) fn new(work: Work) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let cluster = "cluster: {launcher: local, workers: {min: 2, max: 2}}";
        let mut run = work.run_in(&folder, cluster)?;
        run.finish(work.patience()).context("the undisturbed run")?;
        let made = run.made()?;
        Ok(Self {
            work,
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
    patience: Duration,
}

impl Site {
    /// Brings up a cluster and starts a run on it.
    pub(crate) fn begin(work: Work, setting: &Setting) -> anyhow::Result<Self> {
        let mut site = Self::new(work, setting, &format!("{HEAD}:0"))?;
        site.coordinate()?;
        Ok(site)
    }

    /// Brings up a cluster and submits the scripts of `coordinator render slurm`.
    pub(crate) fn rendered(work: Work, setting: &Setting, style: &str) -> anyhow::Result<Self> {
        let site = Self::new(work, setting, "0.0.0.0:0")?;
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

    fn new(work: Work, setting: &Setting, listen: &str) -> anyhow::Result<Self> {
        let cluster = Cluster::new().context("the cluster")?;
        let folder = tempfile::tempdir()?;
        let engine = programs()?.join(work.engine().program());
        let mut more = setting.slurm.to_owned();
        if let Some(text) = setting.before {
            let path = folder.path().join("before-the-worker");
            let worker = programs()?.join("worker");
            let text = format!(
                "#!/bin/bash\nfolder='{}'\nworker='{}'\n{text}\n",
                folder.path().display(),
                worker.display()
            );
            std::fs::write(&path, text)?;
            std::fs::set_permissions(&path, Permissions::from_mode(0o755))?;
            more += &format!(", worker: \"{}\"", path.display());
        }
        let section = format!(
            "cluster: {{launcher: slurm, workers: {{min: {}, max: 2}}, listen: \"{listen}\", \
             slurm: {{poll: 1, cpus: 2, engine: \"{}\"{more}}}}}",
            setting.fewest,
            engine.display()
        );
        let run = work
            .run_in(&folder, &section)?
            .with("SIM_TASK_MS", 100)
            .with("SIM_STEP_MS", setting.step_ms);
        Ok(Self {
            lives: Vec::new(),
            run,
            cluster,
            folder,
            patience: work.patience(),
        })
    }

    /// A file of a script that stands before the worker.
    pub(crate) fn noted(&self, name: &str) -> anyhow::Result<String> {
        let path = self.folder.path().join(name);
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
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
    pub(crate) fn kill_worker_of(&self, job: &Job) -> anyhow::Result<()> {
        let name = format!("slurm-{}", job.id);
        let is_its = |pid: &u32| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words
                .split(|&byte| byte == 0)
                .any(|word| word == name.as_bytes())
        };
        let mut workers = self.run.processes_of(Target::Worker).into_iter();
        let worker = workers.find(is_its);
        let worker = worker.with_context(|| format!("no worker is called {name}"))?;
        Ok(signal(worker, "KILL")?)
    }

    /// Waits until two workers of jobs train together, and gives their names.
    pub(crate) fn await_two_at_work(&mut self) -> anyhow::Result<Vec<String>> {
        self.await_some("two workers at work", |site| {
            let mut ask = site.run.command("coordinator");
            ask.args(["workers", "--json"]).arg(site.run.output());
            let output = site.cluster.command(&ask).output()?;
            // The coordinator may just be taking somebody in.
            let Ok(told) = serde_json::from_slice::<serde_json::Value>(&output.stdout) else {
                return Ok(None);
            };
            let workers = told.as_array().map(Vec::as_slice).unwrap_or_default();
            let busy = workers.iter().filter(|worker| worker["state"] == "busy");
            let busy = busy.filter_map(|worker| worker["name"].as_str());
            let busy: Vec<String> = busy.map(str::to_owned).collect();
            Ok((busy.len() == 2).then_some(busy))
        })
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
        let mut running = jobs.into_iter().filter(|job| job.state == "RUNNING");
        let head = running.next().context("no job runs")?;
        // Of several, one of an array: a head is none.
        match head.id.contains('_') {
            true => Ok(head),
            false => Ok(running.find(|job| job.id.contains('_')).unwrap_or(head)),
        }
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
                watch.elapsed() < self.patience && ended.is_none(),
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
                watch.elapsed() < self.patience,
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
        let mut audit = Command::new(self.run.program("audit"));
        audit.arg(self.run.output()).arg("--quiet");
        // Exports name their run, and pictures the attempt that drew them: of those the students are compared alone.
        if undisturbed.work == Work::StandIn {
            audit.arg("--against").arg(undisturbed.run.output());
        }
        let audit = audit.output().context("the auditor")?;
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
