//! One run under attack: its coordinators, its workers, what they logged, and the auditor's verdict.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::telemetry::Stopwatch;
use distillery_tests::harness::{EngineKind, Made, Run, Target, signal, sim_recipe};

use super::moment::{self, Said};

/// Pause between two looks at something that is awaited.
const GLANCE: Duration = Duration::from_millis(10);
/// Longest that anything here may take before it counts as stuck.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);
/// Exit code of a coordinator whose run the same command resumes.
const TRY_AGAIN: i32 = 75;

/// Waits so short that everything that only time tells is told soon.
pub(crate) const SHORT_WAITS: &str = "beat=200ms,suspect=600ms,lease_ttl=1500ms,lease_grace=500ms,\
     member_silence=1500ms,hang=5s,reattach=1s,first_formation=500ms,\
     last_call=200ms,keep_for_group=2s,sweep=200ms,retry=200ms,retry_cap=2s";
/// The usual waits, but for those that only make a run on few workers slow to start.
pub(crate) const USUAL_WAITS: &str = "first_formation=500ms,keep_for_group=2s,reattach=1s";

/// How a run is made.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    /// Text of the recipe.
    pub(crate) recipe: String,
    /// Which engine works.
    pub(crate) engine: EngineKind,
    /// Milliseconds that a task takes, and a step.
    pub(crate) pace: (u32, u32),
    /// Workers that are started.
    pub(crate) workers: usize,
    /// The coordinator's waiting times.
    pub(crate) waits: &'static str,
    /// Where folders are made.
    pub(crate) base: PathBuf,
    /// What else every process finds in its environment.
    pub(crate) variables: Vec<(String, String)>,
    /// The run URI, where it is not a folder of ours.
    pub(crate) output: Option<String>,
}

impl Setting {
    /// The usual small run on workers of ours, with `change`s to its recipe.
    pub(crate) fn small(base: &Path, changes: &[(&str, &str)]) -> Self {
        let mut recipe = sim_recipe().to_owned();
        let cluster = "cluster: {launcher: local, workers: {min: 2, max: 2}}";
        let external = "cluster: {launcher: external, workers: {min: 1, max: 2}}";
        for (from, to) in [(cluster, external)].iter().chain(changes) {
            assert!(recipe.contains(from), "the recipe has no {from}");
            recipe = recipe.replace(from, to);
        }
        Self {
            recipe,
            engine: EngineKind::Sim,
            pace: (60, 10),
            workers: 2,
            waits: SHORT_WAITS,
            base: base.to_owned(),
            variables: Vec::new(),
            output: None,
        }
    }
}

/// One life of a coordinator.
pub(crate) struct Life {
    child: Child,
    log: PathBuf,
    /// When its process was started, in seconds since 1970.
    pub(crate) started: f64,
    ended: Option<ExitStatus>,
}

/// A worker, started by us.
pub(crate) struct Worker {
    pub(crate) name: String,
    pub(crate) child: Child,
    log: PathBuf,
}

/// One run.
pub(crate) struct Site {
    // Before the folder: its processes must be gone when that is removed.
    run: Run,
    pub(crate) setting: Setting,
    pub(crate) lives: Vec<Life>,
    pub(crate) workers: Vec<Worker>,
    hired: u32,
    /// Whether the secrets lie beside the run, although its place was given.
    pub(crate) join_beside_run: bool,
    /// What every worker that is hired from now on is told besides.
    pub(crate) arguments: Vec<String>,
    /// A program that coordinators and workers are started by, such as one that enters a namespace.
    pub(crate) wrap: Wrap,
    folder: tempfile::TempDir,
}

/// What stands before a command, for coordinators and for each new worker.
#[derive(Debug, Default, Clone)]
pub(crate) struct Wrap {
    pub(crate) coordinator: Vec<String>,
    pub(crate) worker: Vec<String>,
}

impl Site {
    pub(crate) fn new(setting: &Setting) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("chaos-")
            .tempdir_in(&setting.base)?;
        let mut run = Run::new(folder.path(), &setting.recipe, setting.engine)?
            .with("SIM_TASK_MS", setting.pace.0)
            .with("SIM_STEP_MS", setting.pace.1)
            .with("DISTILLERY_TIMINGS", setting.waits)
            .with("XDG_STATE_HOME", folder.path().display());
        for (name, value) in &setting.variables {
            run = run.with(name, value);
        }
        Ok(Self {
            run,
            setting: setting.clone(),
            lives: Vec::new(),
            workers: Vec::new(),
            hired: 0,
            join_beside_run: false,
            arguments: Vec::new(),
            wrap: Wrap::default(),
            folder,
        })
    }

    /// A run with a coordinator and its workers.
    pub(crate) fn begin(setting: &Setting) -> anyhow::Result<Self> {
        let mut site = Self::new(setting)?;
        site.coordinate(&[])?;
        site.hire(setting.workers)?;
        Ok(site)
    }

    /// Where its objects are.
    pub(crate) fn output(&self) -> String {
        let own = || self.run.output().display().to_string();
        self.setting.output.clone().unwrap_or_else(own)
    }

    /// What it made, in digests.
    pub(crate) fn made(&self) -> anyhow::Result<Made> {
        self.run.made()
    }

    /// The folder that is this run's alone.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts the same command again.
    pub(crate) fn coordinate(&mut self, arguments: &[&str]) -> anyhow::Result<usize> {
        let number = self.lives.len();
        let log = self.folder.path().join(format!("life-{number:04}.log"));
        let mut command = self.wrapped("coordinator", &self.wrap.coordinator);
        command
            .arg("run")
            .arg(self.folder.path().join("recipe.yaml"))
            .args(["--json", "--set", &format!("output={}", self.output())])
            .args(arguments)
            .env("RUST_LOG", "warn,distillery_coordinator=debug")
            .stdout(File::create(log.with_extension("out"))?)
            .stderr(File::create(&log)?);
        let started = moment::now();
        let child = command.spawn().context("the coordinator")?;
        self.lives.push(Life {
            child,
            log,
            started,
            ended: None,
        });
        Ok(number)
    }

    fn wrapped(&self, program: &str, wrap: &[String]) -> Command {
        let inner = self.run.command(program);
        let Some((first, rest)) = wrap.split_first() else {
            let mut inner = inner;
            // Ctrl-C is for us: we end everything in order.
            std::os::unix::process::CommandExt::process_group(&mut inner, 0);
            return inner;
        };
        let mut command = Command::new(first);
        command.args(rest).arg(inner.get_program());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command.stdin(Stdio::null());
        command
    }

    /// The file with the join string, which a coordinator rewrites.
    fn join(&self) -> anyhow::Result<PathBuf> {
        match &self.setting.output {
            None => return Ok(self.run.output().join("join")),
            Some(output) if self.join_beside_run => return Ok(Path::new(output).join("join")),
            Some(_) => {}
        }
        let state = self.folder.path().join("distillery");
        let find = || {
            let entry = std::fs::read_dir(&state).ok()?.next()?.ok()?;
            Some(entry.path().join("join"))
        };
        self.await_some(find, "folder of secrets")
    }

    /// Starts workers that outlive coordinators.
    pub(crate) fn hire(&mut self, count: usize) -> anyhow::Result<()> {
        let join = self.join()?;
        self.await_some(|| join.is_file().then_some(()), "join file")?;
        for _ in 0..count {
            let name = format!("w{}", self.hired);
            self.hired += 1;
            let log = self.folder.path().join(format!("{name}.log"));
            let mut command = self.wrapped("worker", &self.wrap.worker);
            command
                .args(["join", "--name", &name, "--coordinator"])
                .arg(format!("@{}", join.display()))
                .args(&self.arguments)
                .env("RUST_LOG", "info")
                .stdout(Stdio::null())
                .stderr(File::create(&log)?);
            let child = command.spawn().context("a worker")?;
            self.workers.push(Worker { name, child, log });
        }
        Ok(())
    }

    /// Counts only workers that have not ended.
    pub(crate) fn forget_the_gone(&mut self) -> anyhow::Result<()> {
        let mut left = Vec::new();
        for mut worker in std::mem::take(&mut self.workers) {
            if worker.child.try_wait()?.is_none() {
                left.push(worker);
            }
        }
        self.workers = left;
        Ok(())
    }

    /// Starts as many workers as have ended.
    pub(crate) fn refill(&mut self) -> anyhow::Result<()> {
        self.forget_the_gone()?;
        let missing = self.setting.workers.saturating_sub(self.workers.len());
        self.hire(missing)
    }

    /// Kills coordinator `life` and waits for its end; false when it had ended of itself.
    pub(crate) fn kill_life(&mut self, life: usize) -> anyhow::Result<bool> {
        if self.ended(life)?.is_some() {
            return Ok(false);
        }
        let life = &mut self.lives[life];
        life.child.kill()?;
        life.ended = Some(life.child.wait()?);
        Ok(true)
    }

    pub(crate) fn pid(&self, life: usize) -> u32 {
        self.lives[life].child.id()
    }

    /// How coordinator `life` ended, if it has.
    pub(crate) fn ended(&mut self, life: usize) -> anyhow::Result<Option<ExitStatus>> {
        let life = &mut self.lives[life];
        if life.ended.is_none() {
            life.ended = life.child.try_wait()?;
        }
        Ok(life.ended)
    }

    /// Waits for coordinator `life` to end.
    pub(crate) fn wait(&mut self, life: usize) -> anyhow::Result<ExitStatus> {
        let watch = Stopwatch::start();
        loop {
            if let Some(status) = self.ended(life)? {
                return Ok(status);
            }
            anyhow::ensure!(
                watch.elapsed() < PATIENCE,
                "coordinator {life} did not end within {PATIENCE:?}:\n{}",
                self.tail()
            );
            std::thread::sleep(GLANCE);
        }
    }

    /// Whether the last coordinator has ended well.
    pub(crate) fn succeeded(&mut self) -> anyhow::Result<bool> {
        let last = self.lives.len() - 1;
        Ok(self.ended(last)?.is_some_and(|status| status.success()))
    }

    /// Runs to a good end: the same command again whenever it says that it may be given again.
    pub(crate) fn finish(&mut self) -> anyhow::Result<()> {
        let watch = Stopwatch::start();
        loop {
            self.refill()?;
            let last = self.lives.len() - 1;
            match self.ended(last)?.map(|status| status.code()) {
                Some(Some(0)) => return Ok(()),
                Some(Some(TRY_AGAIN) | None) => drop(self.coordinate(&[])?),
                Some(Some(code)) => {
                    anyhow::bail!("the run ended with {code}:\n{}", self.tail())
                }
                None => std::thread::sleep(GLANCE),
            }
            anyhow::ensure!(!super::interrupted(), "interrupted");
            anyhow::ensure!(
                watch.elapsed() < PATIENCE,
                "the run did not end within {PATIENCE:?}:\n{}\n{}",
                self.tail(),
                self.worker_tail()
            );
        }
    }

    /// What coordinator `life` logged so far.
    pub(crate) fn said(&self, life: usize) -> Vec<Said> {
        let text = std::fs::read_to_string(&self.lives[life].log).unwrap_or_default();
        text.lines().filter_map(moment::parse).collect()
    }

    /// What all coordinators logged, as it stands there.
    pub(crate) fn said_of_all(&self) -> String {
        let text = |life: &Life| std::fs::read_to_string(&life.log).unwrap_or_default();
        self.lives.iter().map(text).collect()
    }

    /// The last lines of the last coordinators.
    pub(crate) fn tail(&self) -> String {
        let last = self.lives.len().saturating_sub(2);
        let mut tail = String::new();
        for life in &self.lives[last..] {
            for log in [life.log.clone(), life.log.with_extension("out")] {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                tail.push_str(&format!("{}:\n", log.display()));
                tail.push_str(&lines[lines.len().saturating_sub(15)..].join("\n"));
                tail.push('\n');
            }
        }
        tail
    }

    /// How often each COMMIT was won, by what workers say of their own puts.
    pub(crate) fn wins(&self) -> anyhow::Result<BTreeMap<String, u32>> {
        let mut wins = BTreeMap::new();
        for number in 0..self.hired {
            let log = self.folder.path().join(format!("w{number}.log"));
            let text = std::fs::read_to_string(log)?;
            let puts = text.lines().filter(|line| line.contains("put a COMMIT"));
            for line in puts.filter(|line| line.contains("outcome=Won")) {
                let key = line.split("key=").nth(1).context("a put without a key")?;
                let key = key.split_whitespace().next().unwrap_or_default();
                *wins.entry(key.to_owned()).or_default() += 1;
            }
        }
        Ok(wins)
    }

    /// Shards whose COMMIT a worker has put or found there, by what it says itself.
    pub(crate) fn shards_put_by(&self, worker: &str) -> anyhow::Result<BTreeSet<u64>> {
        let log = self.folder.path().join(format!("{worker}.log"));
        let text = std::fs::read_to_string(log)?;
        let puts = text.lines().filter(|line| line.contains("put a COMMIT"));
        let done = puts.filter(|line| {
            ["outcome=Won", "outcome=Lost"]
                .iter()
                .any(|o| line.contains(o))
        });
        let shard = |line: &str| {
            let (_, rest) = line.split_once("/shard-")?;
            rest.split('/').next()?.parse().ok()
        };
        Ok(done.filter_map(shard).collect())
    }

    /// Gives a command to the coordinator's program; what it complains of, if it does.
    pub(crate) fn ask(&self, arguments: &[&str]) -> anyhow::Result<Option<String>> {
        let mut command = self.wrapped("coordinator", &self.wrap.coordinator);
        let output = command.args(arguments).output().context("a request")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((!output.status.success()).then_some(said))
    }

    /// Pids of this run's engines whose worker is `worker`.
    pub(crate) fn engines(&self) -> Vec<u32> {
        self.run.processes_of(Target::Engine)
    }

    /// The engine that worker `at` started, if it has one.
    pub(crate) fn engine_of(&self, at: usize) -> Option<u32> {
        let parent = self.workers[at].child.id();
        let children = format!("/proc/{parent}/task/{parent}/children");
        let of_main = std::fs::read_to_string(children).unwrap_or_default();
        let own = of_main.split_whitespace().find_map(|pid| pid.parse().ok());
        own.or_else(|| {
            self.engines()
                .into_iter()
                .find(|&pid| is_child(pid, parent))
        })
    }

    /// What the workers logged last.
    pub(crate) fn worker_tail(&self) -> String {
        let mut tail = String::new();
        for worker in &self.workers {
            let text = std::fs::read_to_string(&worker.log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            tail.push_str(&lines[lines.len().saturating_sub(8)..].join("\n"));
            tail.push('\n');
        }
        tail
    }

    /// Looks until there is something to see.
    pub(crate) fn await_some<T>(
        &self,
        look: impl Fn() -> Option<T>,
        what: &str,
    ) -> anyhow::Result<T> {
        let watch = Stopwatch::start();
        loop {
            if let Some(found) = look() {
                return Ok(found);
            }
            anyhow::ensure!(!super::interrupted(), "interrupted");
            anyhow::ensure!(
                watch.elapsed() < PATIENCE,
                "no {what} after {PATIENCE:?}:\n{}",
                self.tail()
            );
            std::thread::sleep(GLANCE);
        }
    }

    /// Asks the auditor; its complaint when it has one.
    pub(crate) fn audit(&self, undisturbed: Option<&str>) -> anyhow::Result<Option<String>> {
        match undisturbed {
            Some(other) => self.audited(&["--against", other]),
            None => self.audited(&[]),
        }
    }

    /// The same of a run that may be under way.
    pub(crate) fn audit_unfinished(&self) -> anyhow::Result<Option<String>> {
        self.audited(&["--unfinished"])
    }

    fn audited(&self, arguments: &[&str]) -> anyhow::Result<Option<String>> {
        // From the coordinator's host: the store may be out of our reach.
        let mut command = self.wrapped("audit", &self.wrap.coordinator);
        command.arg(self.output()).arg("--quiet").args(arguments);
        let output = command.output().context("the auditor")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        Ok((!output.status.success()).then(|| said + &errors))
    }

    /// Keeps the folder for whoever looks for what went wrong.
    pub(crate) fn keep(&self) -> PathBuf {
        let kept = self.folder.path().with_extension("kept");
        // Whoever looks finds nothing then; the violation was told all the same.
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
        for worker in &mut self.workers {
            // A stopped process is killed as well; one that has ended is no error.
            let _ = worker.child.kill();
            let _ = worker.child.wait();
        }
        for life in &mut self.lives {
            let _ = life.child.kill();
            let _ = life.child.wait();
        }
        // Engines end when their worker's socket closes, but for stopped ones.
        for pid in self.engines() {
            let _ = signal(pid, "KILL");
        }
    }
}

fn is_child(pid: u32, parent: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    line.is_some_and(|found| found.trim() == parent.to_string())
}
