//! Slurm: the scripts of `deploy/slurm`, and three runs on a real cluster of this machine's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use std::time::Duration;

use distillery_tests::harness::{EngineKind, Run, Target, programs, repository, sim_recipe};

const WAIT: Duration = Duration::from_secs(120);

/// The scripts that `render` writes for the recipe in `deploy/slurm`.
fn render(style: &str, folder: &Path) {
    let coordinator = programs()
        .expect("the programs are built")
        .join("coordinator");
    let output = Command::new(coordinator)
        .args(["render", "slurm", "--style", style])
        .args(["--coordinator", "/shared/distillery/bin/coordinator"])
        .args(["--recipe", "/shared/distillery/recipe.yaml", "--folder"])
        .arg(folder)
        .arg(repository().join("deploy/slurm/recipe.yaml"))
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{style}: {said}");
}

fn scripts(folder: &Path) -> Vec<(PathBuf, String)> {
    let entries = fs::read_dir(folder).expect("a folder of scripts");
    let mut found: Vec<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .map(|path| {
            let text = fs::read_to_string(&path).expect("a script");
            (path.file_name().expect("a name").into(), text)
        })
        .collect();
    found.sort();
    found
}

/// After a change that is meant, write them anew with `UPDATE_EXPECTED=1` and read every one.
#[test]
fn the_scripts_of_the_repository_are_those_that_render_writes() {
    for style in ["array", "external", "heterogeneous"] {
        let kept = repository().join("deploy/slurm").join(style);
        if std::env::var_os("UPDATE_EXPECTED").is_some() {
            render(style, &kept);
        }
        let folder = tempfile::tempdir().expect("a folder");
        render(style, folder.path());
        let (written, kept) = (scripts(folder.path()), scripts(&kept));
        assert!(!written.is_empty());
        assert_eq!(written, kept, "deploy/slurm/{style}");
    }
}

#[test]
fn render_says_what_it_cannot_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let recipe = repository().join("deploy/slurm/recipe.yaml");
    let coordinator = programs()
        .expect("the programs are built")
        .join("coordinator");
    let cases: [(&[&str], i32, &str); 5] = [
        (
            &[
                "--set",
                "cluster.launcher=local",
                "--set",
                "cluster.slurm=null",
            ],
            1,
            "cluster.launcher is not slurm",
        ),
        (
            &["--style", "external", "--set", "output=s3://b/run"],
            1,
            "use --style array",
        ),
        (&["--set", "cluster.slurm.time=1h"], 2, "is no time limit"),
        (
            &["--set", "cluster.slurm.srun=[image]"],
            2,
            "is no option of srun",
        ),
        (
            &["--set", "cluster.slurm.container=[apptainer exec]"],
            2,
            "a word in each entry",
        ),
    ];
    for (arguments, code, says) in cases {
        let output = Command::new(&coordinator)
            .args(["render", "slurm"])
            .arg(&recipe)
            .args(arguments)
            .args(["--folder"])
            .arg(folder.path().join("scripts"))
            .output()
            .expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
        assert!(!folder.path().join("scripts").exists(), "{arguments:?}");
    }
}

#[test]
fn a_script_that_is_printed_is_what_sbatch_takes() {
    let coordinator = programs()
        .expect("the programs are built")
        .join("coordinator");
    let printed = |style: &str| {
        let output = Command::new(&coordinator)
            .args(["render", "slurm", "--style", style])
            .args(["--coordinator", "/shared/distillery/bin/coordinator"])
            .args(["--recipe", "/shared/distillery/recipe.yaml"])
            .arg(repository().join("deploy/slurm/recipe.yaml"))
            .output()
            .expect("it starts");
        String::from_utf8(output.stdout).expect("text")
    };
    for (style, file) in [
        ("array", "array/head.sbatch"),
        ("heterogeneous", "heterogeneous/job.sbatch"),
    ] {
        let kept = fs::read_to_string(repository().join("deploy/slurm").join(file));
        assert_eq!(printed(style), kept.expect("a script"), "{style}");
    }
    let two = printed("external");
    for name in ["head.sbatch", "workers.sbatch"] {
        assert!(two.contains(&format!("# ==== {name}: sbatch")), "{two}");
    }
}

/// `scancel` signals a job's script and its worker, and the script passes the signal on: that is one wish to leave, not
/// two, so the worker ends what it has in hand.
#[test]
fn a_signal_and_its_echo_drain_a_worker_once() {
    let patience = Duration::from_secs(60);
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), sim_recipe(), EngineKind::Sim).expect("a run");
    let mut run = run.with("SIM_TASK_MS", 2000);
    run.start().expect("it starts");
    let engine = run.await_process(Target::Engine, patience);
    engine.expect("an engine, so that its worker works");
    let worker = run.processes_of(Target::Worker)[0];
    let log = |name: &str| {
        let path = run.output().join("logs").join(name);
        fs::read_to_string(path).unwrap_or_default()
    };
    let logs = || log("local-0.log") + &log("local-1.log");
    let is_ready = || logs().contains("the engine is ready").then_some(());
    run.await_some(is_ready, "ready engine", patience)
        .expect("both start");
    // One right after the other: it leaves as soon as it has nothing in hand.
    let signals = ["TERM", "USR1", "TERM"].map(|name| format!("kill -{name} {worker}"));
    let sent = Command::new("sh")
        .args(["-c", &signals.join(" && ")])
        .status();
    assert!(sent.expect("sh starts").success(), "it lives");
    let has_left = || (!run.processes_of(Target::Worker).contains(&worker)).then_some(());
    run.await_some(has_left, "end of the worker", patience)
        .expect("it leaves");
    let said = logs();
    assert_eq!(said.matches("told to leave signal=").count(), 1, "{said}");
    assert!(!said.contains("killing the engine"), "{said}");
    run.finish(Duration::from_secs(120)).expect("the run ends");
}

/// Slurm's programs as scripts on a path of their own: `sbatch` keeps what it was handed and answers as the file `answer`
/// says; the queue is empty.
fn stand_in_slurm(folder: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let programs = folder.join("slurm");
    fs::create_dir(&programs).expect("a folder");
    let script = |name: &str, text: String| {
        let path = programs.join(name);
        fs::write(&path, text).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    };
    let here = programs.display();
    script(
        "sbatch",
        format!(
            "#!/bin/sh\nenv >{here}/environment.partial\nmv {here}/environment.partial {here}/environment\n. {here}/answer\n"
        ),
    );
    script("squeue", "#!/bin/sh\n".into());
    script(
        "scancel",
        format!("#!/bin/sh\nenv >{here}/environment-of-the-end\n"),
    );
    programs
}

/// What `sbatch` answers from now on. It may be reading what it was to answer before.
fn answer(programs: &Path, answer: &str) {
    let partial = programs.join("answer.partial");
    fs::write(&partial, answer).expect("written");
    fs::rename(partial, programs.join("answer")).expect("renamed");
}

/// A run whose workers are jobs of the stand-in above.
fn with_stand_in(folder: &Path, cluster: &str, first: &str) -> (Run, PathBuf) {
    let programs = stand_in_slurm(folder);
    answer(&programs, first);
    let recipe = sim_recipe().replace("launcher: local", cluster);
    let run = Run::new(folder, &recipe, EngineKind::Sim).expect("a run");
    let path = std::env::var("PATH").unwrap_or_default();
    let run = run.with("PATH", format!("{}:{path}", programs.display()));
    (run, programs)
}

#[test]
fn a_job_is_handed_no_variable_that_holds_the_token() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = "launcher: slurm, token: \"${env:TOKEN_OF_THE_TEST}\", slurm: {poll: 1}";
    let (run, programs) = with_stand_in(folder.path(), cluster, "echo 1\n");
    let token = distillery_common::security::Token::generate().expect("random");
    let token = token.reveal();
    let mut run = run
        .with("TOKEN_OF_THE_TEST", &token)
        .with("A_COPY_OF_IT", format!("Bearer {}", token.to_uppercase()))
        .with("AWS_SECRET_ACCESS_KEY", "of the bucket");
    run.start().expect("starts");
    let handed = programs.join("environment");
    let handed = run.read_when_there(&handed, WAIT).expect("a submission");
    let handed = handed.to_lowercase();
    assert!(
        handed.contains("of the bucket"),
        "workers need it: {handed}"
    );
    assert!(handed.contains("path="), "{handed}");
    assert!(!handed.contains(&token), "the token is handed on");
    assert!(!handed.contains("token_of_the_test"), "nor is it empty");
    run.kill(Target::Coordinator, 0).expect("killed");
    run.wait(WAIT).expect("it ends");
    // Nor is the program that ends them when nobody has the run.
    let mut command = run.command("coordinator");
    command.arg("cancel").arg(run.output());
    let said = command.output().expect("it starts");
    assert!(said.status.success(), "{said:?}");
    let handed = fs::read_to_string(programs.join("environment-of-the-end"));
    let handed = handed.expect("they are ended").to_lowercase();
    assert!(handed.contains("of the bucket"), "{handed}");
    assert!(!handed.contains(&token), "the token is handed on");
}

fn status(run: &Run) -> String {
    let mut command = run.command("coordinator");
    command.arg("status").arg(run.output());
    let output = command.output().expect("it starts");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Slurm's words for a limit that a user has reached: they pass, and `status` says what is waited for.
#[test]
fn a_limit_on_jobs_is_waited_out_and_status_says_so() {
    let full = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2\n\
        echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user'\"'\"'s size and/or time limits)' >&2\n\
        echo refused >>$(dirname $0)/refusals; exit 1\n";
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = "launcher: slurm, slurm: {poll: 1}";
    let (mut run, programs) = with_stand_in(folder.path(), cluster, full);
    run.start().expect("starts");
    let refusals = || fs::read_to_string(programs.join("refusals")).unwrap_or_default();
    // More than it takes to give up on what is refused for good.
    let often = || (refusals().lines().count() >= 4).then_some(());
    run.await_some(often, "fourth refusal", WAIT)
        .expect("it tries again");
    let said = status(&run);
    assert!(said.contains("QOSMaxSubmitJobPerUserLimit"), "{said}");
    assert_eq!(run.ended().expect("known"), None, "{}", run.log_tail());
    let told = run.log();
    let told = told.matches("Slurm takes no more workers").count();
    assert!(
        told <= 2,
        "as news of the launcher and of the run: {}",
        run.log()
    );
    answer(&programs, "echo 7\n");
    let gone = || (!status(&run).contains("QOSMaxSubmitJob")).then_some(());
    run.await_some(gone, "end of the limit", WAIT)
        .expect("it is taken");

    // What is refused for good is not waited out.
    answer(
        &programs,
        "echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1\n",
    );
    let status = run.wait(WAIT).expect("it ends");
    assert_eq!(status.code(), Some(1), "{}", run.log_tail());
    let said = run.log();
    assert!(
        said.contains("3 times in a row") && said.contains("Invalid qos"),
        "{said}"
    );
}

/// The short form of `make test-slurm`. Where there is no root and no Slurm it says so, unless
/// `DISTILLERY_REQUIRE_SLURM=1`.
#[test]
fn runs_on_a_real_slurm_live_through_a_requeue_and_a_killed_coordinator() {
    let output = Command::new(env!("CARGO_BIN_EXE_test-slurm"))
        .arg("--short")
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{errors}");
    if said.contains("SKIPPED") {
        // Past the capture of tests: nobody should believe that this was tested.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), said.as_bytes());
    } else {
        assert!(said.contains("3 of 3 cases"), "{said}{errors}");
    }
}
