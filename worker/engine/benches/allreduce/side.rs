//! One of the two sides: a process for each rank. A request is a line to all of them, and each answers with a line.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// The processes of one side.
pub(crate) struct Side {
    name: &'static str,
    ranks: Vec<Rank>,
    /// Where Gloo's ranks find each other.
    _meeting: Option<tempfile::TempDir>,
}

struct Rank {
    process: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Side {
    /// This program again, once per rank.
    pub(crate) fn ours(world: u32) -> Result<Self> {
        let start = |rank: u32| {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--rank", &rank.to_string(), "--world", &world.to_string()]);
            Rank::start("the ring", command)
        };
        let mut side = Self {
            name: "the ring",
            ranks: (0..world).map(start).collect::<Result<_>>()?,
            _meeting: None,
        };
        let addresses = side.hear()?;
        side.say(&addresses.join(" "))?;
        side.hear()?;
        Ok(side)
    }

    /// PyTorch's process groups over Gloo, by the interpreter that `PYTHON` names.
    pub(crate) fn gloo(world: u32) -> Result<Self> {
        let mut python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
        if Path::new(&python).components().count() > 1 {
            // Cargo runs benchmarks in the crate's folder; paths are written from where `make` is.
            python = root().join(&python).into();
        }
        let meeting = tempfile::tempdir().context("a temporary folder")?;
        let start = |rank: u32| {
            let mut command = Command::new(&python);
            command
                .arg(root().join("tests/python/bench_gloo.py"))
                .args([rank.to_string(), world.to_string()])
                .arg(meeting.path().join("store"))
                .env("GLOO_SOCKET_IFNAME", "lo");
            Rank::start("Gloo", command)
                .with_context(|| format!("PYTHON is {python:?}; it must name a Python with torch"))
        };
        let mut side = Self {
            name: "Gloo",
            ranks: (0..world).map(start).collect::<Result<_>>()?,
            _meeting: Some(meeting),
        };
        side.hear()?;
        Ok(side)
    }

    /// Asks all ranks; the largest number that they answer.
    pub(crate) fn ask(&mut self, request: &str) -> Result<f64> {
        self.say(request)?;
        let answers = self.hear()?;
        let mut largest = f64::NEG_INFINITY;
        for answer in answers {
            let number: f64 = answer
                .parse()
                .with_context(|| format!("{} answered `{answer}`", self.name))?;
            largest = largest.max(number);
        }
        Ok(largest)
    }

    fn say(&mut self, line: &str) -> Result<()> {
        for rank in &mut self.ranks {
            let requests = rank.requests.as_mut().context("requests are piped")?;
            writeln!(requests, "{line}")
                .and_then(|()| requests.flush())
                .with_context(|| format!("{} ended; what it said stands above", self.name))?;
        }
        Ok(())
    }

    fn hear(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        for rank in &mut self.ranks {
            let mut line = String::new();
            let bytes = rank.answers.read_line(&mut line)?;
            ensure!(bytes > 0, "{} ended; what it said stands above", self.name);
            lines.push(line.trim().to_owned());
        }
        Ok(lines)
    }
}

impl Rank {
    fn start(name: &'static str, mut command: Command) -> Result<Self> {
        let mut process = command
            // The sum is no work for a pool of threads, on either side.
            .env("OMP_NUM_THREADS", "1")
            .env("MKL_NUM_THREADS", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        let requests = process.stdin.take();
        let answers = process.stdout.take().context("its output is piped")?;
        Ok(Self {
            process,
            requests,
            answers: BufReader::new(answers),
        })
    }
}

impl Drop for Side {
    /// The end of its requests is the end of a rank.
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            drop(rank.requests.take());
        }
        for rank in &mut self.ranks {
            let _ = rank.process.wait();
        }
    }
}

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
