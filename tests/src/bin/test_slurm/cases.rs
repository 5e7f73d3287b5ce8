//! What happens to runs on a cluster.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::site::{Job, Setting, Site, Undisturbed, Work};

/// What undisturbed runs made.
pub(crate) type Baselines = BTreeMap<Work, Undisturbed>;

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    /// Nothing.
    Plain,
    /// `scontrol requeue` of a worker's job.
    Requeue,
    /// `scancel --signal=TERM` of a worker's job.
    Signal,
    /// `scancel` of a worker's job.
    Cancelled,
    /// A job of a partition that goes first takes a worker's node.
    Preempted,
    /// A node loses power.
    PowerCut,
    /// A node is cut off, and its worker lives on beside its successor.
    Partition,
    /// SIGKILL of the coordinator, and the same command again.
    Coordinator,
    /// SIGKILL of slurmctld, which is away for a while.
    Controller,
    /// Jobs near their time limit.
    TimeLimit,
    /// Workers that find no coordinator, and ask to be queued again; they start within a container, or what stands for one.
    TryAgain,
    /// The coordinator in a job of its own, which is requeued, and submits its workers.
    HeadJob,
    /// The coordinator in a job of its own, and an array of workers that people submit, of which one is told to leave.
    External,
    /// The same, where the head's time is over: workers must come again with it.
    ExternalHead,
    /// Everybody in one heterogeneous job, all of whose workers are told to leave.
    Heterogeneous,
}

/// A worker that says once that it found nobody, and is one when it comes again; notes where it runs.
const SECOND_TIME: &str = r#"turn=$folder/turn-$SLURM_ARRAY_TASK_ID
[ -e "$turn" ] || { echo 1 >"$turn"; exit 75; }
{ echo "$WITHIN"; grep NoNewPrivs /proc/self/status; } >"$turn"
exec "$worker" "$@""#;

/// How much is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Some cases with the stand-in alone.
    Short,
    /// Every case.
    Whole,
    /// The same, and the quickstart.
    WithQuickstart,
}

impl Case {
    pub(crate) const ALL: [Self; 15] = [
        Self::Plain,
        Self::Requeue,
        Self::Signal,
        Self::Cancelled,
        Self::Preempted,
        Self::PowerCut,
        Self::Partition,
        Self::Coordinator,
        Self::Controller,
        Self::TimeLimit,
        Self::TryAgain,
        Self::HeadJob,
        Self::External,
        Self::ExternalHead,
        Self::Heterogeneous,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Requeue => "requeue",
            Self::Signal => "signal",
            Self::Cancelled => "cancelled",
            Self::Preempted => "preempted",
            Self::PowerCut => "power-cut",
            Self::Partition => "partition",
            Self::Coordinator => "coordinator-killed",
            Self::Controller => "slurmctld-killed",
            Self::TimeLimit => "time-limit",
            Self::TryAgain => "exit-75",
            Self::HeadJob => "head-job",
            Self::External => "external-workers",
            Self::ExternalHead => "external-head",
            Self::Heterogeneous => "heterogeneous",
        }
    }

    pub(crate) fn is_short(self) -> bool {
        matches!(self, Self::Plain | Self::Requeue | Self::Coordinator)
    }

    /// What sees it.
    fn works(self, form: Form) -> &'static [Work] {
        match self {
            _ if form == Form::Short => &[Work::StandIn],
            Self::Plain if form == Form::WithQuickstart => {
                &[Work::StandIn, Work::Tiny, Work::Quickstart]
            }
            Self::Plain => &[Work::StandIn, Work::Tiny],
            Self::Requeue
            | Self::Signal
            | Self::Cancelled
            | Self::Preempted
            | Self::PowerCut
            | Self::Partition
            | Self::Coordinator
            | Self::Controller => &[Work::Tiny],
            Self::TimeLimit
            | Self::TryAgain
            | Self::HeadJob
            | Self::External
            | Self::ExternalHead
            | Self::Heterogeneous => &[Work::StandIn],
        }
    }

    fn setting(self) -> Setting {
        let usual = Setting::default();
        match self {
            // It could go on with one, and must not.
            Self::Signal | Self::Cancelled | Self::Preempted => Setting { fewest: 1, ..usual },
            // Slurm knows no shorter limit.
            Self::TimeLimit => Setting {
                step_ms: 500,
                slurm: ", time: 1",
                ..usual
            },
            Self::TryAgain => Setting {
                slurm: ", srun: [\"--job-name=it's a step\"], container: [setpriv, --no-new-privs, env, \"WITHIN=it's $here\"]",
                before: Some(SECOND_TIME),
                ..usual
            },
            _ => usual,
        }
    }

    /// Which of the rendered scripts are submitted; none where a coordinator is started on the head.
    fn style(self) -> Option<&'static str> {
        match self {
            Self::HeadJob => Some("array"),
            Self::External | Self::ExternalHead => Some("external"),
            Self::Heterogeneous => Some("heterogeneous"),
            _ => None,
        }
    }

    /// Lives through it; says what was seen.
    pub(crate) fn run(
        self,
        baselines: &mut Baselines,
        form: Form,
        keep: bool,
    ) -> anyhow::Result<String> {
        let mut seen = Vec::new();
        for &work in self.works(form) {
            let undisturbed = match baselines.entry(work) {
                Entry::Occupied(made) => made.into_mut(),
                Entry::Vacant(place) => place.insert(Undisturbed::new(work)?),
            };
            let mut site = match self.style() {
                Some(style) => Site::rendered(work, &self.setting(), style)?,
                None => Site::begin(work, &self.setting())?,
            };
            let ended = self
                .happen(&mut site)
                .and_then(|said| site.end_well(undisturbed).map(|()| said))
                .and_then(|said| self.count(&site).map(|()| said));
            match ended {
                Ok(said) => seen.push(format!("{work:?}: {said}")),
                Err(error) if keep => {
                    let kept = site.keep();
                    return Err(error.context(format!("kept in {}", kept.display())));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(seen.join("; "))
    }

    /// As many jobs as were needed, and none besides: what is requeued or adopted is not submitted again.
    fn count(self, site: &Site) -> anyhow::Result<()> {
        let expected = match self {
            Self::Plain
            | Self::Requeue
            | Self::Signal
            | Self::PowerCut
            | Self::Partition
            | Self::Coordinator
            | Self::TimeLimit
            | Self::TryAgain => 2,
            // The one that went first is none of the run's; one that was cancelled has a successor.
            Self::Preempted | Self::Cancelled => 3,
            // What slurmctld had not saved yet it forgets, and submissions of requeued heads are many.
            Self::Controller
            | Self::HeadJob
            | Self::External
            | Self::ExternalHead
            | Self::Heterogeneous => return Ok(()),
        };
        let jobs = site.jobs()?;
        anyhow::ensure!(jobs.len() == expected, "not {expected} jobs: {jobs:?}");
        Ok(())
    }

    fn happen(self, site: &mut Site) -> anyhow::Result<String> {
        let job = site.at_work()?;
        match self {
            Self::Plain => Ok("two jobs".into()),
            Self::Requeue => {
                site.cluster.slurm("scontrol", &["requeue", &job.id])?;
                site.await_restart(&job, 1)?;
                Ok(format!("{} began again", job.id))
            }
            Self::Signal => {
                site.cluster.slurm("scancel", &["--signal=TERM", &job.id])?;
                site.await_restart(&job, 1)?;
                site.await_two_at_work()?;
                Ok(format!("{} left and came again", job.id))
            }
            Self::Cancelled => {
                site.cluster.slurm("scancel", &[&job.id])?;
                let successor = successor(site, &job)?;
                site.await_two_at_work()?;
                Ok(format!("{} left, {} came", job.id, successor.id))
            }
            Self::Preempted => preempted(site, &job),
            Self::PowerCut => {
                site.cluster.cut_power(job.node)?;
                site.await_restart(&job, 1)?;
                let now = moved(site, &job)?;
                Ok(format!(
                    "{} went from n{} to n{}",
                    job.id, job.node, now.node
                ))
            }
            Self::Partition => partition(site, &job),
            Self::Coordinator => {
                site.kill_coordinator()?;
                site.coordinate()?;
                Ok("two jobs were adopted".into())
            }
            Self::Controller => without_controller(site, &job),
            Self::TimeLimit => time_limit(site, &job),
            Self::TryAgain => second_time(site, &job),
            Self::HeadJob => {
                site.cluster.slurm("scontrol", &["requeue", "1"])?;
                site.await_job("1")?;
                anyhow::ensure!(is_second_turn(site)?, "the head was not requeued");
                Ok("the head was requeued and went on".into())
            }
            Self::External => {
                site.cluster.slurm("scancel", &["--signal=TERM", &job.id])?;
                site.await_restart(&job, 1)?;
                site.await_job("1")?;
                Ok(format!("by hand; {} left and came again", job.id))
            }
            Self::ExternalHead => {
                let warning = ["--batch", "--signal=USR1", "1"];
                site.cluster.slurm("scancel", &warning)?;
                site.await_restart(&job, 1)?;
                site.await_job("1")?;
                Ok(format!(
                    "the head's time was over; {} came again with it",
                    job.id
                ))
            }
            Self::Heterogeneous => heterogeneous(site),
        }
    }
}

/// Whether the first job was queued again, once.
fn is_second_turn(site: &Site) -> anyhow::Result<bool> {
    let shown = ["show", "job", "-o", "1"];
    let shown = site.cluster.slurm("scontrol", &shown)?;
    Ok(shown.contains(" Restarts=1 "))
}

/// Slurm warns a job of its limit of one minute.
fn time_limit(site: &mut Site, job: &Job) -> anyhow::Result<String> {
    site.await_restart(job, 1)?;
    let shown = ["show", "job", "-o", &job.id];
    let shown = site.cluster.slurm("scontrol", &shown)?;
    anyhow::ensure!(shown.contains(" TimeLimit=00:01:00 "), "{shown}");
    Ok(format!("Slurm warned {}, which queued again", job.id))
}

/// Both workers work at their second start, as the script before them noted.
fn second_time(site: &mut Site, job: &Job) -> anyhow::Result<String> {
    for number in 0..2 {
        let noted = site.noted(&format!("turn-{number}"))?;
        anyhow::ensure!(noted == "it's $here\nNoNewPrivs:\t1\n", "{noted:?}");
    }
    site.await_restart(job, 1)?;
    Ok("two jobs queued again, and worked in what stands for a container".into())
}

/// A worker dies while nobody keeps the queue.
fn without_controller(site: &mut Site, job: &Job) -> anyhow::Result<String> {
    site.cluster.kill_controller()?;
    site.kill_worker_of(job)?;
    std::thread::sleep(std::time::Duration::from_secs(4));
    site.cluster.restart_controller()?;
    let successor = successor(site, job)?;
    let workers = site.await_two_at_work()?;
    let is_there = workers.contains(&format!("slurm-{}", successor.id));
    anyhow::ensure!(is_there, "{} is not of {workers:?}", successor.id);
    let (gone, came) = (&job.id, &successor.id);
    Ok(format!(
        "{gone}, whose worker died meanwhile, was replaced by {came}"
    ))
}

/// Another job of the run than the first two.
fn successor(site: &mut Site, gone: &Job) -> anyhow::Result<Job> {
    let array = |id: &str| id.split('_').next().unwrap_or_default().to_owned();
    site.await_some("successor", |site| {
        let jobs = site.jobs()?.into_iter();
        Ok(jobs
            .into_iter()
            .find(|job| job.id.contains('_') && array(&job.id) != array(&gone.id)))
    })
}

/// All workers of the job are told to leave, and nobody else.
fn heterogeneous(site: &mut Site) -> anyhow::Result<String> {
    site.cluster.slurm("scancel", &["--signal=TERM", "1"])?;
    site.await_some(
        "second turn",
        |site| Ok(is_second_turn(site)?.then_some(())),
    )?;
    site.await_job("1+0")?;
    Ok("one job of two components left and came again".into())
}

/// A job that goes first wants the node of `job`, whose worker is told to leave and has the partition's grace for it.
fn preempted(site: &mut Site, job: &Job) -> anyhow::Result<String> {
    let node = format!("--nodelist=n{}", job.node);
    let urgent = ["--parsable", "--partition=urgent", "--exclusive", &node];
    let urgent = [&urgent[..], &["--output=/dev/null", "--wrap=sleep 2"]].concat();
    let first = site.cluster.slurm("sbatch", &urgent)?.trim().to_owned();
    site.await_restart(job, 1)?;
    site.await_two_at_work()?;
    site.await_some("end of the job that goes first", |site| {
        let mut jobs = site.jobs()?.into_iter();
        Ok(jobs.find(|other| other.id == first && other.state == "COMPLETED"))
    })?;
    Ok(format!("{} made way for {first}, and came again", job.id))
}

/// The same job on another node.
fn moved(site: &mut Site, job: &Job) -> anyhow::Result<Job> {
    site.await_some("other node", |site| {
        let mut jobs = site.jobs()?.into_iter();
        Ok(jobs.find(|other| other.id == job.id && other.node != 0 && other.node != job.node))
    })
}

/// The job's first incarnation lives on a node that is cut off, and its second elsewhere: then the node is back.
fn partition(site: &mut Site, job: &Job) -> anyhow::Result<String> {
    site.cluster.isolate(job.node)?;
    site.await_restart(job, 1)?;
    let now = moved(site, job)?;
    // Two at work and the zombie.
    site.await_some("third worker beside the zombie", |site| {
        Ok((site.workers() == 3).then_some(()))
    })?;
    site.cluster.heal()?;
    Ok(format!(
        "{} lived on n{} and n{} at a time",
        job.id, job.node, now.node
    ))
}
