//! What a run needs of a host and its surroundings, looked at before a run does: programs, devices, ports, names, limits,
//! schedulers of clusters. Each look is bounded in time, and changes nothing.

mod cluster;
mod host;

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// How long one look may take.
const LOOK: Duration = Duration::from_secs(5);

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// As it should be, or not needed.
    Well,
    /// A run may meet it.
    Warn,
    /// No run can do without it.
    Missing,
}

impl State {
    /// In one word, for people and programs.
    pub fn word(self) -> &'static str {
        match self {
            Self::Well => "ok",
            Self::Warn => "WARN",
            Self::Missing => "MISSING",
        }
    }
}

/// What was found of one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Of what.
    pub name: &'static str,
    /// How grave it is.
    pub state: State,
    /// What was seen.
    pub seen: String,
    /// What to do; empty where there is nothing to do.
    pub help: String,
}

impl Check {
    /// As it should be.
    pub fn well(name: &'static str, seen: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Well,
            seen: seen.into(),
            help: String::new(),
        }
    }

    /// A run may meet it.
    pub fn warn(name: &'static str, seen: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            state: State::Warn,
            help: help.into(),
            ..Self::well(name, seen)
        }
    }

    /// No run can do without it.
    pub fn missing(name: &'static str, seen: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            state: State::Missing,
            ..Self::warn(name, seen, help)
        }
    }
}

/// Looks at everything but the store; `engine` is where the engine's program should be.
pub async fn examine(engine: &std::path::Path) -> Vec<Check> {
    let mut checks = host::programs(engine).await;
    checks.extend(host::network().await);
    checks.push(host::files());
    checks.push(cluster::slurm().await);
    checks.push(cluster::kubernetes().await);
    checks
}

/// What a program of the host answers in time: its standard output, or why there is none. `None` where there is no such
/// program.
async fn answer(
    program: &str,
    arguments: &[&str],
    within: Duration,
) -> Option<Result<String, String>> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = match tokio::time::timeout(within, command.output()).await {
        Err(_) => return Some(Err(format!("no answer within {} s", within.as_secs()))),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Ok(Err(error)) => return Some(Err(error.to_string())),
        Ok(Ok(output)) => output,
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Some(if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        let said = text(&output.stderr);
        let first = said.lines().next().unwrap_or("it said nothing");
        Err(format!("{}: {first}", output.status))
    })
}
