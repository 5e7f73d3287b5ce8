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

/// What a worker's script does when its worker is `srun` (a script): its exit code, whether it went back into the
/// queue, and the note it left.
fn lived(srun: &str, restarts: u32) -> (Option<i32>, bool, Option<String>) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().display().to_string();
    let programs = folder.path().join("programs");
    fs::create_dir(&programs).expect("a folder");
    let program = |name: &str, text: &str| {
        testing::program(&programs.join(name), &format!("#!/bin/bash\n{text}\n"));
    };
    program("srun", srun);
    let requeued = format!("{path}/requeued");
    program("scontrol", &format!("echo \"$@\" >'{requeued}'"));
    program("sleep", "true");
    fs::write(folder.path().join("join"), "a join string").expect("written");
    let script = folder.path().join("script");
    fs::write(&script, worker(&Slurm::default(), &worker_of(&path))).expect("written");
    let system = std::env::var("PATH").expect("a path");
    let output = Command::new("bash")
        .arg(&script)
        .env("PATH", format!("{}:{system}", programs.display()))
        .env("SLURM_JOB_ID", "8")
        .env("SLURM_ARRAY_JOB_ID", "7")
        .env("SLURM_ARRAY_TASK_ID", "1")
        .env("SLURM_JOB_NODELIST", "n1")
        .env("SLURM_RESTART_COUNT", restarts.to_string())
        .output()
        .expect("bash");
    let asked = fs::read_to_string(requeued).ok();
    if let Some(asked) = &asked {
        assert_eq!(asked, "requeue 8\n");
    }
    let note = fs::read_to_string(folder.path().join("50% logs/7_1.ended")).ok();
    (output.status.code(), asked.is_some(), note)
}

/// A worker that has its job told `signal` once that listens, and ends with `code` when it is told itself.
fn told(signal: &str, code: i32) -> String {
    format!(
        "trap 'exit {code}' USR1\n\
         kill -{signal} \"$PPID\"\n\
         while :; do /bin/sleep 0.02; done"
    )
}

#[test]
fn a_script_does_what_its_workers_exit_code_asks_for() {
    let note = |code: &str| Some(format!("{code}\n"));
    for code in [0, 1, 64] {
        let ended = lived(&format!("exit {code}"), 0);
        assert_eq!(
            ended,
            (Some(code), false, note(&code.to_string())),
            "{code}"
        );
    }
    // No coordinator was found: another try, but not for ever.
    assert_eq!(lived("exit 75", 0), (Some(0), true, None));
    assert_eq!(lived("exit 75", 8), (Some(75), false, note("75")));
    // Shortly before the time limit: another turn. When somebody ends the job: none.
    assert_eq!(lived(&told("USR1", 0), 8), (Some(0), true, None));
    assert_eq!(lived(&told("USR1", 0), 50), (Some(0), false, note("0")));
    assert_eq!(lived(&told("TERM", 0), 0), (Some(0), false, note("0")));
    assert_eq!(lived(&told("TERM", 75), 0), (Some(75), false, note("75")));
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
