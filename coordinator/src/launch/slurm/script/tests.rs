use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};

use super::*;
use crate::testing;

fn worker_of(path: &str) -> Worker {
    Worker {
        name: "distill-1".into(),
        worker: format!("{path}/worker").into(),
        engine: "/bin/engine".into(),
        join: format!("{path}/join").into(),
        logs: format!("{path}/50% logs").into(),
        log: None,
        count: None,
        threads: Some(4),
    }
}

fn head_of(path: &str) -> Head {
    Head {
        name: "head".into(),
        coordinator: format!("{path}/coordinator").into(),
        recipe: "/r.yaml".into(),
        sets: vec!["cluster.listen=0.0.0.0:0".into()],
        workers: Some("distill-1".into()),
    }
}

fn slurm() -> Slurm {
    Slurm {
        partition: Some("gpu".into()),
        gres: Some("gpu:2".into()),
        setup: vec!["module load x".into()],
        extra: vec!["--exclude=n7".into()],
        ..Slurm::default()
    }
}

#[test]
fn scripts_are_bash_whatever_a_path_holds() {
    let path = "/it's \"here\"/$HOME";
    let (slurm, worker_, head_) = (slurm(), worker_of(path), head_of(path));
    let scripts = [
        worker(&slurm, &worker_),
        head(&slurm, &head_),
        heterogeneous(&slurm, &head_, &worker_, 3),
    ];
    for script in scripts {
        let mut bash = Command::new("bash")
            .arg("-n")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("bash");
        let mut stdin = bash.stdin.take().expect("a pipe");
        stdin.write_all(script.as_bytes()).expect("it reads");
        drop(stdin);
        let said = bash.wait_with_output().expect("it ends");
        let errors = String::from_utf8_lossy(&said.stderr);
        assert!(
            said.status.success() && errors.is_empty(),
            "{errors}\n{script}"
        );
    }
}

#[test]
fn a_worker_asks_for_what_the_recipe_says() {
    let script = worker(&slurm(), &worker_of("/x"));
    for line in [
        "#SBATCH --partition=gpu\n",
        "#SBATCH --gres=gpu:2\n",
        "#SBATCH --cpus-per-task=8\n",
        "#SBATCH --exclude=n7\n",
        "#SBATCH --output=/dev/null\n",
        "\nexec >>\"$logs/$job.log\" 2>&1\n",
        "\nmodule load x\n",
    ] {
        assert!(script.contains(line), "{line}: {script}");
    }
    assert!(
        !script.contains("--account") && !script.contains("--mem"),
        "{script}"
    );
}

/// Slurm's programs as scripts, and what a worker's script is tried with.
struct Scene {
    folder: tempfile::TempDir,
    restarts: u32,
}

impl Scene {
    /// The worker is `srun` (a script) in incarnation `restarts` of its job.
    fn new(srun: &str, restarts: u32) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir(folder.path().join("programs")).expect("a folder");
        fs::write(folder.path().join("join"), "a join string").expect("written");
        let scene = Self { folder, restarts };
        let requeued = scene.path("requeued");
        scene.program("srun", srun);
        scene.program("scontrol", &format!("echo \"$@\" >'{requeued}'"));
        scene.program("sleep", "true");
        scene
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn program(&self, name: &str, text: &str) {
        let path = self.folder.path().join("programs").join(name);
        testing::program(&path, &format!("#!/bin/bash\n{text}\n"));
    }

    /// The worker's job: its exit code, whether it went back into the queue, and the note it left.
    fn live(&self) -> (Option<i32>, bool, Option<String>) {
        let path = self.folder.path().display().to_string();
        let (code, requeued) = self.run(&worker(&Slurm::default(), &worker_of(&path)));
        let note = fs::read_to_string(self.path("50% logs/7_1.ended")).ok();
        (code, requeued, note)
    }

    /// Runs a script; its exit code, and whether it went back into the queue.
    fn run(&self, text: &str) -> (Option<i32>, bool) {
        let folder = self.folder.path();
        let script = folder.join("script");
        fs::write(&script, text).expect("written");
        let system = std::env::var("PATH").expect("a path");
        let output = Command::new("bash")
            .arg(&script)
            .env("PATH", format!("{}:{system}", self.path("programs")))
            .env("SLURM_JOB_ID", "8")
            .env("SLURM_ARRAY_JOB_ID", "7")
            .env("SLURM_ARRAY_TASK_ID", "1")
            .env("SLURM_JOB_NODELIST", "n1")
            .env("SLURM_RESTART_COUNT", self.restarts.to_string())
            .output()
            .expect("bash");
        let asked = fs::read_to_string(folder.join("requeued")).ok();
        if let Some(asked) = &asked {
            assert_eq!(asked, "requeue 8\n");
        }
        (output.status.code(), asked.is_some())
    }
}

fn lived(srun: &str, restarts: u32) -> (Option<i32>, bool, Option<String>) {
    Scene::new(srun, restarts).live()
}

/// What a worker does that is sent a signal: it ends with the code that it was started with for that.
const LEAVE: &str = "code=0\n\
     while [ $# -gt 0 ]; do [ \"$1\" != --signal-exit-code ] || code=$2; shift; done\n\
     trap 'exit $code' USR1 TERM\n";

/// A worker that has its job told `signal` once that listens, and leaves when it is told itself.
fn told(signal: &str) -> String {
    format!("{LEAVE}kill -{signal} \"$PPID\"\nwhile :; do /bin/sleep 0.02; done")
}

fn note(code: i32) -> Option<String> {
    Some(format!("{code}\n"))
}

#[test]
fn a_script_does_what_its_workers_exit_code_asks_for() {
    for code in [0, 1, 64] {
        let ended = lived(&format!("exit {code}"), 0);
        assert_eq!(ended, (Some(code), false, note(code)), "{code}");
    }
    // No coordinator was found: another try, but not for ever.
    assert_eq!(lived("exit 75", 0), (Some(0), true, None));
    assert_eq!(lived("exit 75", 8), (Some(75), false, note(75)));
    // Shortly before the time limit: another turn. When somebody ends the job: none.
    assert_eq!(lived(&told("USR1"), 8), (Some(0), true, None));
    let last = (Some(TOLD), false, note(TOLD));
    assert_eq!(lived(&told("USR1"), 50), last);
    assert_eq!(lived(&told("TERM"), 0), last);
}

/// `scancel --signal=TERM`, and what begins a preemption: the worker is told, and its script is not. Who drains it on
/// purpose is its coordinator, and then it leaves for good.
#[test]
fn a_worker_that_alone_is_told_to_leave_has_its_job_queued_again() {
    let alone = format!("{LEAVE}kill -TERM $$");
    assert_eq!(lived(&alone, 0), (Some(0), true, None));
    let last = (Some(TOLD), false, note(TOLD));
    assert_eq!(lived(&alone, 50), last);
    // Who submitted it with `--no-requeue`: then whoever keeps the jobs learns of it.
    let refused = Scene::new(&alone, 0);
    refused.program("scontrol", "exit 1");
    assert_eq!(refused.live(), last);
}

/// `scancel` tells everybody in a job, and the worker may be first: the job must stay out of the queue.
#[test]
fn a_worker_that_is_told_a_moment_before_its_script_stays_out_of_the_queue() {
    let scene = Scene::new(&format!("{LEAVE}kill -TERM $$"), 0);
    scene.program("sleep", "kill -TERM \"$PPID\"");
    assert_eq!(scene.live(), (Some(TOLD), false, note(TOLD)));
}

/// What stands in for srun where a step's own command is run, too.
const PASS_ON: &str = "for word; do printf '%s\\n' \"$word\"; done >\"$(dirname \"$0\")/../words-of-srun\"\n\
     while [ \"${1#-}\" != \"$1\" ]; do shift; done\n\
     exec \"$@\"\n";

/// A program beside the recipe's: the worker, or the coordinator.
fn beside(scene: &Scene, name: &str, text: &str) {
    let path = scene.folder.path().join(name);
    testing::program(&path, &format!("#!/bin/bash\n{text}\n"));
}

#[test]
fn a_worker_starts_within_the_container_in_every_style() {
    let odd = "it's \"x\" $HOME *";
    let within = format!("WITHIN={odd}");
    let container = ["env", "-u", "NOTHING", "-u", "NOTHING", &within];
    let slurm = Slurm {
        srun: vec![format!("--container-image={odd}")],
        container: container.map(str::to_owned).to_vec(),
        ..Slurm::default()
    };
    for style in ["array", "external", "heterogeneous"] {
        let scene = Scene::new(PASS_ON, 0);
        let path = scene.folder.path().display().to_string();
        let mut of_worker = worker_of(&path);
        let script = match style {
            "array" => worker(&slurm, &of_worker),
            "external" => {
                of_worker.log = Some("%A_%a.log".into());
                of_worker.count = Some(2);
                worker(&slurm, &of_worker)
            }
            _ => heterogeneous(&slurm, &head_of(&path), &of_worker, 2),
        };
        let seen = scene.path("seen");
        let look = format!(
            "printf '%s\\n' \"$WITHIN\" \"$@\" >'{seen}.partial'\nmv '{seen}.partial' '{seen}'"
        );
        beside(&scene, "worker", &look);
        let wait = format!("until [ -e '{seen}' ]; do /bin/sleep 0.02; done");
        beside(&scene, "coordinator", &wait);
        assert_eq!(scene.run(&script), (Some(0), false), "{style}");
        let words = fs::read_to_string(scene.path("words-of-srun")).expect("srun was run");
        let image = format!("\n--container-image={odd}\n");
        assert!(words.contains(&image), "{style}: {words}");
        let seen = fs::read_to_string(&seen).expect("a worker was started");
        let expected = format!("{odd}\njoin\n--coordinator\n@{path}/join\n");
        assert!(seen.starts_with(&expected), "{style}: {seen}");
        let engine = "\n--engine\n/bin/engine\n--signal-exit-code\n143\n";
        assert!(seen.ends_with(engine), "{style}: {seen}");
    }
}

/// The head of a heterogeneous job is told nothing when a preemption begins, and nobody else would start workers again.
#[test]
fn a_job_of_two_components_whose_workers_all_left_is_queued_again() {
    let lives = |before: &str| {
        let scene = Scene::new(PASS_ON, 0);
        let path = scene.folder.path().display().to_string();
        // Whoever ends the job tells all of it within a moment: not before the coordinator is there to be told.
        let (up, told) = (scene.path("up"), scene.path("told"));
        let leave = format!("{LEAVE}until [ -e '{up}' ]; do /bin/sleep 0.02; done\nkill -TERM $$");
        beside(&scene, "worker", &leave);
        if !before.is_empty() {
            let moment = format!("until [ -e '{told}' ]; do /bin/sleep 0.02; done");
            scene.program("sleep", &moment);
        }
        let waits = "while :; do /bin/sleep 0.02; done";
        let text = format!("trap \": >'{told}'; exit 75\" TERM\n: >'{up}'\n{before}{waits}");
        beside(&scene, "coordinator", &text);
        scene.run(&heterogeneous(
            &Slurm::default(),
            &head_of(&path),
            &worker_of(&path),
            2,
        ))
    };
    assert_eq!(lives(""), (Some(75), true));
    // `scancel` tells the script, too.
    assert_eq!(lives("kill -TERM $PPID\n"), (Some(75), false));
}

/// Workers that others submitted queue themselves again with the head, and are ended with the run.
#[test]
fn a_head_whose_time_is_over_leaves_its_workers_in_the_queue() {
    let lives = |coordinator: &str| {
        let scene = Scene::new(PASS_ON, 0);
        let cancelled = scene.path("cancelled");
        scene.program("scancel", &format!("echo \"$@\" >'{cancelled}'"));
        beside(&scene, "coordinator", coordinator);
        let head_ = Head {
            workers: Some("w".into()),
            ..head_of(&scene.folder.path().display().to_string())
        };
        let (code, requeued) = scene.run(&head(&Slurm::default(), &head_));
        (code, requeued, fs::exists(cancelled).expect("readable"))
    };
    let warned = "trap 'exit 75' TERM\nkill -USR1 $PPID\nwhile :; do /bin/sleep 0.02; done";
    assert_eq!(lives(warned), (Some(75), true, false));
    assert_eq!(lives("exit 0"), (Some(0), false, true));
    assert_eq!(lives("exit 1"), (Some(1), false, true));
}

#[test]
fn a_short_job_is_told_of_its_limit_later() {
    let signal = |time: &str| {
        let slurm = Slurm {
            time: Some(time.into()),
            ..Slurm::default()
        };
        let script = worker(&slurm, &worker_of("/x"));
        let mut lines = script.lines();
        lines
            .find_map(|line| line.strip_prefix("#SBATCH --signal=B:USR1@"))
            .map(str::to_owned)
    };
    assert_eq!(signal("1").as_deref(), Some("20"));
    assert_eq!(signal("3").as_deref(), Some("60"));
    assert_eq!(signal("2-12").as_deref(), Some("60"));
    assert_eq!(signal("UNLIMITED").as_deref(), Some("60"));
}

/// A node that was cut off may still run an incarnation of a job which Slurm has started again elsewhere: that one must
/// not send the other back into the queue, nor say how it ended.
#[test]
fn an_earlier_incarnation_keeps_quiet() {
    let successor = "echo 1 >\"$(dirname \"$0\")/../50% logs/7_1.started\"";
    for code in [0, 75] {
        let ended = lived(&format!("{successor}\nexit {code}"), 0);
        assert_eq!(ended, (Some(code), false, None), "{code}");
    }
}
