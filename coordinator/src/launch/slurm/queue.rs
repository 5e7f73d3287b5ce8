//! What squeue says: one line for each job, in a form that every version of Slurm prints alike.

use std::fmt;

/// The columns: id, state, reason, nodes, start.
pub(super) const FORMAT: &str = "%i|%T|%r|%N|%S";

/// One element of an array, as squeue names it: `12_0`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct JobId(String);

impl JobId {
    /// Element `index` of array `array`.
    pub(super) fn element(array: &str, index: u32) -> Self {
        Self(format!("{array}_{index}"))
    }

    /// The id of the job whose worker has this name (`slurm-12_0`, or `slurm-12_0.1` for its second device); none for
    /// workers that others started.
    pub(super) fn of_worker(name: &str) -> Option<Self> {
        let id = name.strip_prefix(NAME_PREFIX)?;
        let id = id.split('.').next().unwrap_or(id);
        Some(Self(id.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// In front of the job's id in the name of its worker.
pub(super) const NAME_PREFIX: &str = "slurm-";

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a job is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// In the queue; however long that takes, it is no failure.
    Waiting,
    /// In the queue, and it will stay there: Slurm could not start it and holds it.
    Held,
    /// On a node, or on its way to or from one.
    Running,
    /// Over, and how, in Slurm's word.
    Ended(String),
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) id: JobId,
    pub(super) state: State,
    /// Why it waits, in Slurm's word; `None` when it does not.
    pub(super) reason: String,
    /// Where it runs or ran.
    pub(super) nodes: String,
}

impl Job {
    /// Whether it will still work, or does.
    pub(super) fn is_live(&self) -> bool {
        match self.state {
            State::Waiting | State::Running => true,
            State::Held | State::Ended(_) => false,
        }
    }
}

/// States from which a job does not come back. All others count as alive: a job that is requeued passes through
/// `COMPLETING`, and words that later versions add must not make us submit twice.
const OVER: [&str; 11] = [
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "REVOKED",
    "LAUNCH_FAILED",
];

/// Reads the output of `squeue -h -r -o FORMAT`; lines that are none are left out.
pub(super) fn parse(text: &str) -> Vec<Job> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Job> {
    let mut columns = line.trim().split('|');
    let (id, state) = (columns.next()?, columns.next()?);
    let (reason, nodes) = (columns.next()?, columns.next()?);
    let is_id = id.starts_with(|c: char| c.is_ascii_digit());
    is_id.then(|| Job {
        id: JobId(id.to_owned()),
        state: read_state(state, reason),
        reason: reason.to_owned(),
        nodes: nodes.to_owned(),
    })
}

fn read_state(state: &str, reason: &str) -> State {
    // `launch failed requeued held` in one version, `launch_failed_requeued_held` in another.
    let reason = reason.to_ascii_lowercase().replace('_', " ");
    let is_held = reason.contains("launch failed") || reason == "jobholdmaxrequeue";
    match state {
        over if OVER.contains(&over) => State::Ended(over.to_owned()),
        "PENDING" | "REQUEUE_HOLD" | "SPECIAL_EXIT" if is_held => State::Held,
        "PENDING" | "REQUEUED" | "REQUEUE_FED" | "REQUEUE_HOLD" | "SPECIAL_EXIT" => State::Waiting,
        _ => State::Running,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of Slurm 22.05, taken down from a cluster.
    #[test]
    fn lines_of_squeue_are_read() {
        let text = "5_0|RUNNING|None|n1|2026-11-26T10:00:00\n\
                    5_1|PENDING|BeginTime||N/A\n\
                    5_2|COMPLETING|None|n2|2026-11-26T10:00:00\n\
                    5_3|PENDING|launch failed requeued held||N/A\n\
                    5_4|NODE_FAIL|NodeDown|n3|2026-11-26T10:00:00\n\
                    5_5|SOMETHING_NEW|None|n4|N/A\n\
                    slurm_load_jobs error: noise\n";
        let jobs = parse(text);
        let states: Vec<_> = jobs.iter().map(|job| job.state.clone()).collect();
        let expected = [
            State::Running,
            State::Waiting,
            State::Running,
            State::Held,
            State::Ended("NODE_FAIL".into()),
            State::Running,
        ];
        assert_eq!(states, expected);
        assert_eq!(jobs[0].id, JobId::element("5", 0));
        assert_eq!(
            (jobs[1].reason.as_str(), jobs[0].nodes.as_str()),
            ("BeginTime", "n1")
        );
        let live: Vec<_> = jobs.iter().map(Job::is_live).collect();
        assert_eq!(live, [true, true, true, false, false, true]);
    }

    #[test]
    fn a_worker_is_found_by_its_name() {
        let of = |name| JobId::of_worker(name).map(|id| id.to_string());
        assert_eq!(of("slurm-5_1").as_deref(), Some("5_1"));
        assert_eq!(of("slurm-5_1.3").as_deref(), Some("5_1"));
        assert_eq!(of("local-1"), None);
    }
}
