//! Batch scripts: for workers of one host each, for a coordinator in a job of its own, and for both in one job.
//!
//! A script outlives whoever submitted it, so it knows by itself what the exit codes of our programs ask for. Must
//! never hold a secret: the join string is in a file, of which only the path is here.

use std::path::PathBuf;

use distillery_common::recipe::slurm::{Devices, Slurm};

/// Times that a job may put itself back into the queue, for another turn after its time limit…
const REQUEUES: u32 = 50;
/// …and because it found no coordinator, for half an hour each time.
const DESERTED: u32 = 8;
/// Exit code of a worker that a signal made leave, so that another takes its place: what a shell says of a program that
/// SIGTERM ended. One that its coordinator drains ends with 0.
pub(super) const TOLD: i32 = 143;
/// Seconds before its time limit that a worker is told to leave: its grace for the work in hand, and time to report.
const WORKER_NOTICE_S: u32 = 60;
/// The same for a coordinator, which waits for its workers.
const HEAD_NOTICE_S: u32 = 180;

/// Seconds before its time limit that a job is told: not so many that little is left of a short one.
fn notice(slurm: &Slurm, usual_s: u32) -> u64 {
    let third = slurm.limit_s().map_or(u64::MAX, |limit| limit / 3);
    third.min(usual_s.into())
}

/// What a worker's job needs to know.
#[derive(Debug, Clone)]
pub struct Worker {
    /// Name of the jobs.
    pub name: String,
    /// The worker's program on the nodes.
    pub worker: PathBuf,
    /// The engine's program on the nodes.
    pub engine: PathBuf,
    /// File with the join string.
    pub join: PathBuf,
    /// Folder for how each job ended, and for logs unless `log` says otherwise.
    pub logs: PathBuf,
    /// Where the log of a job goes, as a pattern of sbatch.
    pub log: Option<String>,
    /// Jobs in the array, where the script says it itself.
    pub count: Option<u32>,
    /// CPU threads of one engine, if the recipe says so.
    pub threads: Option<u32>,
}

/// What a coordinator's job needs to know.
#[derive(Debug, Clone)]
pub struct Head {
    /// Name of the job.
    pub name: String,
    /// The coordinator's program on the nodes.
    pub coordinator: PathBuf,
    /// The recipe on the nodes.
    pub recipe: PathBuf,
    /// Values that are changed.
    pub sets: Vec<String>,
    /// Name of jobs that end when the run does.
    pub workers: Option<String>,
}

/// `text` as one word of a shell.
fn quoted(text: impl std::fmt::Display) -> String {
    format!("'{}'", text.to_string().replace('\'', r"'\''"))
}

/// Where the output of a job goes, as an option of sbatch and as a line of the script. A path that sbatch
/// would read in its own way is left to the shell.
fn output(logs: &std::path::Path) -> (String, &'static str) {
    let path = logs.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@,".contains(c);
    if path.chars().all(is_plain) {
        (format!("--output={path}/%A_%a.log"), "")
    } else {
        let line = "exec >>\"$logs/$job.log\" 2>&1\n";
        ("--output=/dev/null".into(), line)
    }
}

/// CPUs of a worker's job, where anybody says how many.
fn cpus(slurm: &Slurm, threads: Option<u32>) -> Option<u32> {
    let of_engines = || threads.map(|threads| threads.saturating_mul(slurm.engines()));
    slurm.cpus.or_else(of_engines)
}

/// `#SBATCH` lines, in which nobody finds a value that is not there.
struct Options(Vec<String>);

impl Options {
    /// Of a job that is put back into the queue when its node fails.
    fn new(name: &str, notice_s: u64) -> Self {
        Self(vec![
            format!("--job-name={name}"),
            "--requeue".into(),
            "--open-mode=append".into(),
            format!("--signal=B:USR1@{notice_s}"),
        ])
    }

    fn with(mut self, option: impl Into<String>) -> Self {
        self.0.push(option.into());
        self
    }

    fn maybe(self, name: &str, value: Option<impl std::fmt::Display>) -> Self {
        match value {
            Some(value) => self.with(format!("--{name}={value}")),
            None => self,
        }
    }

    /// Where jobs run and who pays.
    fn place(self, slurm: &Slurm) -> Self {
        self.maybe("partition", slurm.partition.as_deref())
            .maybe("account", slurm.account.as_deref())
            .maybe("qos", slurm.qos.as_deref())
            .maybe("time", slurm.time.as_deref())
    }

    /// What a worker needs.
    fn worker(mut self, slurm: &Slurm, threads: Option<u32>) -> Self {
        self = self
            .maybe("cpus-per-task", cpus(slurm, threads))
            .maybe("mem", slurm.memory.as_deref())
            .maybe("gres", slurm.gres.as_deref());
        self.0.extend(slurm.extra.iter().cloned());
        self
    }

    fn lines(&self) -> String {
        self.0
            .iter()
            .map(|option| format!("#SBATCH {option}\n"))
            .collect()
    }
}

/// The first part of a script: from here on it passes on what it is told. `$told` is then `term` when somebody ends the job,
/// or else `limit` shortly before the time limit, or nothing; `signal` is what the child is sent.
fn listen(signal: &str) -> String {
    format!(
        "\
told=
child=
trap '[ \"$told\" = term ] || told=limit; [ -z \"$child\" ] || kill -{signal} \"$child\"' USR1
trap 'told=term; [ -z \"$child\" ] || kill -{signal} \"$child\"' TERM
"
    )
}

/// The part of a script after a child was started: waits for it, however often a trap interrupts that. `$code` is then
/// the child's exit code.
fn keep(signal: &str) -> String {
    format!(
        "\
child=$!
[ -z \"$told\" ] || kill -{signal} \"$child\"
wait \"$child\"
while kill -0 \"$child\" 2>/dev/null; do
    wait \"$child\"
done
# The shell remembers how a child ended that was waited for.
wait \"$child\"
code=$?
child=
"
    )
}

/// Sets `$devices`.
fn devices(devices: &Devices) -> String {
    match devices {
        Devices::Auto => "\
# A step that was given GPUs sees them as 0, 1, …
devices=cpu
case ${CUDA_VISIBLE_DEVICES:-} in
'' | NoDevFiles | -1) ;;
*) devices=$(seq -s, 0 \"$(tr -dc , <<<\"$CUDA_VISIBLE_DEVICES\" | wc -c)\") ;;
esac
"
        .into(),
        Devices::Cpu | Devices::Gpus(_) => format!("devices={devices}\n"),
    }
}

/// Lines of the user's.
fn setup(slurm: &Slurm) -> String {
    slurm.setup.iter().map(|line| format!("{line}\n")).collect()
}

/// How srun starts workers: none of them ends another, and a lost node ends none.
const SRUN: &str = "--kill-on-bad-exit=0 --no-kill --wait=0";

/// Options of srun that the recipe gives, each a word with a space before it.
fn more_of_srun(slurm: &Slurm) -> String {
    let words = slurm.srun.iter();
    words.map(|word| format!(" {}", quoted(word))).collect()
}

/// `program` as words of a shell, within the container that the recipe names.
fn within(slurm: &Slurm, program: &std::path::Path) -> String {
    let words = slurm.container.iter();
    let words: String = words.map(|word| format!("{} ", quoted(word))).collect();
    words + &quoted(program.display())
}

/// One worker on one host: to be submitted as an array.
pub fn worker(slurm: &Slurm, worker: &Worker) -> String {
    let (output, redirect) = match &worker.log {
        Some(pattern) => (format!("--output={pattern}"), ""),
        None => output(&worker.logs),
    };
    let array = worker.count.map(|count| format!("0-{}", count.max(1) - 1));
    let options = Options::new(&worker.name, notice(slurm, WORKER_NOTICE_S))
        .maybe("array", array)
        .with("--nodes=1")
        .with("--ntasks=1")
        .place(slurm)
        .worker(slurm, worker.threads)
        .with(output);
    format!(
        "\
#!/bin/bash
{options}#
# A worker on one host. What its exit code asks for is done here, whoever submitted this and whether they still live.
# The files beside the log say which incarnation of this job is the last, and how it ended: a node that was cut off may
# still run an earlier one.
{listen}job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}_${{SLURM_ARRAY_TASK_ID:-0}}
restarts=${{SLURM_RESTART_COUNT:-0}}
logs={logs}
join={join}
# Who submitted this may be a moment ahead of who writes the join string.
for _ in {{1..300}}; do
    [ -s \"$join\" ] || [ -n \"$told\" ] && break
    sleep 2
done
mkdir -p -m 700 \"$logs\"
if [ ! -s \"$join\" ]; then
    echo \"there is no join string in $join: the coordinator has not started yet\"
    [ -z \"$told\" ] && [ \"$restarts\" -lt {DESERTED} ] && scontrol requeue \"$SLURM_JOB_ID\" && sleep 60
    exit 75
fi
{redirect}echo \"$restarts\" >\"$logs/$job.started\"
rm -f \"$logs/$job.ended\"
echo \"job $job, restarts $restarts, on $SLURM_JOB_NODELIST\"

{setup}{devices}
srun {SRUN} ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}}{more} \\
    {program} join --coordinator \"@$join\" --name \"slurm-$job\" --devices \"$devices\" \\
    --engine {engine} --signal-exit-code {TOLD} &
{keep}
{turns}",
        options = options.lines(),
        logs = quoted(worker.logs.display()),
        join = quoted(worker.join.display()),
        setup = setup(slurm),
        devices = devices(&slurm.devices),
        more = more_of_srun(slurm),
        program = within(slurm, &worker.worker),
        engine = quoted(worker.engine.display()),
        listen = listen("USR1"),
        keep = keep("USR1"),
        turns = turns(),
    )
}

/// What becomes of a job whose worker has ended.
fn turns() -> String {
    format!(
        "\
# Whoever ends this job may tell its worker a moment earlier.
[ \"$code\" != {TOLD} ] || [ -n \"$told\" ] || sleep 2
[ \"$(cat \"$logs/$job.started\")\" = \"$restarts\" ] || exit \"$code\"
# Another turn after a warning of the time limit, and when the worker alone was told to leave, as a preemption begins or the
# coordinator's own time is up; a few when no coordinator was found for long (75). None when somebody ends this job, and none
# for ever.
case $told:$code in
limit:* | :{TOLD}) turns={REQUEUES} ;;
:75) turns={DESERTED} ;;
*) turns=0 ;;
esac
if [ \"$restarts\" -lt \"$turns\" ] && scontrol requeue \"$SLURM_JOB_ID\"; then
    sleep 60
    exit 0
fi
[ -z \"$told\" ] || code={TOLD}
echo \"$code\" >\"$logs/$job.ended\"
exit \"$code\"
"
    )
}

/// A coordinator in a job of its own, which goes back into the queue until the run has ended.
pub fn head(slurm: &Slurm, head: &Head) -> String {
    let options = Options::new(&head.name, notice(slurm, HEAD_NOTICE_S))
        .with("--nodes=1")
        .with("--ntasks=1")
        .with("--cpus-per-task=2")
        .place(slurm)
        .with(format!("--output={}-%j.log", head.name));
    let farewell = match &head.workers {
        Some(workers) => format!("scancel --user=\"$(id -u)\" --name={workers}\n"),
        None => String::new(),
    };
    format!(
        "\
#!/bin/bash
{options}#
# The coordinator. It leaves a checkpoint before the time limit, and the same command resumes.
{listen}restarts=${{SLURM_RESTART_COUNT:-0}}
{setup}
{coordinator} run {recipe}{sets} &
{keep}
if [ \"$code\" = 75 ] && [ \"$told\" != term ] && [ \"$restarts\" -lt {REQUEUES} ] && scontrol requeue \"$SLURM_JOB_ID\"; then
    # Slurm ends this turn, and the run is not over: workers go back into the queue by themselves.
    sleep 60
    exit \"$code\"
fi
{farewell}exit \"$code\"
",
        options = options.lines(),
        setup = setup(slurm),
        coordinator = quoted(head.coordinator.display()),
        recipe = quoted(head.recipe.display()),
        sets = sets(&head.sets),
        listen = listen("TERM"),
        keep = keep("TERM"),
    )
}

/// Values that are changed, on the command line.
fn sets(sets: &[String]) -> String {
    sets.iter()
        .map(|set| format!(" --set {}", quoted(set)))
        .collect()
}

/// A worker on each host of the second component, in a shell of its own, which passes on what it is told.
fn workers_of_component(slurm: &Slurm, worker: &Worker) -> String {
    format!(
        "\
(
{listen}srun --het-group=1 {SRUN}{cpus}{more} bash -c '
{devices}for _ in {{1..300}}; do
    [ -s \"$1\" ] && break
    sleep 2
done
join=$1
engine=$2
shift 2
exec \"$@\" join --coordinator \"@$join\" --name \"slurm-$SLURM_JOB_ID.$SLURM_PROCID\" --devices \"$devices\" \\
    --engine \"$engine\" --signal-exit-code {TOLD}
' worker \"$join\" {engine} {program} &
{keep}
# All were told to leave, and nobody else was, as a preemption begins: as before a time limit.
[ \"$code\" != {TOLD} ] || sleep 2
[ \"$code\" != {TOLD} ] || [ -n \"$told\" ] || kill -USR1 $$
) &
",
        // A step does not inherit them from its job.
        cpus = cpus(slurm, worker.threads).map_or_else(String::new, |n| format!(" --cpus-per-task={n}")),
        // Within single quotes.
        devices = devices(&slurm.devices).replace('\'', r"'\''"),
        more = more_of_srun(slurm),
        program = within(slurm, &worker.worker),
        engine = quoted(worker.engine.display()),
        listen = listen("USR1"),
        keep = keep("USR1"),
    )
}

/// One heterogeneous job: a head without GPUs, and `hosts` hosts with a worker each.
pub fn heterogeneous(slurm: &Slurm, head: &Head, worker: &Worker, hosts: u32) -> String {
    let of_head = Options::new(&head.name, notice(slurm, HEAD_NOTICE_S))
        .with("--nodes=1")
        .with("--ntasks=1")
        .with("--cpus-per-task=2")
        .place(slurm)
        .with(format!("--output={}-%j.log", head.name));
    let of_workers = Options(Vec::new())
        .with(format!("--nodes={hosts}"))
        .with(format!("--ntasks={hosts}"))
        .with("--ntasks-per-node=1")
        .with("--no-kill")
        .place(slurm)
        .worker(slurm, worker.threads);
    format!(
        "\
#!/bin/bash
{of_head}#SBATCH hetjob
{of_workers}#
# The coordinator on the first component, a worker on each host of the second. All end together.
{listen}restarts=${{SLURM_RESTART_COUNT:-0}}
join={join}
{setup}
{workers}workers=$!

{coordinator} run {recipe}{sets} &
{keep}
kill -USR1 \"$workers\" 2>/dev/null
wait \"$workers\"
if [ \"$code\" = 75 ] && [ \"$told\" != term ] && [ \"$restarts\" -lt {REQUEUES} ]; then
    scontrol requeue \"$SLURM_JOB_ID\" && sleep 60
fi
exit \"$code\"
",
        of_head = of_head.lines(),
        of_workers = of_workers.lines(),
        setup = setup(slurm),
        join = quoted(worker.join.display()),
        workers = workers_of_component(slurm, worker),
        coordinator = quoted(head.coordinator.display()),
        recipe = quoted(head.recipe.display()),
        sets = sets(&head.sets),
        listen = listen("TERM"),
        keep = keep("TERM"),
    )
}

#[cfg(test)]
mod tests;
