//! pyarrow beside us: a process that reads and writes the same rows when it is told to.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result};
use distillery_tests::harness::repository;

/// The interpreter that `PYTHON` names, with pyarrow loaded.
pub(crate) struct Pyarrow {
    process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// pyarrow's version.
    pub(crate) version: String,
}

impl Pyarrow {
    /// Starts it for the rows of `file`; `out` is where it writes.
    ///
    /// # Errors
    /// There is no such interpreter, or it has no pyarrow.
    pub(crate) fn start(file: &Path, out: &Path) -> Result<Self> {
        let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
        let wanted = || format!("PYTHON is {python:?}; it must name a Python with pyarrow");
        let mut process = Command::new(&python)
            .arg(repository().join("tests/python/bench_pyarrow.py"))
            .args([file, out])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(wanted)?;
        let requests = process.stdin.take().context("its input is piped")?;
        let output = process.stdout.take().context("its output is piped")?;
        let mut started = Self {
            process,
            requests,
            answers: BufReader::new(output),
            version: String::new(),
        };
        started.version = started.answer().with_context(wanted)?;
        Ok(started)
    }

    /// Seconds for the states and predictions of the file.
    pub(crate) fn read(&mut self) -> Result<f64> {
        self.ask("read")
    }

    /// Seconds for all rows into a new file, and onto the disk.
    pub(crate) fn write(&mut self) -> Result<f64> {
        self.ask("write")
    }

    fn ask(&mut self, request: &str) -> Result<f64> {
        writeln!(self.requests, "{request}").context("pyarrow is gone")?;
        let answer = self.answer()?;
        answer
            .parse()
            .with_context(|| format!("pyarrow answered {answer:?}"))
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        anyhow::ensure!(line.ends_with('\n'), "it ended without an answer");
        Ok(line.trim().to_owned())
    }
}

impl Drop for Pyarrow {
    fn drop(&mut self) {
        // It holds nothing worth an orderly end.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
