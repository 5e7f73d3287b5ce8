//! What happens to runs on a cluster.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::site::{Job, Site, Undisturbed, Work};

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
    /// The warning of a time limit reaches a job.
    Warning,
    /// The coordinator in a job of its own, which is requeued, and submits its workers.
    HeadJob,
    /// The coordinator in a job of its own, and an array of workers that people submit.
    External,
    /// Everybody in one heterogeneous job.
    Heterogeneous,
}

impl Case {
    pub(crate) const ALL: [Self; 12] = [
        Self::Plain,
        Self::Requeue,
        Self::Signal,
        Self::Preempted,
        Self::PowerCut,
        Self::Partition,
        Self::Coordinator,
        Self::Controller,
        Self::Warning,
        Self::HeadJob,
        Self::External,
        Self::Heterogeneous,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Requeue => "requeue",
            Self::Signal => "signal",
            Self::Preempted => "preempted",
            Self::PowerCut => "power-cut",
            Self::Partition => "partition",
            Self::Coordinator => "coordinator-killed",
            Self::Controller => "slurmctld-killed",
            Self::Warning => "time-limit",
            Self::HeadJob => "head-job",
            Self::External => "external-workers",
            Self::Heterogeneous => "heterogeneous",
        }
    }

    pub(crate) fn is_short(self) -> bool {
        matches!(self, Self::Plain | Self::Requeue | Self::Coordinator)
    }

    /// Which engines see it.
    fn works(self, short: bool) -> &'static [Work] {
        match self {
            Self::Plain | Self::PowerCut if !short => &[Work::StandIn, Work::Real],
            _ => &[Work::StandIn],
        }
    }

    /// Which of the rendered scripts are submitted; none where a coordinator is started on the head.
    fn style(self) -> Option<&'static str> {
        match self {
            Self::HeadJob => Some("array"),
            Self::External => Some("external"),
            Self::Heterogeneous => Some("heterogeneous"),
            _ => None,
        }
    }

    /// Lives through it; says what was seen.
    pub(crate) fn run(
        self,
        baselines: &mut Baselines,
        short: bool,
        keep: bool,
    ) -> anyhow::Result<String> {
        let mut seen = Vec::new();
        for &work in self.works(short) {
            let undisturbed = match baselines.entry(work) {
                Entry::Occupied(made) => made.into_mut(),
                Entry::Vacant(place) => place.insert(Undisturbed::new(work)?),
            };
            let mut site = match self.style() {
                Some(style) => Site::rendered(work, style)?,
                None => Site::begin(work)?,
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
            | Self::PowerCut
            | Self::Partition
            | Self::Coordinator
            | Self::Warning => 2,
            Self::Signal => 3,
            // The one that went first is none of the run's.
            Self::Preempted => 4,
            // What slurmctld had not saved yet it forgets, and submissions of requeued heads are many.
            Self::Controller | Self::HeadJob | Self::External | Self::Heterogeneous => {
                return Ok(());
            }
        };
        let jobs = site.jobs()?;
        anyhow::ensure!(jobs.len() == expected, "not {expected} jobs: {jobs:?}");
        Ok(())
    }

    fn happen(self, site: &mut Site) -> anyhow::Result<String> {
        let job = site.at_work()?;
        match self {
            Self::Warning => {
                let signal = ["--batch", "--signal=USR1", &job.id];
                site.cluster.slurm("scancel", &signal)?;
                site.await_restart(&job, 1)?;
                Ok(format!("{} left and queued again", job.id))
            }
            Self::HeadJob => {
                site.cluster.slurm("scontrol", &["requeue", "1"])?;
                site.await_job("1")?;
                let shown = site
                    .cluster
                    .slurm("scontrol", &["show", "job", "-o", "1"])?;
                anyhow::ensure!(shown.contains(" Restarts=1 "), "not requeued: {shown}");
                Ok("the head was requeued and went on".into())
            }
            Self::External => {
                site.await_job("1")?;
                Ok("head and workers by hand".into())
            }
            Self::Heterogeneous => {
                site.await_job("1+0")?;
                Ok("one job of two components".into())
            }
            Self::Plain => Ok("two jobs".into()),
            Self::Requeue => {
                site.cluster.slurm("scontrol", &["requeue", &job.id])?;
                site.await_restart(&job, 1)?;
                Ok(format!("{} began again", job.id))
            }
            Self::Signal => {
                site.cluster.slurm("scancel", &["--signal=TERM", &job.id])?;
                let successor = successor(site, &job)?;
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
            Self::Controller => {
                site.cluster.kill_controller()?;
                site.kill_a_worker()?;
                std::thread::sleep(std::time::Duration::from_secs(4));
                site.cluster.restart_controller()?;
                Ok("a worker that died meanwhile was replaced".into())
            }
        }
    }
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

/// A job that goes first wants the node of `job`, whose worker is told to leave and has the partition's grace for it.
fn preempted(site: &mut Site, job: &Job) -> anyhow::Result<String> {
    let node = format!("--nodelist=n{}", job.node);
    let urgent = ["--parsable", "--partition=urgent", "--exclusive", &node];
    let urgent = [&urgent[..], &["--output=/dev/null", "--wrap=sleep 2"]].concat();
    let first = site.cluster.slurm("sbatch", &urgent)?.trim().to_owned();
    let successor = successor(site, job)?;
    site.await_some("end of the job that goes first", |site| {
        let mut jobs = site.jobs()?.into_iter();
        Ok(jobs.find(|other| other.id == first && other.state == "COMPLETED"))
    })?;
    Ok(format!(
        "{} made way for {first}, {} came",
        job.id, successor.id
    ))
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
