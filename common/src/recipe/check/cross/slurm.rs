//! What texts of `cluster.slurm` sbatch would take. Who submits a job should hear of a mistake before it has waited
//! in a queue.

use super::super::super::fault::Code;
use super::super::super::slurm::{Devices, Slurm};
use super::super::super::{Launcher, Recipe};
use super::super::resolve::Checked;
use super::super::sections::is_loopback;
use super::Rules;

/// Options that the launcher itself gives.
const OURS: [(&str, Option<&str>); 16] = [
    ("--array", Some("-a")),
    ("--job-name", Some("-J")),
    ("--output", Some("-o")),
    ("--error", Some("-e")),
    ("--open-mode", None),
    ("--signal", None),
    ("--requeue", None),
    ("--no-requeue", None),
    ("--nodes", Some("-N")),
    ("--ntasks", Some("-n")),
    ("--parsable", None),
    ("--wait", Some("-W")),
    ("--wrap", None),
    ("--test-only", None),
    ("--chdir", Some("-D")),
    ("--input", Some("-i")),
];

/// Options that the script gives to srun.
const OURS_OF_SRUN: [(&str, Option<&str>); 9] = [
    ("--kill-on-bad-exit", Some("-K")),
    ("--no-kill", Some("-k")),
    ("--wait", Some("-W")),
    ("--het-group", None),
    ("--pack-group", None),
    ("--nodes", Some("-N")),
    ("--ntasks", Some("-n")),
    ("--ntasks-per-node", None),
    ("--cpus-per-task", Some("-c")),
];

impl Rules<'_> {
    pub(super) fn slurm(&mut self, recipe: &Recipe) {
        let Launcher::Slurm(slurm) = &recipe.cluster.launcher else {
            return;
        };
        self.words(slurm);
        self.amounts(slurm);
        self.devices();
        self.extra(slurm);
        self.srun(slurm);
        self.container(slurm);
        if is_loopback(&recipe.cluster.listen) {
            let message = format!(
                "workers on other hosts cannot reach {}",
                recipe.cluster.listen
            );
            let help = "remove it, or write 0.0.0.0:0 or this host's own address".to_owned();
            let label = "only this host can connect".to_owned();
            self.refuse(Code::Address, &["cluster.listen"], message, label, help);
        }
    }

    fn words(&mut self, slurm: &Slurm) {
        for (key, word) in [
            ("partition", &slurm.partition),
            ("account", &slurm.account),
            ("qos", &slurm.qos),
            ("gres", &slurm.gres),
        ] {
            let Some(word) = word.as_deref() else {
                continue;
            };
            if is_word(word) {
                continue;
            }
            let path = format!("cluster.slurm.{key}");
            let message = format!("{path} {word:?} is not one word");
            let label = "no space, quote or control character".to_owned();
            let help = "it becomes an option of sbatch".to_owned();
            self.refuse(Code::OutOfRange, &[&path], message, label, help);
        }
    }

    fn amounts(&mut self, slurm: &Slurm) {
        if let Some(time) = slurm.time.as_deref().filter(|time| !is_time(time)) {
            let message = format!("cluster.slurm.time {time:?} is no time limit");
            let label = "expected minutes, H:MM:SS or D-HH".to_owned();
            let help = "write 90 (minutes), 1:30:00, 2-12 (days-hours), or none".to_owned();
            let path = "cluster.slurm.time";
            self.refuse(Code::OutOfRange, &[path], message, label, help);
        }
        if let Some(memory) = slurm.memory.as_deref().filter(|memory| !is_size(memory)) {
            let message = format!("cluster.slurm.memory {memory:?} is no size");
            let label = "expected a number with K, M, G or T".to_owned();
            let help = "write 64G, or none".to_owned();
            let path = "cluster.slurm.memory";
            self.refuse(Code::OutOfRange, &[path], message, label, help);
        }
    }

    fn devices(&mut self) {
        let path = "cluster.slurm.devices";
        let Some(Checked::Text(text)) = self.top_at(path).map(|devices| &devices.value) else {
            return;
        };
        if Devices::parse(text).is_none() {
            let message = format!("{path} {text:?} are no devices");
            let label = "expected auto, cpu or ordinals like 0,1".to_owned();
            let help = "ordinals count the GPUs of one job, from 0".to_owned();
            self.refuse(Code::UnknownWord, &[path], message, label, help);
        }
    }

    fn extra(&mut self, slurm: &Slurm) {
        for (i, option) in slurm.extra.iter().enumerate() {
            let path = format!("cluster.slurm.extra.{i}");
            if self.is_ours(&OURS, &path, option) {
                continue;
            }
            if !option.starts_with('-') || option.contains(char::is_control) {
                let message = format!("{option:?} is no option of sbatch");
                let label = "expected --name or --name=value".to_owned();
                let help = "one option in each entry, like --constraint=a100".to_owned();
                self.refuse(Code::OutOfRange, &[&path], message, label, help);
            }
        }
    }

    /// Each is one word of a command line, whatever it holds.
    fn srun(&mut self, slurm: &Slurm) {
        for (i, option) in slurm.srun.iter().enumerate() {
            let path = format!("cluster.slurm.srun.{i}");
            if self.is_ours(&OURS_OF_SRUN, &path, option) {
                continue;
            }
            let name = option.split('=').next().unwrap_or_default();
            let is_option = name.len() > 1 && name.starts_with('-') && name != "--";
            if !is_option || name.contains(' ') || option.contains(char::is_control) {
                let message = format!("{option:?} is no option of srun");
                let label = "expected --name or --name=value".to_owned();
                let help =
                    "one option in each entry, its value after =, like --container-image=worker.sqsh"
                        .to_owned();
                self.refuse(Code::OutOfRange, &[&path], message, label, help);
            }
        }
    }

    fn container(&mut self, slurm: &Slurm) {
        let path = |i: usize| format!("cluster.slurm.container.{i}");
        for (i, word) in slurm.container.iter().enumerate() {
            if word.contains(char::is_control) {
                let message = format!("{word:?} is no word of a command");
                let label = "expected a text without control characters".to_owned();
                let help = "write it without line breaks, or leave it out".to_owned();
                self.refuse(Code::OutOfRange, &[&path(i)], message, label, help);
            }
        }
        let Some(program) = slurm.container.first() else {
            return;
        };
        if program.starts_with('-') || program.contains(' ') {
            let message = format!("{program:?} is no program");
            let label = "the first word is the program".to_owned();
            let help = "a word in each entry, like [apptainer, exec, --nv, worker.sif]".to_owned();
            self.refuse(Code::OutOfRange, &[&path(0)], message, label, help);
        }
    }

    /// Refuses an option that is given anyway; whether it did.
    fn is_ours(&mut self, ours: &[(&str, Option<&str>)], path: &str, option: &str) -> bool {
        let name = option.split(['=', ' ']).next().unwrap_or_default();
        let found = ours.iter().find(|(long, short)| {
            name == *long || short.is_some_and(|short| option.starts_with(short))
        });
        let Some((long, _)) = found else {
            return false;
        };
        let message = format!("{option:?} is not yours to give");
        let label = format!("{long} is given by the launcher");
        let help = "remove it".to_owned();
        self.refuse(Code::NotApplicable, &[path], message, label, help);
        true
    }
}

fn is_word(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_graphic() && !"'\"\\`$#".contains(c);
    !text.starts_with('-') && text.chars().all(fits)
}

/// `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`, and the latter with `:minutes` and `:seconds`.
fn is_time(text: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if text.eq_ignore_ascii_case("infinite") || text.eq_ignore_ascii_case("unlimited") {
        return true;
    }
    let clock = match text.split_once('-') {
        Some((days, clock)) if is_number(days) => clock,
        Some(_) => return false,
        None => text,
    };
    clock.split(':').count() <= 3 && clock.split(':').all(is_number)
}

/// A whole number, with a unit or not.
fn is_size(text: &str) -> bool {
    let number = text.strip_suffix(['K', 'M', 'G', 'T']).unwrap_or(text);
    !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_those_of_slurm() {
        for time in [
            "90",
            "90:00",
            "1:30:00",
            "2-12",
            "2-12:30",
            "2-12:30:10",
            "UNLIMITED",
        ] {
            assert!(is_time(time), "{time}");
        }
        for time in ["1h", "1:2:3:4", "-5", "", "1.5", "a-1", "2-"] {
            assert!(!is_time(time), "{time}");
        }
        assert!(is_size("64G") && is_size("512") && !is_size("64 G") && !is_size("G"));
    }
}
