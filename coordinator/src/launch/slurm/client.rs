//! Slurm's own programs, each call with an end: a controller that is away lets them hang.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::queue::{self, Job, JobId};

/// Longest that a call may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// What the programs say when they have not reached the controller, or have not heard its answer.
const AWAY: [&str; 7] = [
    "Unable to contact",
    "timed out",
    "Connection refused",
    "Zero Bytes",
    "temporarily",
    "Communication connection failure",
    "Unexpected message received",
];
/// Variables that a job must not have of us, since sbatch hands its environment on: our secrets, and this host's GPUs.
const OURS: [&str; 3] = [
    "DISTILLERY_TOKEN",
    "DISTILLERY_JOIN",
    "CUDA_VISIBLE_DEVICES",
];

/// Why a call gave nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Trouble {
    /// The controller is away, or its answer is; what was asked may have been done.
    #[error("{0}")]
    Away(String),
    /// Slurm said no.
    #[error("{0}")]
    Refused(String),
}

/// The jobs of one name and one user.
#[derive(Debug, Clone)]
pub(super) struct Client {
    /// Name of the jobs.
    pub(super) name: String,
    /// Whose they are.
    pub(super) user: u32,
}

impl Client {
    /// The jobs of this name that are ours.
    pub(super) fn of(name: String) -> io::Result<Self> {
        let user = std::fs::metadata("/proc/self")?.uid();
        Ok(Self { name, user })
    }

    /// Programs that are not on this host's path.
    pub(super) fn missing() -> Vec<&'static str> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders: Vec<_> = std::env::split_paths(&path).collect();
        let is_there = |program: &str| folders.iter().any(|folder| folder.join(program).is_file());
        let all = ["sbatch", "squeue", "scancel"].into_iter();
        all.filter(|program| !is_there(program)).collect()
    }

    /// The jobs in the queue, and those that ended lately.
    pub(super) async fn queue(&self) -> Result<Vec<Job>, Trouble> {
        let user = self.user.to_string();
        let arguments = [
            "-h",
            "-r",
            "-t",
            "all",
            "-o",
            queue::FORMAT,
            "-n",
            &self.name,
            "-u",
            &user,
        ];
        let text = call("squeue", &arguments).await?;
        Ok(queue::parse(&text))
    }

    /// Submits `count` jobs of the script in the file at `script`; gives the array's id.
    pub(super) async fn submit(&self, script: &Path, count: u32) -> Result<String, Trouble> {
        let array = format!("--array=0-{}", count.saturating_sub(1));
        let script = script.display().to_string();
        let text = call("sbatch", &["--parsable", &array, &script]).await?;
        // `id` or `id;cluster`.
        let id = text.trim().split(';').next().unwrap_or_default().to_owned();
        if id.is_empty() || !id.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Trouble::Away(format!("sbatch answered {:?}", text.trim())));
        }
        Ok(id)
    }

    /// Takes jobs out of the queue, or ends them.
    pub(super) async fn cancel(&self, ids: &[JobId]) -> Result<(), Trouble> {
        let ids: Vec<&str> = ids.iter().map(JobId::as_str).collect();
        call("scancel", &ids).await.map(drop)
    }

    /// The same for all of them, those too that nobody knows of.
    pub(super) async fn cancel_all(&self) -> Result<(), Trouble> {
        let user = format!("--user={}", self.user);
        let name = format!("--name={}", self.name);
        call("scancel", &[&user, &name]).await.map(drop)
    }
}

async fn call(program: &str, arguments: &[&str]) -> Result<String, Trouble> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    // A coordinator may be a job itself: what Slurm told that job must not become another's.
    let is_foreign = |name: &str| name.starts_with("SLURM_") && name != "SLURM_CONF";
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if is_foreign(&text) || OURS.contains(&text.as_ref()) {
            command.env_remove(&name);
        }
    }
    let output = match tokio::time::timeout(PATIENCE, command.output()).await {
        Err(_) => {
            let text = format!("{program} gave no answer within {} s", PATIENCE.as_secs());
            return Err(Trouble::Away(text));
        }
        Ok(Err(error)) => return Err(Trouble::Refused(format!("{program}: {error}"))),
        Ok(Ok(output)) => output,
    };
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().replace('\n', "; ");
    if AWAY.iter().any(|words| said.contains(words)) {
        return Err(Trouble::Away(said));
    }
    Err(Trouble::Refused(said))
}
