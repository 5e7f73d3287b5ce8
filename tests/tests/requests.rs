//! What people ask of a run by its URI, through the real programs: pause, resume, cancel, drain, stop, gc, doctor.

use std::process::Output;
use std::time::Duration;

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
    assert!(output.status.success(), "{arguments:?}: {said}");
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
