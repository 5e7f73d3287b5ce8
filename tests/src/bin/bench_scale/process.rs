//! A real coordinator in a process of its own, and what `/proc` says about it.

use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use distillery_tests::harness::{EngineKind, Run, Target};

/// How long it may take to be there.
const PATIENCE: Duration = Duration::from_secs(600);
/// Ticks of `/proc/<pid>/stat` in a second, on every Linux that we know.
const TICKS: f64 = 100.0;

/// A run whose workers are ours.
#[derive(Debug)]
pub(crate) struct Coordinator {
    pub(crate) run: Run,
    pub(crate) pid: u32,
}

/// A run of `tasks` tasks in `folder`, not yet started.
pub(crate) fn run(folder: &Path, tasks: u64) -> Result<Run> {
    let recipe = include_str!("../../../recipes/scale.yaml").replace("{tasks}", &tasks.to_string());
    let run = Run::new(folder, &recipe, EngineKind::Sim)?;
    Ok(run.with("RUST_LOG", "info"))
}

impl Coordinator {
    /// Starts `run`, and waits until it can be joined.
    pub(crate) fn start(mut run: Run) -> Result<Self> {
        let join = run.output().join("join");
        if join.exists() {
            // It is of an earlier life.
            std::fs::remove_file(&join)?;
        }
        run.start()?;
        run.read_when_there(&join, PATIENCE)?;
        let pid = run.await_process(Target::Coordinator, PATIENCE)?;
        Ok(Self { run, pid })
    }

    /// Kills it, and gives back the run, which can be started again.
    pub(crate) fn kill(mut self) -> Result<Run> {
        self.run.kill(Target::All, 0)?;
        self.run.wait(PATIENCE)?;
        Ok(self.run)
    }

    /// Starts `workers` simulated workers against it, in a process of their own; `more` are further arguments.
    pub(crate) fn fleet(&self, workers: u32, seconds: u64, more: &[&str]) -> Result<Fleet> {
        let output = self.run.output();
        let mut child = self
            .run
            .command("sim-fleet")
            .arg("--join")
            .arg(format!("@{}", output.join("join").display()))
            .arg("--run")
            .arg(&output)
            .args(["--workers", &workers.to_string()])
            .args(["--seconds", &seconds.to_string()])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .context("sim-fleet cannot be started")?;
        let output = child.stdout.take().context("its output is piped")?;
        Ok(Fleet {
            child,
            lines: std::io::BufReader::new(output),
        })
    }

    /// The log, as long as the process wrote one.
    pub(crate) fn log(&self) -> PathBuf {
        self.run.output().with_file_name("coordinator.log")
    }
}

/// A `sim-fleet`.
#[derive(Debug)]
pub(crate) struct Fleet {
    child: Child,
    lines: std::io::BufReader<ChildStdout>,
}

impl Fleet {
    /// Its next line.
    pub(crate) fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut self.lines, &mut line)?;
        ensure!(line.ends_with('\n'), "sim-fleet ended without an answer");
        Ok(line.trim().to_owned())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // It holds nothing worth an orderly end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Seconds of processor time that a process has used.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("a name in parentheses")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("too short")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) / TICKS)
}

/// MiB of memory: `VmRSS` now, `VmHWM` at most.
pub(crate) fn memory_mib(pid: u32, field: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
    Ok(kib.context("no such field")?.parse::<f64>()? / 1024.0)
}

/// Milliseconds from the start of the last life in `log` to its first grant, once it is there.
pub(crate) fn first_grant_ms(run: &Run, log: &Path, lives: usize) -> Result<f64> {
    let look = || {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let mut grants = text.lines().filter(|line| line.contains("first grant"));
        let last = grants.nth(lives - 1)?;
        last.rsplit_once("elapsed_ms=")?.1.trim().parse().ok()
    };
    run.await_some(look, "first grant", PATIENCE)
}
