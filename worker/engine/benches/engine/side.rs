//! One of the two programs that are compared, as a child process: a request is a line, and so is its answer.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use distillery_engine::device::cpu_capability;
use serde::Deserialize;

use super::problem::{Work, root};

/// A program that answers.
#[derive(Debug)]
pub(crate) struct Side {
    name: &'static str,
    process: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

#[derive(Deserialize)]
struct Checked {
    values: Vec<f64>,
}

#[derive(Deserialize)]
struct Measured {
    seconds: f64,
}

impl Side {
    /// The engine: this program again, perhaps `pinned` to an instruction set as the worker pins its engines.
    pub(crate) fn ours(folder: &Path, threads: i32, pinned: bool) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--ours").arg(folder);
        if pinned {
            command.envs(steady_arithmetic());
        }
        Self::start("the engine", command, threads)
    }

    /// PyTorch, by the interpreter that `PYTHON` names.
    pub(crate) fn peer(folder: &Path, threads: i32) -> Result<Self> {
        let mut python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
        if Path::new(&python).components().count() > 1 {
            // Cargo runs benchmarks in the crate's folder; paths are written from where `make` is.
            python = root().join(&python).into();
        }
        let mut command = Command::new(&python);
        command
            .arg(root().join("tests/python/bench_reference.py"))
            .arg(folder)
            .env("HF_HUB_OFFLINE", "1");
        Self::start("the reference", command, threads)
            .with_context(|| format!("PYTHON is {python:?}; it must name a Python with torch 2.11.0, diffusers, transformers and peft"))
    }

    fn start(name: &'static str, mut command: Command, threads: i32) -> Result<Self> {
        let mut process = command
            .env("OMP_NUM_THREADS", threads.to_string())
            .env("MKL_NUM_THREADS", threads.to_string())
            // Threads that wait for each other sleep: where they spin, other programs on the machine make a step take
            // ten times as long, on one side or the other.
            .env("OMP_WAIT_POLICY", "PASSIVE")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        let requests = process.stdin.take();
        let answers = process.stdout.take().context("its output is piped")?;
        Ok(Self {
            name,
            process,
            requests,
            answers: BufReader::new(answers),
        })
    }

    /// The numbers that the other side must find too.
    pub(crate) fn check(&mut self, work: Work) -> Result<Vec<f64>> {
        let answer = self.ask("check", work)?;
        Ok(serde_json::from_str::<Checked>(&answer)?.values)
    }

    /// Seconds of one evaluation or step.
    pub(crate) fn measure(&mut self, work: Work) -> Result<f64> {
        let answer = self.ask("measure", work)?;
        Ok(serde_json::from_str::<Measured>(&answer)?.seconds)
    }

    fn ask(&mut self, what: &str, work: Work) -> Result<String> {
        let requests = self.requests.as_mut().context("requests are piped")?;
        let mut answer = String::new();
        // Where the program has ended, the request breaks on the pipe or the answer is empty: one message for both.
        let asked = writeln!(requests, "{what} {}", work.name()).and_then(|()| requests.flush());
        let read = asked.and_then(|()| self.answers.read_line(&mut answer));
        ensure!(
            read.is_ok_and(|bytes| bytes > 0),
            "{} ended before it answered `{what} {}`; what it said stands above",
            self.name,
            work.name()
        );
        Ok(answer)
    }
}

impl Drop for Side {
    /// The end of its requests is the end of the program.
    fn drop(&mut self) {
        drop(self.requests.take());
        let _ = self.process.wait();
    }
}

/// What the worker sets for its engines.
fn steady_arithmetic() -> [(&'static str, &'static str); 3] {
    match cpu_capability() {
        "avx2" => [
            ("ATEN_CPU_CAPABILITY", "avx2"),
            ("ONEDNN_MAX_CPU_ISA", "AVX2"),
            ("MKL_CBWR", "AVX2"),
        ],
        _ => [
            ("ATEN_CPU_CAPABILITY", "default"),
            ("ONEDNN_MAX_CPU_ISA", "SSE41"),
            ("MKL_CBWR", "COMPATIBLE"),
        ],
    }
}
