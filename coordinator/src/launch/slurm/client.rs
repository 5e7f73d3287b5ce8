//! Slurm's own programs, each call with an end: a controller that is away lets them hang.

use std::ffi::OsString;
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
/// What a submission is refused with for as long as a limit is reached, a queue is full or nodes are away; the controller
/// took nothing.
const FOR_NOW: [&str; 8] = [
    "temporarily unable to accept job",
    "Resource temporarily unavailable",
    "job queue full",
    "Unable to create job record, try again",
    "partition not available",
    "node not available",
    "nodes are busy",
    "SubmitJob",
];
/// What a submission is refused with that goes beyond a limit: on how many jobs there are, or on the job itself.
const POLICY: &str = "violates accounting/QOS policy";
/// Variables that a job must not have of us whatever they hold, since sbatch hands its environment on: secrets, and this
/// host's GPUs.
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
    /// Slurm said no, and may say yes later: a limit is reached that others share, or a queue is full.
    #[error("{0}")]
    ForNow(String),
    /// Slurm said no.
    #[error("{0}")]
    Refused(String),
}

/// What a program that failed said, sorted.
fn sort(said: &str) -> Trouble {
    // The line before names the limit, where Slurm says which: `AssocMaxSubmitJobLimit`, `QOSMaxWallDurationPerJobLimit`.
    let mut words = said.split(|c: char| !c.is_ascii_alphanumeric());
    let is_limit = |word: &str| word.ends_with("Limit") || word.ends_with("PerJob");
    let is_of_the_job = words.any(|word| is_limit(word) && !word.contains("Submit"));
    let owned = said.to_owned();
    if FOR_NOW.iter().any(|words| said.contains(words)) || (said.contains(POLICY) && !is_of_the_job)
    {
        Trouble::ForNow(owned)
    } else if AWAY.iter().any(|words| said.contains(words)) {
        Trouble::Away(owned)
    } else {
        Trouble::Refused(owned)
    }
}

/// The jobs of one name and one user.
#[derive(Debug, Clone)]
pub(super) struct Client {
    /// Name of the jobs.
    pub(super) name: String,
    /// Whose they are.
    pub(super) user: u32,
    /// Variables of ours that hold the token.
    withheld: Vec<OsString>,
}

impl Client {
    /// The jobs of this name that are ours. What is submitted has none of the variables `withheld`.
    pub(super) fn of(name: String, withheld: Vec<OsString>) -> io::Result<Self> {
        let user = std::fs::metadata("/proc/self")?.uid();
        Ok(Self {
            name,
            user,
            withheld,
        })
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
        let text = self.call("squeue", &arguments).await?;
        Ok(queue::parse(&text))
    }

    /// Submits `count` jobs of the script in the file at `script`; gives the array's id.
    pub(super) async fn submit(&self, script: &Path, count: u32) -> Result<String, Trouble> {
        let array = format!("--array=0-{}", count.saturating_sub(1));
        let script = script.display().to_string();
        let text = self
            .call("sbatch", &["--parsable", &array, &script])
            .await?;
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
        self.call("scancel", &ids).await.map(drop)
    }

    /// The same for all of them, those too that nobody knows of.
    pub(super) async fn cancel_all(&self) -> Result<(), Trouble> {
        let user = format!("--user={}", self.user);
        let name = format!("--name={}", self.name);
        self.call("scancel", &[&user, &name]).await.map(drop)
    }

    async fn call(&self, program: &str, arguments: &[&str]) -> Result<String, Trouble> {
        call(program, arguments, &self.withheld).await
    }
}

async fn call(program: &str, arguments: &[&str], withheld: &[OsString]) -> Result<String, Trouble> {
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
        if is_foreign(&text) || OURS.contains(&text.as_ref()) || withheld.contains(&name) {
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
    Err(sort(&said))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As sbatch 22.05 and 24.05 say it, on one line.
    #[test]
    fn what_passes_is_told_from_what_does_not() {
        let policy = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)";
        let failed = |why: &str| format!("sbatch: error: Batch job submission failed: {why}");
        let for_now = [
            format!("sbatch: error: QOSMaxSubmitJobPerUserLimit; {policy}"),
            format!("sbatch: error: AssocMaxSubmitJobLimit; {policy}"),
            format!("sbatch: error: AssocGrpSubmitJobsLimit; {policy}"),
            policy.to_owned(),
            failed("Resource temporarily unavailable"),
            "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying".into(),
            "sbatch: error: Slurm job queue full, sleeping and retrying".into(),
            failed("Required partition not available (inactive or drain)"),
        ];
        for said in for_now {
            assert_eq!(sort(&said), Trouble::ForNow(said.clone()));
        }
        let away = [
            failed("Unable to contact slurm controller (connect failure)"),
            failed("Socket timed out on send/recv operation"),
        ];
        for said in away {
            assert_eq!(sort(&said), Trouble::Away(said.clone()));
        }
        let refused = [
            failed("Invalid account or account/partition combination specified"),
            failed("Invalid partition specified: nowhere"),
            failed("Invalid qos specification"),
            failed("Invalid generic resource (gres) specification"),
            failed("Requested node configuration is not available"),
            format!("sbatch: error: QOSMaxWallDurationPerJobLimit; {policy}"),
            format!("sbatch: error: AssocMaxNodePerJobLimit; {policy}"),
            format!("sbatch: error: QOSMaxGRESPerJob; {policy}"),
        ];
        for said in refused {
            assert_eq!(sort(&said), Trouble::Refused(said.clone()));
        }
    }
}
