//! Whole runs through the real coordinator and real workers, with the stand-in for engines.

use std::process::Command;
use std::time::Duration;

use distillery_common::checkpoint;
use distillery_common::proto::wire::coordinator_client::CoordinatorClient;
use distillery_common::proto::{PROTOCOL_VERSION, wire};
use distillery_common::security::{Join, ShowToken};
use distillery_common::storage::Store;
use distillery_tests::harness::{EngineKind, Run, sim_recipe};

const PATIENCE: Duration = Duration::from_secs(120);

fn sim(folder: &tempfile::TempDir) -> Run {
    Run::new(folder.path(), sim_recipe(), EngineKind::Sim).expect("the programs are built")
}

fn names(folder: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("the folder is there");
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("readable")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

#[test]
fn a_run_leaves_the_documented_tree_and_a_second_one_has_nothing_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = sim(&folder);
    run.finish(PATIENCE).expect("it finishes");
    run.no_orphans(PATIENCE).expect("all processes end");

    let output = run.output();
    let dataset = names(&output.join("trajectories"));
    let [dataset] = dataset.as_slice() else {
        panic!("{dataset:?} is not one set of trajectories");
    };
    let shards = names(&output.join("trajectories").join(dataset));
    let expected: Vec<String> = std::iter::once("MANIFEST".into())
        .chain((0..8).map(|shard| format!("shard-{shard:08}")))
        .collect();
    assert_eq!(shards, expected);
    for shard in &expected[1..] {
        let files = names(&output.join("trajectories").join(dataset).join(shard));
        assert_eq!(
            files.len(),
            3,
            "{shard} holds rows, embeddings and a COMMIT: {files:?}"
        );
    }
    for stage in ["seg4", "seg2"] {
        let checkpoints = names(&output.join("checkpoints").join(stage));
        let last = checkpoints.last().expect("a checkpoint");
        assert!(
            last.starts_with("0000000040-g"),
            "{stage} ends with step 40: {checkpoints:?}"
        );
    }
    let made = run.made().expect("everything is readable");
    let journal = names(&output.join("journal"));

    run.start().expect("starts again");
    let status = run.wait(PATIENCE).expect("it returns");
    assert!(status.success(), "{}", run.log_tail());
    assert_eq!(run.made().expect("still readable"), made);
    let again = names(&output.join("journal"));
    assert!(
        again.len() <= journal.len() + 2,
        "a finished run does nothing: {again:?}"
    );
}

#[test]
fn a_run_with_tls_goes_the_same_way() {
    let folder = tempfile::tempdir().expect("a folder");
    let recipe = sim_recipe().replace("{launcher: local,", "{launcher: local, tls: \"on\",");
    assert_ne!(recipe, sim_recipe());
    let run = Run::new(folder.path(), &recipe, EngineKind::Sim);
    let mut run = run.expect("the programs are built");
    run.finish(PATIENCE).expect("it finishes");
    let join = std::fs::read_to_string(run.output().join("join")).expect("a join string");
    assert!(join.starts_with("https://127.0.0.1:"), "TLS is on");
}

#[test]
fn two_runs_of_one_recipe_make_the_same_bits() {
    let made: Vec<_> = (0..2)
        .map(|_| {
            let folder = tempfile::tempdir().expect("a folder");
            let mut run = sim(&folder);
            run.finish(PATIENCE).expect("it finishes");
            run.made().expect("everything is readable")
        })
        .collect();
    assert_eq!(made[0], made[1]);
}

/// The same command beside a living run follows it to its end and says what it says.
#[test]
fn an_attached_command_prints_the_summary_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = sim(&folder).with("SIM_STEP_MS", 60).with_json();
    run.start().expect("starts");
    let at_work = run.output().join("trajectories");
    run.await_path(&at_work, PATIENCE).expect("it is at work");
    let attached = run.run_command().output().expect("starts");
    let said = String::from_utf8_lossy(&attached.stderr);
    assert!(said.contains("has this run; attached"), "{said}");
    assert!(attached.status.success(), "{said}");
    run.finish(PATIENCE).expect("it finishes");
    let printed: serde_json::Value =
        serde_json::from_slice(&attached.stdout).expect("one JSON value");
    assert_eq!(printed, run.result().expect("one JSON value"));
    let stored = std::fs::read(run.output().join("report/summary.json")).expect("a summary");
    let stored: serde_json::Value = serde_json::from_slice(&stored).expect("JSON");
    assert_eq!(printed, stored);
}

#[test]
fn a_run_trains_on_the_trajectories_of_another() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = sim(&folder);
    first.finish(PATIENCE).expect("it finishes");

    let other = tempfile::tempdir().expect("a folder");
    let reuse = format!("trajectories: {{uri: {}, ", first.output().display());
    let recipe = sim_recipe().replace("trajectories: {", &reuse);
    assert_ne!(recipe, sim_recipe());
    let second = Run::new(other.path(), &recipe, EngineKind::Sim);
    let mut second = second.expect("the programs are built");
    second.finish(PATIENCE).expect("it finishes");
    assert_eq!(
        second.made().expect("everything is readable"),
        first.made().expect("everything is readable"),
        "the same rows make the same students"
    );
    assert!(
        !second.output().join("trajectories").exists(),
        "nothing was drawn again"
    );
    let summary = std::fs::read_to_string(second.output().join("report/summary.json"));
    let summary = summary.expect("a summary");
    assert!(
        summary.contains("\"trajectory_rows\""),
        "the summary names the rows that were reused: {summary}"
    );
}

#[test]
fn students_start_from_what_the_recipe_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let recipe = sim_recipe().replace(
        "checkpoint:",
        "  - {name: lcm, method: lcm, from: teacher, steps: 10}\n  \
         - {name: side, from: seg4, segments: 2, steps: 10}\ncheckpoint:",
    );
    assert_ne!(recipe, sim_recipe());
    let run = Run::new(folder.path(), &recipe, EngineKind::Sim);
    let mut run = run.expect("the programs are built");
    run.finish(PATIENCE).expect("it finishes");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let store = Store::open(&run.output().display().to_string()).expect("a folder");
    for (stage, parent) in [
        ("seg4", None),
        ("seg2", Some("checkpoints/seg4/0000000040-g")),
        ("lcm", None),
        ("side", Some("checkpoints/seg4/0000000040-g")),
    ] {
        let newest = runtime.block_on(checkpoint::newest(&store, stage, |_, _| true));
        let newest = newest.expect("readable").expect("it was trained");
        let found = newest.manifest().training.parent.clone();
        let fits = match (&found, parent) {
            (Some(key), Some(start)) => key.starts_with(start),
            (None, None) => true,
            _ => false,
        };
        assert!(fits, "{stage} starts from {found:?}, not from {parent:?}");
    }
}

/// Runs a worker with `join` beside a living run; gives its exit code and what it said.
fn join_with(run: &Run, join: &str) -> (Option<i32>, String) {
    let output = run
        .command("worker")
        .args(["join", "--name", "guest"])
        .env("DISTILLERY_JOIN", join)
        .output()
        .expect("the worker starts");
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn a_worker_without_the_token_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = sim(&folder).with("SIM_TASK_MS", 400);
    run.start().expect("starts");
    let path = run.output().join("join");
    let join = run.read_when_there(&path, PATIENCE).expect("a join string");
    let join = join.trim();

    let (place, token) = join.rsplit_once('#').expect("a token at the end");
    let wrong: String = token
        .chars()
        .map(|digit| if digit == '0' { '1' } else { '0' })
        .collect();
    let (code, said) = join_with(&run, &format!("{place}#{wrong}"));
    assert_ne!(code, Some(0), "{said}");
    assert!(
        !said.contains(&wrong),
        "a token must not reach a log: {said}"
    );
    let explained = said.contains("token does not belong") || said.contains("does not follow");
    assert!(explained, "{said}");
    run.finish(PATIENCE).expect("the run is not disturbed");
}

#[tokio::test]
async fn a_worker_of_another_protocol_version_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = sim(&folder).with("SIM_TASK_MS", 400);
    run.start().expect("starts");
    let path = run.output().join("join");
    let join = run.read_when_there(&path, PATIENCE).expect("a join string");
    let join = Join::parse(&join, false).expect("usable");
    let channel = join
        .endpoint()
        .expect("an address")
        .connect()
        .await
        .expect("listens");
    let mut client = CoordinatorClient::with_interceptor(channel, ShowToken::new(join.token()));
    let hello = wire::Hello {
        protocol_version: PROTOCOL_VERSION + 1,
        name: "from-the-future".into(),
        ..wire::Hello::default()
    };
    let message = wire::WorkerMessage {
        message: Some(wire::worker_message::Message::Hello(hello)),
    };
    let refused = client.session(futures::stream::iter([message])).await;
    let status = refused.expect_err("another version is refused");
    assert!(status.message().contains("protocol version"), "{status}");
}

#[test]
fn the_programs_link_no_tensor_library() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = sim(&folder);
    for program in ["coordinator", "worker", "sim-engine"] {
        let bytes = std::fs::read(run.program(program)).expect("readable");
        for forbidden in [&b"libtorch"[..], b"libcudart", b"libnccl"] {
            let mut needed = forbidden.to_vec();
            needed.extend_from_slice(b".so");
            let found = bytes.windows(needed.len()).any(|window| window == needed);
            assert!(
                !found,
                "{program} names {}",
                String::from_utf8_lossy(&needed)
            );
        }
    }
    let help = Command::new(run.program("worker")).arg("--help").output();
    assert!(help.expect("runs").status.success());
}
