//! What people ask of a run by its URI, through the real programs: pause, resume, cancel, drain, stop, gc, doctor.

use std::process::Output;
use std::time::Duration;

use distillery_common::security::Join;
use distillery_tests::harness::{EngineKind, Run, Target, signal, sim_recipe};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

fn slow(folder: &tempfile::TempDir) -> Run {
    let run = Run::new(folder.path(), sim_recipe(), EngineKind::Sim);
    let run = run.expect("the programs are built");
    run.with("SIM_TASK_MS", 300).with("SIM_STEP_MS", 30)
}

fn ask(run: &Run, arguments: &[&str]) -> Output {
    let mut command = run.command("coordinator");
    command.args(arguments).arg("--json");
    command.output().expect("the coordinator starts")
}

/// Asks and expects to be heard.
fn heard(run: &Run, arguments: &[&str]) -> Value {
    let output = ask(run, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{arguments:?}: {said}{out}");
    serde_json::from_slice(&output.stdout).expect("one JSON value")
}

fn uri(run: &Run) -> String {
    run.output().display().to_string()
}

fn state(run: &Run) -> Value {
    heard(run, &["status", &uri(run)])["state"].clone()
}

fn commits(run: &Run) -> usize {
    run.count_objects("COMMIT").expect("readable").0
}

fn await_commits(run: &Run, n: usize) {
    let enough = || run.output().join("trajectories").exists() && commits(run) >= n;
    run.await_some(|| enough().then_some(()), "COMMITs", PATIENCE)
        .expect("it works");
}

/// Waits until no worker has anything in hand.
fn await_idle(run: &Run) {
    let idle = || {
        let status = heard(run, &["status", &uri(run)]);
        let workers = status["workers"].as_array().expect("a list");
        let mut doing = workers.iter().map(|worker| &worker["doing"]);
        doing.all(|doing| doing == "").then_some(())
    };
    run.await_some(idle, "rest", PATIENCE).expect("it ends");
}

#[test]
fn a_paused_run_stands_still_over_a_restart_and_then_goes_on_to_the_same_students() {
    let undisturbed = tempfile::tempdir().expect("a folder");
    let mut reference = slow(&undisturbed);
    reference.finish(PATIENCE).expect("it finishes");

    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder);
    run.start().expect("starts");
    await_commits(&run, 1);
    let answer = heard(&run, &["pause", &uri(&run), "--reason", "night rates"]);
    assert_eq!(answer["heard"], "the coordinator was told");
    assert_eq!(state(&run), "paused");
    // The two attempts at work end; nothing follows.
    await_idle(&run);
    let after = commits(&run);
    std::thread::sleep(Duration::from_millis(1000));
    assert_eq!(commits(&run), after, "nothing new is begun");

    run.kill(Target::Coordinator, 0).expect("killed");
    run.wait(PATIENCE).expect("it ends");
    run.no_orphans(PATIENCE).expect("none");
    let stored = state(&run);
    let stored = stored.as_str().expect("text");
    assert!(stored.starts_with("paused"), "{stored}");
    run.start().expect("starts again");
    run.await_process(Target::Worker, PATIENCE)
        .expect("workers");
    std::thread::sleep(Duration::from_millis(1000));
    assert_eq!(commits(&run), after, "still paused");
    heard(&run, &["resume", &uri(&run)]);
    run.finish(PATIENCE).expect("it finishes");
    assert_eq!(
        run.made().expect("readable"),
        reference.made().expect("readable")
    );
    let status = heard(&run, &["status", &uri(&run)]);
    assert_eq!(status["state"], "succeeded");
}

#[test]
fn a_training_group_is_paused_at_its_next_checkpoint() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder).with("SIM_TASK_MS", 0);
    run.start().expect("starts");
    let training = run.output().join("checkpoints/seg4");
    run.await_path(&training, PATIENCE).expect("it trains");
    heard(&run, &["pause", &uri(&run)]);
    await_idle(&run);
    let stages = || heard(&run, &["status", &uri(&run)])["stages"].clone();
    let before = stages();
    std::thread::sleep(Duration::from_millis(1000));
    assert_eq!(stages(), before, "no step is made");
    let done = |stages: &Value| -> u64 {
        let stages = stages.as_array().expect("a list").iter();
        let training = stages.filter(|stage| stage["kind"] == "distill");
        training
            .map(|s| s["done"].as_u64().expect("a number"))
            .sum()
    };
    assert_eq!(done(&before) % 10, 0, "at a checkpoint: {before}");
    heard(&run, &["resume", &uri(&run)]);
    run.finish(PATIENCE).expect("it finishes");
}

#[test]
fn a_cancelled_run_ends_and_cannot_be_started_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder);
    run.start().expect("starts");
    await_commits(&run, 1);
    heard(&run, &["cancel", &uri(&run), "--reason", "wrong teacher"]);
    let status = run.wait(PATIENCE).expect("it ends");
    assert_eq!(status.code(), Some(1), "{}", run.log_tail());
    assert!(run.log().contains("cancelled: wrong teacher"));
    run.no_orphans(PATIENCE).expect("none");
    let made = commits(&run);
    run.start().expect("starts");
    let again = run.wait(PATIENCE).expect("it ends");
    assert_eq!(again.code(), Some(1));
    let said = run.log();
    assert!(
        said.contains("was cancelled (wrong teacher)") && said.contains("another output"),
        "{said}"
    );
    assert_eq!(commits(&run), made, "what it made stays");
    for request in ["pause", "resume", "cancel"] {
        let refused = ask(&run, &[request, &uri(&run)]);
        let said = String::from_utf8_lossy(&refused.stdout).into_owned();
        assert!(
            !refused.status.success() && said.contains("has ended (cancelled: wrong teacher)"),
            "{said}"
        );
    }
}

#[test]
fn without_a_coordinator_requests_go_into_the_journal() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder);
    run.start().expect("starts");
    await_commits(&run, 1);
    run.kill(Target::Coordinator, 0).expect("killed");
    run.wait(PATIENCE).expect("it ends");
    let said = heard(&run, &["pause", &uri(&run)]);
    assert!(
        said["heard"]
            .as_str()
            .is_some_and(|s| s.contains("journal"))
    );
    let refused = ask(&run, &["stop", &uri(&run)]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stdout).contains("no coordinator has"));
    heard(&run, &["resume", &uri(&run)]);
    run.start().expect("starts");
    run.finish(PATIENCE).expect("it finishes");

    let nowhere = ask(&run, &["pause", &folder.path().display().to_string()]);
    assert!(String::from_utf8_lossy(&nowhere.stdout).contains("there is no run"));
}

#[test]
fn a_drained_worker_leaves_and_is_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder);
    run.start().expect("starts");
    await_commits(&run, 1);
    let workers = || run.processes_of(Target::Worker);
    let before = workers();
    heard(&run, &["drain", &uri(&run), "local-0"]);
    let gone = || before.iter().any(|pid| !workers().contains(pid));
    run.await_some(|| gone().then_some(()), "departure", PATIENCE)
        .expect("one leaves");
    run.finish(PATIENCE).expect("it finishes");
}

#[test]
fn a_stopped_run_resumes() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder);
    run.start().expect("starts");
    await_commits(&run, 1);
    heard(&run, &["stop", &uri(&run)]);
    let status = run.wait(PATIENCE).expect("it ends");
    assert_eq!(status.code(), Some(75), "{}", run.log_tail());
    run.start().expect("starts");
    run.finish(PATIENCE).expect("it finishes");
}

/// Ctrl-C in a command that only looks on once stopped the run that it looked at.
#[test]
fn whoever_looks_on_and_leaves_changes_nothing_of_the_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder).with("SIM_TASK_MS", 1000);
    run.start().expect("starts");
    await_commits(&run, 1);
    let seen = folder.path().join("seen");
    let mut attached = run.run_command();
    attached.stderr(std::fs::File::create(&seen).expect("writable"));
    let mut attached = attached.spawn().expect("starts");
    let says = |words: &'static str| {
        let said = std::fs::read_to_string(&seen).unwrap_or_default();
        said.contains(words).then_some(())
    };
    run.await_some(|| says("attached"), "attachment", PATIENCE)
        .expect("it is attached");
    std::thread::sleep(Duration::from_millis(300));
    let before = journal(&run);
    signal(attached.id(), "INT").expect("it lives");
    let status = attached.wait().expect("it ends");
    assert_eq!(status.code(), Some(75));
    for words in ["detached; the run goes on", "`coordinator stop "] {
        assert!(says(words).is_some(), "{words}");
    }
    run.finish(PATIENCE).expect("it goes on to its end");
    let after = journal(&run);
    assert_eq!(after[..before.len()], before, "what was written stays");
    let text = after.concat();
    for stopped in ["stopped", "paused", "cancelled"] {
        assert!(!text.contains(stopped), "{stopped} in {text}");
    }
    assert_eq!(text.matches("term_claimed").count(), 1);
}

/// Every segment of the run's journal, in order.
fn journal(run: &Run) -> Vec<String> {
    let entries = std::fs::read_dir(run.output().join("journal")).expect("there");
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let read = |path| std::fs::read_to_string(path).expect("text");
    paths.into_iter().map(read).collect()
}

#[test]
fn garbage_of_a_run_that_somebody_has_is_listed_and_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder).with("SIM_TASK_MS", 1000);
    run.start().expect("starts");
    await_commits(&run, 1);
    heard(&run, &["gc", &uri(&run)]);
    let refused = ask(&run, &["gc", &uri(&run), "--delete", "--older-than", "0"]);
    assert!(!refused.status.success());
    let said = [refused.stdout, refused.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("nothing is deleted while it does"), "{said}");
    run.finish(PATIENCE).expect("it finishes");
}

#[test]
fn garbage_is_listed_first_and_removed_when_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder).with("SIM_TASK_MS", 0).with("SIM_STEP_MS", 0);
    run.finish(PATIENCE).expect("it finishes");
    let made = run.made().expect("readable");
    let clean = heard(&run, &["gc", &uri(&run)]);
    assert_eq!(clean["objects"], Value::Array(vec![]));

    let datasets = std::fs::read_dir(run.output().join("trajectories")).expect("there");
    let dataset = datasets.flatten().next().expect("one").path();
    let left = dataset.join("shard-00000003/a9-99.parquet");
    std::fs::write(&left, b"an attempt that lost").expect("writable");
    let dry = heard(&run, &["gc", &uri(&run)]);
    assert_eq!(dry["objects"].as_array().expect("a list").len(), 1);
    assert_eq!(
        (&dry["bytes"], &dry["deleted"]),
        (&20.into(), &false.into())
    );
    assert!(left.exists(), "dry by default");
    heard(&run, &["gc", &uri(&run), "--delete"]);
    assert!(!left.exists());
    assert_eq!(run.made().expect("still readable"), made);
}

#[test]
fn the_doctor_finds_a_folder_well_and_leaves_nothing_in_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = slow(&folder);
    let place = tempfile::tempdir().expect("a folder");
    let said = heard(&run, &["doctor", &place.path().display().to_string()]);
    assert_eq!(said["broken"], 0, "{said}");
    assert_eq!(said["promises"].as_array().expect("a list").len(), 8);
    let mut files = Vec::new();
    let mut folders = vec![place.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("readable").flatten() {
            match entry.path() {
                path if path.is_dir() => folders.push(path),
                path => files.push(path),
            }
        }
    }
    assert!(files.is_empty(), "{files:?}");
    let nowhere = ask(&run, &["doctor", "/nonexistent/place"]);
    assert!(!nowhere.status.success());
}

#[test]
fn a_coordinator_that_takes_another_token_is_neither_fenced_nor_taken_for_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder).with("SIM_TASK_MS", 2000);
    run.start().expect("starts");
    await_commits(&run, 1);
    let other = "f".repeat(64);
    let token = run.output().join("token");
    let join = run.output().join("join");
    let aside = |path: &std::path::Path| path.with_extension("aside");
    for known in [Some(&other), None] {
        if known.is_none() {
            for path in [&token, &join] {
                std::fs::rename(path, aside(path)).expect("it was there");
            }
        }
        for command in [
            run.run_command(),
            asking(&run, "status"),
            asking(&run, "stop"),
            asking(&run, "cancel"),
            asking(&run, "workers"),
        ] {
            let mut command = command;
            if let Some(other) = known {
                command.env("DISTILLERY_TOKEN", other);
            }
            let output = command.output().expect("it starts");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
            assert!(
                said.contains("somebody answers at") && said.contains("DISTILLERY_TOKEN"),
                "{command:?}: {said}"
            );
        }
        assert!(!token.exists() || known.is_some(), "no token was made");
    }
    for path in [&token, &join] {
        std::fs::rename(aside(path), path).expect("there again");
    }
    assert_eq!(state(&run), "running");
    heard(&run, &["stop", &uri(&run), "--now"]);
    let ended = run.wait(PATIENCE).expect("it stops");
    assert_eq!(ended.code(), Some(75), "{}", run.log_tail());
    assert!(!run.log().contains("another coordinator"), "never fenced");
}

#[test]
fn a_run_that_ended_in_order_is_not_looked_for_where_somebody_else_listens_now() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder).with("SIM_TASK_MS", 0).with("SIM_STEP_MS", 0);
    run.start().expect("starts");
    let join = run.output().join("join");
    let join = run.read_when_there(&join, PATIENCE).expect("a join string");
    let join = Join::parse(&join, false).expect("usable");
    run.finish(PATIENCE).expect("it finishes");
    let _other = std::net::TcpListener::bind(join.address()).expect("the port is free again");
    for path in ["token", "join"] {
        std::fs::remove_file(run.output().join(path)).expect("it was there");
    }
    assert_eq!(state(&run), "succeeded");
}

fn asking(run: &Run, what: &str) -> std::process::Command {
    let mut command = run.command("coordinator");
    command.args([what, &uri(run)]);
    command
}

/// A run whose worker somebody else started, and who that is.
fn external(folder: &tempfile::TempDir) -> (Run, std::process::Child) {
    let local = "launcher: local, workers: {min: 2, max: 2}";
    let recipe = sim_recipe().replace(local, "launcher: external, workers: {min: 1, max: 2}");
    assert_ne!(recipe, sim_recipe());
    let run = Run::new(folder.path(), &recipe, EngineKind::Sim).expect("the programs are built");
    let mut run = run.with("SIM_TASK_MS", 300).with("SIM_STEP_MS", 30);
    run.start().expect("starts");
    let join = run.output().join("join");
    run.read_when_there(&join, PATIENCE).expect("a join string");
    let mut worker = run.command("worker");
    worker.args(["join", "--coordinator", &format!("@{}", join.display())]);
    let worker = worker.spawn().expect("starts");
    await_commits(&run, 1);
    (run, worker)
}

#[test]
fn a_worker_comes_again_where_a_scheduler_ended_its_coordinator_and_not_where_somebody_did() {
    for (by_scheduler, code) in [(true, 75), (false, 0)] {
        let folder = tempfile::tempdir().expect("a folder");
        let (mut run, mut worker) = external(&folder);
        if by_scheduler {
            let coordinator = run.processes_of(Target::Coordinator);
            signal(coordinator[0], "TERM").expect("it lives");
        } else {
            heard(&run, &["stop", &uri(&run)]);
        }
        let ended = run.wait(PATIENCE).expect("it stops");
        assert_eq!(ended.code(), Some(75), "{}", run.log_tail());
        let left = worker.wait().expect("it leaves");
        assert_eq!(left.code(), Some(code), "{}", run.log_tail());
    }
}

#[test]
fn a_signal_that_comes_twice_at_once_and_the_end_of_a_terminal_stop_after_a_checkpoint() {
    for signals in [["TERM", "TERM"], ["HUP", "TERM"]] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut run = slow(&folder);
        run.start().expect("starts");
        await_commits(&run, 1);
        let coordinator = run
            .await_process(Target::Coordinator, PATIENCE)
            .expect("it lives");
        for name in signals {
            signal(coordinator, name).expect("it lives");
        }
        let ended = run.wait(PATIENCE).expect("it stops");
        assert_eq!(ended.code(), Some(75), "{}", run.log_tail());
        let said = run.log();
        assert_eq!(
            said.matches("stopping after a checkpoint").count(),
            1,
            "{said}"
        );
        assert!(!said.contains("stopping now"), "{said}");
    }
}

/// What the doctor says of `name`, started with `programs` alone on its PATH and, before that, by `shell`.
fn examined(run: &Run, name: &str, programs: &std::path::Path, shell: &str) -> (String, String) {
    let doctor = run.command("coordinator");
    let mut command = std::process::Command::new("/bin/sh");
    command.args(["-c", &format!("{shell} exec \"$@\""), "sh"]);
    command.arg(doctor.get_program()).args(["doctor", "--json"]);
    for (variable, value) in doctor.get_envs() {
        command.env(variable, value.expect("set"));
    }
    let output = command.env("PATH", programs).output().expect("it starts");
    let said: Value = serde_json::from_slice(&output.stdout).expect("one JSON value");
    let checks = said["checks"].as_array().expect("a list");
    let check = checks.iter().find(|check| check["name"] == name);
    let check = check.expect("it is looked at");
    let text = |key: &str| check[key].as_str().expect("text").to_owned();
    (text("state"), text("seen"))
}

#[test]
fn the_doctor_names_each_program_of_slurm_that_the_launcher_lacks() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().expect("a folder");
    let run = slow(&folder);
    let programs = folder.path().join("programs");
    std::fs::create_dir(&programs).expect("made");
    let slurm = || examined(&run, "Slurm", &programs, "");
    let write = |name: &str, text: &str, mode: u32| {
        let path = programs.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("set");
    };
    assert_eq!(slurm().0, "ok");
    assert!(slurm().1.starts_with("not here"), "{}", slurm().1);

    let all = ["sbatch", "squeue", "scancel", "scontrol", "sinfo"];
    all.iter().for_each(|name| write(name, "echo long", 0o755));
    assert_eq!(slurm(), ("ok".into(), "partitions long".into()));
    for name in all {
        // A file that cannot be started is no program.
        write(name, "echo long", 0o644);
        let (state, seen) = slurm();
        assert_eq!(state, "WARN", "{seen}");
        assert!(
            seen.starts_with(&format!("missing: {name}; here: ")),
            "{seen}"
        );
        write(name, "echo long", 0o755);
    }
    write(
        "sinfo",
        "echo 'slurm_load_partitions: Unable to contact' >&2; exit 1",
        0o755,
    );
    let (state, seen) = slurm();
    assert_eq!(state, "WARN", "{seen}");
    assert!(seen.starts_with("sinfo does not answer: "), "{seen}");
    assert!(seen.ends_with("Unable to contact"), "{seen}");
    std::fs::remove_file(programs.join("squeue")).expect("removed");
    let (_, seen) = slurm();
    assert!(
        seen.starts_with("missing: squeue; here: ") && seen.contains("sinfo does not answer"),
        "{seen}"
    );
    write("squeue", "", 0o755);
    write("sinfo", "", 0o755);
    let (state, seen) = slurm();
    assert_eq!(state, "WARN", "{seen}");
    assert!(seen.contains("no partition"), "{seen}");
}

#[test]
fn the_doctor_counts_the_connections_that_the_hard_limit_allows() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = slow(&folder);
    let files = |limits: &str| examined(&run, "open files", folder.path(), limits);
    // The soft limit is what a coordinator raises.
    let (state, seen) = files("ulimit -Sn 256; ulimit -Hn 4096;");
    assert_eq!(state, "ok", "{seen}");
    assert!(seen.contains("room for 2560 connections"), "{seen}");
    let (state, seen) = files("ulimit -n 1024;");
    assert_eq!(state, "WARN", "{seen}");
    assert!(seen.contains("room for 512 connections"), "{seen}");
}

/// What cannot be written is told with its cause: the name of what failed says nothing about how to mend it.
#[test]
fn the_doctor_says_why_nothing_can_be_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = slow(&folder);
    let place = tempfile::tempdir().expect("a folder");
    // Where its trials would go lies a file.
    std::fs::write(place.path().join("probe"), "in the way").expect("writable");
    let asked = ask(&run, &["doctor", &place.path().display().to_string()]);
    assert!(!asked.status.success());
    let said = String::from_utf8_lossy(&asked.stdout).into_owned();
    let broken: Value = serde_json::from_str(&said).expect("JSON");
    let first = &broken["promises"][0];
    let seen = first["seen"].as_str().unwrap_or_default();
    assert!(seen.contains("Not a directory"), "{first}");
    assert_eq!(first["needed_for"], "a run can keep anything at all");
}
