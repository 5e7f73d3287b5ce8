//! Starts the real programs, kills them, and tells whether two runs made the same things.
//!
//! Every process of a run inherits a mark in its environment, by which all of them are found in `/proc`, however
//! deep they are and whoever their parent is by now.

use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::seed::Stream;
use distillery_common::telemetry::Stopwatch;

mod made;
mod page;

pub use self::made::Made;
pub use self::page::get;

/// The variable that marks a run's processes.
const MARK: &str = "DISTILLERY_TEST_RUN";
/// Pause between two looks at something that is awaited.
const GLANCE: Duration = Duration::from_millis(10);

/// Which engine works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// The stand-in.
    Sim,
    /// The real one.
    Real,
}

impl EngineKind {
    /// Name of its program.
    pub fn program(self) -> &'static str {
        match self {
            Self::Sim => "sim-engine",
            Self::Real => "engine",
        }
    }
}

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The coordinator.
    Coordinator,
    /// One worker.
    Worker,
    /// One engine.
    Engine,
    /// Every process of the run.
    All,
}

impl Target {
    /// All targets.
    pub const ALL: [Self; 4] = [Self::Coordinator, Self::Worker, Self::Engine, Self::All];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::Engine => "engine",
            Self::All => "all",
        }
    }
}

/// The folder of the built programs: where this program lies, or one above when it is a test.
pub fn programs() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().context("a program lies in a folder")?;
    let folder = if folder.ends_with("deps") {
        folder.parent().context("target/release is above deps")?
    } else {
        folder
    };
    for name in ["coordinator", "worker"] {
        let path = folder.join(name);
        anyhow::ensure!(
            path.is_file(),
            "{} is not built; run `cargo build --release -p distillery-coordinator -p distillery-worker -p distillery-tests`",
            path.display()
        );
    }
    Ok(folder.to_owned())
}

/// The root of this repository.
pub fn repository() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().expect("this crate lies in the repository")
}

/// The recipe that the stand-in works on.
pub fn sim_recipe() -> &'static str {
    include_str!("../recipes/sim.yaml")
}

/// A kill.
#[derive(Debug, Clone)]
pub struct Hurt {
    /// What was aimed at.
    pub target: Target,
    /// Time since the last start or kill.
    pub at: Duration,
    /// How many processes it ended.
    pub killed: usize,
    /// The stage that had last left something in the store.
    pub stage: String,
}

/// One run in a folder of its own.
#[derive(Debug)]
pub struct Run {
    folder: PathBuf,
    recipe: PathBuf,
    engine: EngineKind,
    programs: PathBuf,
    mark: String,
    variables: Vec<(String, String)>,
    json: bool,
    child: Option<Child>,
}

impl Run {
    /// A run of `recipe` (its text) in `folder`, which must exist and be empty. `{repository}` in the text becomes
    /// the root of this repository.
    pub fn new(folder: &Path, recipe: &str, engine: EngineKind) -> anyhow::Result<Self> {
        let path = folder.join("recipe.yaml");
        let repository = repository().display().to_string();
        std::fs::write(&path, recipe.replace("{repository}", &repository))?;
        Self::of_file(folder, &path, engine)
    }

    /// A run in `folder` of the recipe in the file at `recipe`, whose own `output` does not count.
    pub fn of_file(folder: &Path, recipe: &Path, engine: EngineKind) -> anyhow::Result<Self> {
        let programs = programs()?;
        let engine_path = programs.join(engine.program());
        anyhow::ensure!(
            engine_path.is_file(),
            "{} is not built",
            engine_path.display()
        );
        Ok(Self {
            recipe: recipe.to_owned(),
            mark: format!("{}-{}", std::process::id(), folder.display()),
            folder: folder.to_owned(),
            engine,
            programs,
            variables: Vec::new(),
            json: false,
            child: None,
        })
    }

    /// Sets an environment variable of all its processes.
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.variables.push((name.to_owned(), value.to_string()));
        self
    }

    /// Asks the coordinator for JSON, which [`Run::result`] gives.
    pub fn with_json(mut self) -> Self {
        self.json = true;
        self
    }

    /// Where its objects are.
    pub fn output(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// The built program called `name`.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// A command whose process belongs to this run.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.program(program));
        command
            .env(MARK, &self.mark)
            .env("DISTILLERY_ENGINE", self.program(self.engine.program()))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        for (name, value) in &self.variables {
            command.env(name, value);
        }
        command
    }

    /// The command that starts it, resumes it, or attaches to it.
    pub fn run_command(&self) -> Command {
        let mut command = self.command("coordinator");
        command.arg("run").arg(&self.recipe).arg("--set");
        command.arg(format!("output={}", self.output().display()));
        if self.json {
            command.arg("--json");
        }
        command
    }

    /// Starts or resumes it.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let mut command = self.run_command();
        if self.json {
            command.stdout(File::create(self.result_path())?);
        } else {
            command.stdout(log.try_clone()?);
        }
        command.stderr(log);
        self.child = Some(command.spawn()?);
        Ok(())
    }

    fn result_path(&self) -> PathBuf {
        self.folder.join("result.json")
    }

    /// What the last coordinator wrote to standard output, with [`Run::with_json`].
    pub fn result(&self) -> anyhow::Result<serde_json::Value> {
        let text = std::fs::read_to_string(self.result_path())?;
        serde_json::from_str(&text).with_context(|| format!("{text:?} is no JSON"))
    }

    /// How the coordinator ended, if it has.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        match &mut self.child {
            Some(child) => Ok(child.try_wait()?),
            None => Ok(None),
        }
    }

    /// Waits for the coordinator to end.
    pub fn wait(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        let watch = Stopwatch::start();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            anyhow::ensure!(
                watch.elapsed() < patience,
                "the run did not end within {patience:?}:\n{}",
                self.log_tail()
            );
            std::thread::sleep(GLANCE);
        }
    }

    /// Runs to the end, which must be a good one.
    pub fn finish(&mut self, patience: Duration) -> anyhow::Result<()> {
        if self.child.is_none() {
            self.start()?;
        }
        let status = self.wait(patience)?;
        anyhow::ensure!(
            status.success(),
            "the run ended with {status}:\n{}",
            self.log_tail()
        );
        Ok(())
    }

    /// Its living processes with the names of their programs.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mark = format!("{MARK}={}", self.mark);
        let mut found = Vec::new();
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return found;
        };
        for entry in entries.flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            // A process that has ended but was not waited for has an empty environment.
            if environment
                .split(|&byte| byte == 0)
                .any(|line| line == mark.as_bytes())
            {
                let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                found.push((pid, name.trim().to_owned()));
            }
        }
        found.sort_unstable();
        found
    }

    /// Its living processes of one kind.
    pub fn processes_of(&self, target: Target) -> Vec<u32> {
        let wanted = match target {
            Target::Coordinator => "coordinator",
            Target::Worker => "worker",
            Target::Engine => self.engine.program(),
            Target::All => "",
        };
        let processes = self.processes().into_iter();
        let of_kind = |name: &str| wanted.is_empty() || name == wanted;
        processes
            .filter(|(_, name)| of_kind(name))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Kills one process of a kind, chosen by `pick`, or all of them; says how many were there to be killed.
    pub fn kill(&self, target: Target, pick: u32) -> anyhow::Result<usize> {
        let mut pids = self.processes_of(target);
        if target != Target::All && !pids.is_empty() {
            pids = vec![pids[pick as usize % pids.len()]];
        }
        for &pid in &pids {
            signal(pid, "KILL")?;
        }
        Ok(pids.len())
    }

    /// Waits for a process of a kind.
    pub fn await_process(&self, target: Target, patience: Duration) -> anyhow::Result<u32> {
        let found = || self.processes_of(target).first().copied();
        self.await_some(found, target.name(), patience)
    }

    /// The text of a file, once it is there and whole lines are in it.
    pub fn read_when_there(&self, path: &Path, patience: Duration) -> anyhow::Result<String> {
        let read = || {
            std::fs::read_to_string(path)
                .ok()
                .filter(|text| text.ends_with('\n'))
        };
        self.await_some(read, &path.display().to_string(), patience)
    }

    /// Waits for a file or folder.
    pub fn await_path(&self, path: &Path, patience: Duration) -> anyhow::Result<()> {
        let found = || path.exists().then_some(());
        self.await_some(found, &path.display().to_string(), patience)
    }

    /// Looks until there is something to see.
    pub fn await_some<T>(
        &self,
        look: impl Fn() -> Option<T>,
        what: &str,
        patience: Duration,
    ) -> anyhow::Result<T> {
        let watch = Stopwatch::start();
        loop {
            if let Some(found) = look() {
                return Ok(found);
            }
            anyhow::ensure!(
                watch.elapsed() < patience,
                "no {what} after {patience:?}:\n{}",
                self.log_tail()
            );
            std::thread::sleep(GLANCE);
        }
    }

    /// Kills each of `targets` in turn at a random moment of what is left of `length`, starts the same command
    /// again whenever the coordinator is gone, and runs to a good end. Gives what was killed and when.
    pub fn kill_and_finish(
        &mut self,
        stream: &mut Stream,
        targets: &[Target],
        length: Duration,
        patience: Duration,
    ) -> anyhow::Result<Vec<Hurt>> {
        let share = length / targets.len().max(1) as u32;
        let mut hurts = Vec::new();
        self.start()?;
        for &target in targets {
            let at = share.mul_f64(f64::from(stream.below(1000)) / 1000.0);
            std::thread::sleep(at);
            hurts.push(self.hurt(target, at, stream.next_u32(), patience)?);
        }
        self.finish(patience)?;
        Ok(hurts)
    }

    /// Kills a process of a kind, chosen by `pick`, now, which is `at` after the last start or kill, and starts the same
    /// command again if the coordinator is gone.
    pub fn hurt(
        &mut self,
        target: Target,
        at: Duration,
        pick: u32,
        patience: Duration,
    ) -> anyhow::Result<Hurt> {
        let stage = self.stage_at_work();
        let mut killed = self.kill(target, pick)?;
        if matches!(target, Target::Coordinator | Target::All) {
            let status = self.wait(patience)?;
            // One that had ended of itself was not killed.
            if status.signal().is_none() {
                killed = 0;
            }
            self.no_orphans(patience)?;
            self.start()?;
        }
        Ok(Hurt {
            target,
            at,
            killed,
            stage,
        })
    }

    /// The last stage that has left something in the store.
    fn stage_at_work(&self) -> String {
        let folders = |path: &str| -> Vec<(std::time::SystemTime, String)> {
            let entries = std::fs::read_dir(self.output().join(path)).into_iter();
            let named = entries.flatten().flatten().filter_map(|entry| {
                let made = entry.metadata().ok()?.modified().ok()?;
                Some((made, entry.file_name().to_string_lossy().into_owned()))
            });
            named.collect()
        };
        let mut stages = folders("checkpoints");
        stages.extend(folders("tasks"));
        stages.sort();
        stages
            .pop()
            .map_or_else(|| "trajectories".into(), |(_, name)| name)
    }

    /// How many objects called `name` there are, and in how many folders.
    pub fn count_objects(&self, name: &str) -> anyhow::Result<(usize, usize)> {
        let mut found = Vec::new();
        let mut folders = vec![self.output()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else if entry.file_name().to_string_lossy().starts_with(name) {
                    found.push(folder.clone());
                }
            }
        }
        let objects = found.len();
        found.sort();
        found.dedup();
        Ok((objects, found.len()))
    }

    /// Waits until no process of it is left, as must be soon after its coordinator has ended.
    pub fn no_orphans(&self, patience: Duration) -> anyhow::Result<()> {
        let watch = Stopwatch::start();
        loop {
            let left = self.processes();
            if left.is_empty() {
                return Ok(());
            }
            anyhow::ensure!(
                watch.elapsed() < patience,
                "processes are left after {patience:?}: {left:?}"
            );
            std::thread::sleep(GLANCE);
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // A test that failed in between must not leave anything running.
        let _ = self.kill(Target::All, 0);
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }
}

/// Sends a signal by its name.
pub fn signal(pid: u32, name: &str) -> io::Result<()> {
    // A process that has just ended is no error: it is gone either way.
    Command::new("sh")
        .args(["-c", &format!("kill -{name} {pid}")])
        .stderr(Stdio::null())
        .status()
        .map(drop)
}
