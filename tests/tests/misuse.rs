//! What people and broken programs do to a run that they should not: each is refused in clear words, and nothing
//! in the store is changed by it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use distillery_common::ids::Digest;
use distillery_common::proto::wire::coordinator_client::CoordinatorClient;
use distillery_common::proto::wire::{self, report, worker_message};
use distillery_common::proto::{PROTOCOL_VERSION, to_wire};
use distillery_common::security::{Join, ShowToken};
use distillery_common::task::{Failure, FailureClass};
use distillery_common::telemetry::Stopwatch;
use distillery_tests::harness::{EngineKind, Run, Target, sim_recipe};

const PATIENCE: Duration = Duration::from_secs(120);
/// Exit code of a run that the same command resumes.
const TRY_AGAIN: i32 = 75;

fn sim(folder: &tempfile::TempDir) -> Run {
    Run::new(folder.path(), sim_recipe(), EngineKind::Sim).expect("the programs are built")
}

/// Files of the run with their contents; what lies beside the objects (secrets, logs) does not count.
fn tree(run: &Run) -> Vec<(PathBuf, Digest)> {
    let root = run.output();
    let mut folders = vec![root.clone()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("readable") {
            let path = entry.expect("readable").path();
            let key = path.strip_prefix(&root).expect("below").to_owned();
            let beside = ["join", "token", "page", "page-key", "logs"]
                .iter()
                .any(|name| key == Path::new(name));
            if path.is_dir() && !beside {
                folders.push(path);
            } else if !beside {
                found.push((key, Digest::of(&std::fs::read(&path).expect("readable"))));
            }
        }
    }
    found.sort();
    found
}

/// What a command said on both streams.
fn words(output: &Output) -> String {
    let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stdout));
    said
}

fn audit(run: &Run, other: &Run) {
    let output = Command::new(env!("CARGO_BIN_EXE_audit"))
        .arg(run.output())
        .arg("--against")
        .arg(other.output())
        .output()
        .expect("the auditor starts");
    assert!(output.status.success(), "{}", words(&output));
}

/// A run that was interrupted while it drew trajectories: it has a journal, and more to do.
fn interrupted(folder: &tempfile::TempDir) -> Run {
    let mut run = sim(folder).with("SIM_TASK_MS", 300);
    run.start().expect("starts");
    let committed = || (run.count_objects("COMMIT").ok()?.0 > 0).then_some(());
    run.await_some(committed, "COMMIT", PATIENCE)
        .expect("it is at work");
    run.kill(Target::All, 0).expect("killed");
    run.wait(PATIENCE).expect("it is gone");
    run.no_orphans(PATIENCE).expect("all are gone");
    run
}

#[test]
fn another_recipe_is_refused_with_the_difference() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = interrupted(&folder);
    let before = tree(&run);
    let mut command = run.run_command();
    command.args(["--set", "trajectories.count=72", "--set", "seed=8"]);
    let output = command.output().expect("starts");
    let said = words(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("holds a run of another recipe"), "{said}");
    for difference in ["count", "64", "72", "seed"] {
        assert!(said.contains(difference), "{difference} is not in {said}");
    }
    assert_eq!(tree(&run), before);
}

type Damage = (&'static str, fn(&Path), &'static str);

#[test]
fn a_journal_that_is_none_is_refused_and_left_as_it_is() {
    let damages: [Damage; 5] = [
        (
            "a hole",
            |journal| std::fs::remove_file(journal.join(segment(0))).expect("there"),
            "segment 0 is missing although later ones exist",
        ),
        (
            "a truncated segment",
            |journal| {
                let path = journal.join(segment(1));
                let bytes = std::fs::read(&path).expect("there");
                std::fs::write(path, &bytes[..bytes.len() - 20]).expect("writable");
            },
            "segment 1 is not readable",
        ),
        (
            "an empty segment",
            |journal| std::fs::write(journal.join(segment(1)), "").expect("writable"),
            "segment 1 is not readable",
        ),
        (
            "valid JSON of something else",
            |journal| {
                let other = r#"{"name":"left-pad","version":"1.3.0"}"#;
                std::fs::write(journal.join(segment(1)), other).expect("writable");
            },
            "segment 1 is not readable",
        ),
        (
            "a segment of a later format",
            |journal| {
                let path = journal.join(segment(1));
                let text = std::fs::read_to_string(&path).expect("there");
                let later = text.replace("\"format_version\":1", "\"format_version\":9");
                assert_ne!(later, text);
                std::fs::write(path, later).expect("writable");
            },
            "it has format version 9; this program reads version 1",
        ),
    ];
    for (what, damage, says) in damages {
        let folder = tempfile::tempdir().expect("a folder");
        let run = interrupted(&folder);
        damage(&run.output().join("journal"));
        let before = tree(&run);
        let output = run.run_command().output().expect("starts");
        let said = words(&output);
        assert_eq!(output.status.code(), Some(1), "{what}: {said}");
        assert!(said.contains(says), "{what}: {said}");
        assert_eq!(tree(&run), before, "{what}");
    }
}

/// Well-formed, of the same term, and of another run: its records were taken for this run's own.
#[test]
fn a_segment_of_another_run_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let elsewhere = tempfile::tempdir().expect("a folder");
    let (run, other) = (interrupted(&folder), interrupted(&elsewhere));
    let place = |run: &Run| run.output().join("journal").join(segment(1));
    std::fs::copy(place(&other), place(&run)).expect("copied");
    let before = tree(&run);
    let output = run.run_command().output().expect("starts");
    let said = words(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for says in ["segment 1", "did not claim term 1", "move it away"] {
        assert!(said.contains(says), "{says} is not in {said}");
    }
    assert_eq!(tree(&run), before);
}

fn segment(seq: u64) -> String {
    format!("{seq:020}")
}

#[test]
fn a_commit_whose_rows_are_gone_ends_the_run_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = interrupted(&folder);
    let shards = std::fs::read_dir(run.output().join("trajectories")).expect("there");
    let dataset = shards.flatten().next().expect("one dataset").path();
    let mut shards: Vec<PathBuf> = std::fs::read_dir(&dataset)
        .expect("there")
        .flatten()
        .map(|entry| entry.path())
        .filter(|shard| shard.join("COMMIT").is_file())
        .collect();
    shards.sort();
    let shard = shards.first().expect("a committed shard");
    let rows = std::fs::read_dir(shard).expect("there").flatten();
    let rows = rows
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "parquet"));
    let rows = rows.expect("rows");
    std::fs::remove_file(&rows).expect("deleted");
    let mut run_again = run.run_command();
    let output = run_again.output().expect("starts");
    let said = words(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let name = rows
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    assert!(said.contains(&name), "{name} is not in {said}");
    let sealed = dataset.join("MANIFEST");
    assert!(!sealed.exists(), "nothing was sealed without the rows");
    run.kill(Target::All, 0).expect("nothing is left");
    run.wait(PATIENCE).expect("it is gone");
}

#[test]
fn a_takeover_ends_the_coordinator_before_it_even_if_that_has_nothing_to_write() {
    let undisturbed = tempfile::tempdir().expect("a folder");
    let mut undisturbed_run = sim(&undisturbed);
    undisturbed_run.finish(PATIENCE).expect("it finishes");

    let folder = tempfile::tempdir().expect("a folder");
    let local = "launcher: local, workers: {min: 2, max: 2}";
    let recipe = sim_recipe().replace(local, "launcher: external, workers: {min: 1, max: 2}");
    assert_ne!(recipe, sim_recipe());
    let run = Run::new(folder.path(), &recipe, EngineKind::Sim).expect("the programs are built");
    let mut run = run.with("DISTILLERY_TIMINGS", "first_formation=1s,reattach=1s");
    run.start().expect("starts");
    let join = run.output().join("join");
    let first = run.read_when_there(&join, PATIENCE).expect("a join string");

    let mut second = run.run_command();
    second.arg("--takeover");
    let mut second = second.spawn().expect("starts");
    let status = run.wait(PATIENCE).expect("the first one ends");
    assert_eq!(status.code(), Some(TRY_AGAIN), "{}", run.log_tail());
    let said = run.log();
    assert!(
        said.contains("another coordinator has taken over this run with term 2"),
        "{said}"
    );

    let replaced = || {
        std::fs::read_to_string(&join)
            .ok()
            .filter(|now| *now != first)
    };
    run.await_some(replaced, "join string of the second", PATIENCE)
        .expect("it serves");
    let mut worker = run.command("worker");
    worker.args(["join", "--coordinator", &format!("@{}", join.display())]);
    let mut worker = worker.spawn().expect("starts");
    assert!(second.wait().expect("it ends").success());
    worker.wait().expect("it ends with the run");
    audit(&run, &undisturbed_run);
}

/// A living run, and what admits to it.
struct Live {
    run: Run,
    join: Join,
    _folder: tempfile::TempDir,
}

impl Live {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut run = sim(&folder)
            .with("SIM_TASK_MS", 400)
            .with("SIM_STEP_MS", 40);
        run.start().expect("starts");
        let path = run.output().join("join");
        let join = run.read_when_there(&path, PATIENCE).expect("a join string");
        let join = Join::parse(&join, false).expect("usable");
        Self {
            run,
            join,
            _folder: folder,
        }
    }

    /// Says `messages` on a stream of its own; gives how the stream ended, if it did within a moment.
    async fn say(&self, messages: Vec<wire::WorkerMessage>) -> Result<(), Refused> {
        let channel = self.join.endpoint().expect("an address").connect().await;
        // The run may have ended since the last look.
        let channel = channel.map_err(|error| Refused(error.to_string()))?;
        let token = ShowToken::new(self.join.token());
        let client = CoordinatorClient::with_interceptor(channel, token);
        let mut client = client.max_encoding_message_size(256 << 20);
        let (sender, queued) = futures::channel::mpsc::unbounded();
        for message in messages {
            sender.unbounded_send(message).expect("open");
        }
        let answer = client.session(queued).await;
        let mut stream = answer
            .map_err(|status| Refused(status.message().to_owned()))?
            .into_inner();
        let listen = async { while let Ok(Some(_)) = stream.message().await {} };
        // What is no reason to hang up is answered, or not, for as long as we care to wait.
        let _ = tokio::time::timeout(Duration::from_millis(150), listen).await;
        drop(sender);
        Ok(())
    }
}

/// How the coordinator said no.
#[derive(Debug)]
struct Refused(String);

fn message(message: worker_message::Message) -> wire::WorkerMessage {
    wire::WorkerMessage {
        message: Some(message),
    }
}

fn hello(name: &str) -> wire::WorkerMessage {
    message(worker_message::Message::Hello(wire::Hello {
        protocol_version: PROTOCOL_VERSION,
        name: name.into(),
        host: "elsewhere".into(),
        ..wire::Hello::default()
    }))
}

fn says(report: report::Report) -> wire::WorkerMessage {
    message(worker_message::Message::Report(wire::Report {
        seq: u64::MAX,
        report: Some(report),
    }))
}

fn lease(stage: &str, index: u64) -> Option<wire::Lease> {
    Some(wire::Lease {
        term: u64::MAX,
        task: Some(wire::TaskId {
            stage: stage.into(),
            index,
        }),
        attempt: u32::MAX,
        incarnation: u64::MAX,
    })
}

fn group(stage: &str, generation: u64) -> Option<wire::GroupId> {
    Some(wire::GroupId {
        stage: stage.into(),
        generation,
    })
}

fn failure(class: FailureClass) -> Option<wire::Failure> {
    Some(to_wire::failure(&Failure {
        class,
        message: "nonsense \u{0}\u{1b}[31m".repeat(50),
    }))
}

fn checkpoint(stage: &str, generation: u64, step: u64, key: &str) -> wire::WorkerMessage {
    says(report::Report::Checkpoint(wire::CheckpointCommitted {
        group: group(stage, generation),
        step,
        key: key.into(),
        digest: vec![7; 32],
        bytes: u64::MAX,
        r#final: true,
    }))
}

/// A beat about what cannot be.
fn beat(stage: &str, generation: u64) -> wire::WorkerMessage {
    message(worker_message::Message::Beat(wire::Beat {
        seq: u64::MAX,
        tasks: vec![wire::TaskProgress {
            lease: lease(stage, u64::MAX),
            done: u64::MAX,
            total: 0,
        }],
        group: Some(wire::GroupProgress {
            group: group(stage, generation),
            phase: 3,
            step: u64::MAX,
            total_steps: 0,
            loss: f64::NAN,
            samples_per_second: f64::INFINITY,
            step_ms: f64::NAN,
        }),
        rss_bytes: u64::MAX,
        engine_starting: true,
        leaving: true,
    }))
}

/// Reports of things that never were, and numbers that cannot be.
fn nonsense() -> Vec<(&'static str, wire::WorkerMessage)> {
    let empty = wire::Report::default();
    let mut all = vec![
        ("nothing", wire::WorkerMessage { message: None }),
        ("a second hello", hello("again")),
        (
            "an empty report",
            message(worker_message::Message::Report(empty)),
        ),
        ("numbers of no stage", beat("", u64::MAX)),
    ];
    all.extend(nonsense_of_tasks());
    all.extend(nonsense_of_groups());
    all
}

fn nonsense_of_tasks() -> Vec<(&'static str, wire::WorkerMessage)> {
    let committed = |stage: &str, index| {
        says(report::Report::TaskCommitted(wire::TaskCommitted {
            lease: lease(stage, index),
            commit: Some(wire::CommitSummary {
                key: "../../../etc/passwd".into(),
                rows: u64::MAX,
                bytes: u64::MAX,
                digest: vec![7; 32],
            }),
            won: true,
        }))
    };
    let failed = |index, class| {
        says(report::Report::TaskFailed(wire::TaskFailed {
            lease: lease("trajectories", index),
            failure: failure(class),
        }))
    };
    let nobodys = failed(6, FailureClass::Config);
    let of_none = failed(u64::MAX, FailureClass::BadInput);
    let never_held = failed(7, FailureClass::BadInput);
    vec![
        ("a COMMIT that is not there", committed("trajectories", 7)),
        ("a COMMIT of no task", committed("trajectories", u64::MAX)),
        ("a COMMIT of no stage", committed("../../escape", 0)),
        ("a COMMIT of a training stage", committed("seg4", 0)),
        ("a lease that nobody gave, broken", nobodys),
        ("a lease of no task, broken", of_none),
        ("bad input of what it never held", never_held),
    ]
}

fn nonsense_of_groups() -> Vec<(&'static str, wire::WorkerMessage)> {
    let elsewhere = checkpoint("trajectories", 1, 10, "x/COMMIT");
    let nowhere = checkpoint("nowhere", 1, u64::MAX, "../COMMIT");
    let missing = checkpoint("seg4", 1, 40, "checkpoints/seg4/0000000040-g9/COMMIT");
    let by_nobody = checkpoint("seg4", u64::MAX, u64::MAX, "");
    let outside = checkpoint("seg4", 1, 40, "../../../etc/passwd");
    let never = group_failed("seg4", u64::MAX, FailureClass::Diverged);
    let no_stage = group_failed("nowhere", 0, FailureClass::Config);
    vec![
        ("a checkpoint of what does not train", elsewhere),
        ("a checkpoint of no stage", nowhere),
        ("a checkpoint that is not there", missing),
        ("a checkpoint by nobody", by_nobody),
        ("a checkpoint outside", outside),
        ("a group that never was, broken", never),
        ("a stage that never was, broken", no_stage),
        ("a member of no group", ready("seg4", u64::MAX, u32::MAX)),
    ]
}

fn group_failed(stage: &str, generation: u64, class: FailureClass) -> wire::WorkerMessage {
    says(report::Report::GroupFailed(wire::GroupFailed {
        group: group(stage, generation),
        rank: u32::MAX,
        failure: failure(class),
    }))
}

fn ready(stage: &str, generation: u64, rank: u32) -> wire::WorkerMessage {
    says(report::Report::GroupReady(wire::GroupReady {
        group: group(stage, generation),
        rank,
        address: "not an address".repeat(100),
    }))
}

/// Reports of groups that are there, by a worker that is no member of them.
fn hearsay() -> Vec<(&'static str, wire::WorkerMessage)> {
    let diverged = group_failed("seg4", 1, FailureClass::Diverged);
    let broken = group_failed("seg2", 2, FailureClass::Config);
    vec![
        ("another's group, broken", diverged),
        ("another's second group, broken", broken),
        ("a member of another's group", ready("seg4", 1, 0)),
        ("another's numbers that are none", beat("seg4", 1)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_reports_nonsense_changes_nothing() {
    speak(nonsense).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_cannot_speak_for_a_group_that_it_is_no_member_of() {
    speak(hearsay).await;
}

/// Says all of it to a living run, over and over, which must make what an undisturbed one makes.
async fn speak(messages: fn() -> Vec<(&'static str, wire::WorkerMessage)>) {
    let undisturbed = tempfile::tempdir().expect("a folder");
    let mut undisturbed_run = sim(&undisturbed);
    undisturbed_run.finish(PATIENCE).expect("it finishes");

    let mut live = Live::start();
    // Again and again, so that every stage hears it all.
    let mut rounds = 0;
    let watch = Stopwatch::start();
    while live.run.ended().expect("asked").is_none() {
        for (what, nonsense) in messages() {
            if live.run.ended().expect("asked").is_some() {
                break;
            }
            // It may end while we speak; it must not end because of what we say.
            let said = tokio::time::timeout(
                Duration::from_secs(20),
                live.say(vec![hello("guest"), nonsense]),
            );
            assert!(said.await.is_ok() || rounds > 0, "{what}: no answer");
        }
        rounds += 1;
        assert!(
            watch.elapsed() < PATIENCE,
            "the run does not end:\n{}",
            live.run.log_tail()
        );
    }
    live.run.finish(PATIENCE).expect("the run is not disturbed");
    audit(&live.run, &undisturbed_run);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_64_mib_is_refused() {
    let mut live = Live::start();
    let huge = "x".repeat(64 << 20);
    let refused = live.say(vec![hello(&huge)]).await.expect_err("too long");
    assert!(refused.0.contains("too large"), "{}", refused.0);
    let later = message(worker_message::Message::Goodbye(wire::Goodbye {
        reason: huge,
    }));
    live.say(vec![hello("guest"), later])
        .await
        .expect("it was let in before");
    live.run.finish(PATIENCE).expect("the run is not disturbed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hello_that_claims_what_nobody_has_is_answered_with_a_place_of_its_own() {
    let mut live = Live::start();
    for (incarnation, stage) in [(u64::MAX, "trajectories"), (1, "seg4"), (0, "../x")] {
        let claim = message(worker_message::Message::Hello(wire::Hello {
            protocol_version: PROTOCOL_VERSION,
            name: "x".repeat(10_000),
            host: String::new(),
            pid: u32::MAX,
            devices: Vec::new(),
            incarnation,
            leases: (0..1000)
                .filter_map(|at| lease(stage, u64::MAX - at))
                .collect(),
            group: group(stage, u64::MAX),
            engine_starting: true,
        }));
        // Let in or refused: it must not matter to the run.
        let _ = live.say(vec![claim]).await;
    }
    live.run.finish(PATIENCE).expect("the run is not disturbed");
}
