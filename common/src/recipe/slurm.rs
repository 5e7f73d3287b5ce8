//! What a recipe says of a cluster that Slurm keeps. None of it changes a result.

use std::path::PathBuf;

/// How Slurm is asked for workers. Texts are checked to be single options of sbatch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slurm {
    /// Partition; the cluster's default when none.
    pub partition: Option<String>,
    /// Who is charged.
    pub account: Option<String>,
    /// Quality of service.
    pub qos: Option<String>,
    /// Generic resources of each job.
    pub gres: Option<String>,
    /// Time limit of each job, as Slurm writes it.
    pub time: Option<String>,
    /// CPUs of each job.
    pub cpus: Option<u32>,
    /// Memory of each job.
    pub memory: Option<String>,
    /// More options of sbatch, each with its dashes.
    pub extra: Vec<String>,
    /// Lines of shell before the worker.
    pub setup: Vec<String>,
    /// More options of the srun that starts the worker, each with its dashes.
    pub srun: Vec<String>,
    /// Words of the command within which the worker is started.
    pub container: Vec<String>,
    /// What each worker lends.
    pub devices: Devices,
    /// The worker's program on the nodes, where it lies elsewhere than on the coordinator's host.
    pub worker: Option<PathBuf>,
    /// The engine's program on the nodes, likewise.
    pub engine: Option<PathBuf>,
    /// Seconds between two looks at the queue.
    pub poll_s: u32,
}

/// What a worker lends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Devices {
    /// The job's GPUs, else its CPUs.
    #[default]
    Auto,
    /// CPUs.
    Cpu,
    /// GPUs by their ordinals within the job.
    Gpus(Vec<u32>),
}

impl Devices {
    /// Reads `auto`, `cpu` or ordinals such as `0,1`, none twice; none when the text is something else.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => return Some(Self::Auto),
            "cpu" => return Some(Self::Cpu),
            _ => {}
        }
        let ordinals: Option<Vec<u32>> = text.split(',').map(|n| n.trim().parse().ok()).collect();
        let ordinals = ordinals?;
        let distinct = (1..ordinals.len()).all(|i| !ordinals[..i].contains(&ordinals[i]));
        distinct.then_some(Self::Gpus(ordinals))
    }
}

impl std::fmt::Display for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Gpus(ordinals) => {
                let ordinals: Vec<String> = ordinals.iter().map(u32::to_string).collect();
                f.write_str(&ordinals.join(","))
            }
        }
    }
}

impl Slurm {
    /// Engines of one job: one for each device. Where only the job will know its GPUs, what `gres` asks for.
    pub fn engines(&self) -> u32 {
        match &self.devices {
            Devices::Cpu => 1,
            Devices::Gpus(ordinals) => ordinals.len() as u32,
            Devices::Auto => self.gres.as_deref().map_or(1, gpus),
        }
    }

    /// Seconds of a job's time limit; none when it has none that is written here.
    pub fn limit_s(&self) -> Option<u64> {
        let time = self.time.as_deref()?;
        let (days, clock) = match time.split_once('-') {
            Some((days, clock)) => (Some(days.parse::<u64>().ok()?), clock),
            None => (None, time),
        };
        let parts: Option<Vec<u64>> = clock.split(':').map(|part| part.parse().ok()).collect();
        let (hours, minutes, seconds) = match (days, parts?.as_slice()) {
            (Some(_), &[hours]) => (hours, 0, 0),
            (Some(_), &[hours, minutes]) => (hours, minutes, 0),
            (None, &[minutes]) => (0, minutes, 0),
            (None, &[minutes, seconds]) => (0, minutes, seconds),
            (_, &[hours, minutes, seconds]) => (hours, minutes, seconds),
            _ => return None,
        };
        let hours = days.unwrap_or(0).checked_mul(24)?.checked_add(hours)?;
        let minutes = hours.checked_mul(60)?.checked_add(minutes)?;
        minutes.checked_mul(60)?.checked_add(seconds)
    }
}

/// How many GPUs `gpu`, `gpu:2` or `gpu:a100:4` ask for, among other resources after commas; 1 when none.
fn gpus(gres: &str) -> u32 {
    let mine = gres
        .split(',')
        .filter(|one| *one == "gpu" || one.starts_with("gpu:"));
    let count = |one: &str| match one.rsplit_once(':') {
        Some((_, last)) => last.parse().unwrap_or(1),
        None => 1,
    };
    mine.map(count).sum::<u32>().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_has_an_engine_for_each_device() {
        let engines = |devices: &str, gres: Option<&str>| {
            let devices = Devices::parse(devices).expect("devices");
            let gres = gres.map(str::to_owned);
            let slurm = Slurm {
                devices,
                gres,
                ..Slurm::default()
            };
            slurm.engines()
        };
        for (devices, gres, expected) in [
            ("auto", None, 1),
            ("auto", Some("gpu"), 1),
            ("auto", Some("gpu:4"), 4),
            ("auto", Some("gpu:a100:2,shard:3"), 2),
            ("auto", Some("gpu:a100"), 1),
            ("auto", Some("shard:3"), 1),
            ("cpu", Some("gpu:4"), 1),
            ("0,1,3", None, 3),
        ] {
            assert_eq!(engines(devices, gres), expected, "{devices} {gres:?}");
        }
        for wrong in ["gpu", "0,,1", "0,0", "-1", ""] {
            assert_eq!(Devices::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn time_limits_are_read_as_slurm_reads_them() {
        for (time, seconds) in [
            ("90", Some(5_400)),
            ("1:30", Some(90)),
            ("1:30:05", Some(5_405)),
            ("2-12", Some(216_000)),
            ("1-01:01", Some(90_060)),
            ("1-01:01:01", Some(90_061)),
            ("unlimited", None),
            ("99999999999999999999", None),
        ] {
            let time = Some(time.to_owned());
            let slurm = Slurm {
                time: time.clone(),
                ..Slurm::default()
            };
            assert_eq!(slurm.limit_s(), seconds, "{time:?}");
        }
        assert_eq!(Slurm::default().limit_s(), None);
    }
}
