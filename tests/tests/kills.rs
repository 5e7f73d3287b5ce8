//! Runs that are killed anywhere, by seed, make what undisturbed runs make.

use std::time::Duration;

use distillery_common::seed::{Purpose, Stream};
use distillery_common::telemetry::Stopwatch;
use distillery_tests::harness::{EngineKind, Hurt, Made, Run, Target, signal, sim_recipe};

const PATIENCE: Duration = Duration::from_secs(180);
/// So slow that a kill at a random moment meets every stage.
const TASK_MS: u32 = 120;
const STEP_MS: u32 = 15;
/// COMMITs at the end of a run before which nothing is killed any more.
const LAST: u32 = 3;

fn sim(folder: &tempfile::TempDir) -> Run {
    Run::new(folder.path(), sim_recipe(), EngineKind::Sim)
        .expect("the programs are built")
        .with("SIM_TASK_MS", TASK_MS)
        .with("SIM_STEP_MS", STEP_MS)
}

/// What an undisturbed run makes, and in how many COMMITs.
fn undisturbed() -> (Made, u32) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = sim(&folder);
    run.finish(PATIENCE).expect("it finishes");
    let (commits, _) = run.count_objects("COMMIT").expect("countable");
    (run.made().expect("readable"), commits as u32)
}

/// Kills `target` once a random share of the run's `commits` is there: by progress, since a slow machine's time is another.
fn kill_and_finish(
    run: &mut Run,
    stream: &mut Stream,
    target: Target,
    commits: u32,
) -> anyhow::Result<Hurt> {
    // The last that are left take some time on any machine.
    let before = stream.below(commits.saturating_sub(LAST)) as usize;
    let watch = Stopwatch::start();
    run.start()?;
    run.await_process(target, PATIENCE)?;
    // Folders may come while they are looked through.
    let there = || run.count_objects("COMMIT").map_or(0, |(count, _)| count);
    let enough = || (there() >= before).then_some(());
    run.await_some(enough, "COMMITs", PATIENCE)?;
    let hurt = run.hurt(target, watch.elapsed(), stream.next_u32(), PATIENCE)?;
    run.finish(PATIENCE)?;
    Ok(hurt)
}

#[test]
fn killed_runs_make_the_same_bits() {
    let (expected, commits) = undisturbed();
    let mut met = 0;
    for (seed, target) in (1..).zip(Target::ALL.into_iter().cycle().take(8)) {
        let mut stream = Stream::new(seed, Purpose::Bootstrap, 0, 0);
        let folder = tempfile::tempdir().expect("a folder");
        let mut run = sim(&folder);
        let hurt = kill_and_finish(&mut run, &mut stream, target, commits);
        let hurt = hurt.unwrap_or_else(|error| panic!("seed {seed}, {target:?}: {error:#}"));
        let made = run.made().expect("readable");
        assert_eq!(made, expected, "seed {seed}: {hurt:?}");
        run.no_orphans(PATIENCE)
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        met += usize::from(hurt.killed > 0);
    }
    assert!(met >= 5, "only {met} of 8 kills met a living process");
}

/// Steps that `stage` has reached, as a second process is told.
fn steps_done(run: &Run, stage: &str) -> Option<u64> {
    let mut status = run.command("coordinator");
    status.arg("status").arg(run.output()).arg("--json");
    let output = status.output().ok()?;
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let stages = status["stages"].as_array()?.iter();
    let found = stages.into_iter().find(|found| found["name"] == stage)?;
    found["done"].as_u64()
}

/// Steps of the checkpoints of `stage` that are whole.
fn checkpoints(run: &Run, stage: &str) -> Vec<u64> {
    let folder = run.output().join("checkpoints").join(stage);
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let whole = entries.filter(|entry| entry.path().join("COMMIT").is_file());
    let step = |name: String| name.split('-').next()?.parse().ok();
    whole
        .filter_map(|entry| step(entry.file_name().to_string_lossy().into_owned()))
        .collect()
}

#[test]
fn ctrl_c_saves_a_checkpoint_and_the_same_command_makes_the_same_bits() {
    let (expected, _) = undisturbed();
    let folder = tempfile::tempdir().expect("a folder");
    // No checkpoint falls due before the end of a stage.
    let recipe = sim_recipe().replace("{every_steps: 10}", "{every_steps: 1000}");
    assert_ne!(recipe, sim_recipe());
    let run = Run::new(folder.path(), &recipe, EngineKind::Sim);
    let mut run = run
        .expect("the programs are built")
        .with("SIM_STEP_MS", 200);
    run.start().expect("starts");
    let trains = || steps_done(&run, "seg4").filter(|&done| done > 0);
    run.await_some(trains, "step of seg4", PATIENCE)
        .expect("it trains");
    let coordinator = run.await_process(Target::Coordinator, PATIENCE);
    signal(coordinator.expect("it lives"), "INT").expect("interrupted");
    let status = run.wait(PATIENCE).expect("it ends");
    assert_eq!(status.code(), Some(75), "{}", run.log_tail());
    let said = run.log();
    assert!(said.contains("stopping after a checkpoint"), "{said}");
    assert!(said.contains("run the same command to resume"), "{said}");
    run.no_orphans(PATIENCE).expect("no orphan stays");
    let saved = checkpoints(&run, "seg4");
    assert!(
        matches!(saved.as_slice(), [step] if (1..40).contains(step)),
        "one checkpoint, in between: {saved:?}"
    );
    let mut run = run.with("SIM_STEP_MS", STEP_MS);
    run.start().expect("the same command again");
    run.finish(PATIENCE).expect("it finishes");
    assert_eq!(run.made().expect("readable"), expected);
}

#[test]
fn a_coordinator_that_dies_takes_everything_of_its_host_along() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = sim(&folder);
    run.start().expect("starts");
    run.await_process(Target::Engine, PATIENCE)
        .expect("an engine");
    run.kill(Target::Coordinator, 0).expect("killed");
    run.no_orphans(PATIENCE).expect("no orphan stays");
    run.start().expect("the same command again");
    run.finish(PATIENCE).expect("it finishes");
}

#[test]
fn a_resumed_run_adds_up_its_lives_and_tells_of_fewer_engines() {
    let folder = tempfile::tempdir().expect("a folder");
    // So slow that there is something left of the stage when the first checkpoint has been seen.
    let mut run = sim(&folder).with("SIM_STEP_MS", 200);
    run.start().expect("starts");
    let first = run.output().join("checkpoints/seg4/0000000010-g1/COMMIT");
    run.read_when_there(&first, PATIENCE).expect("a checkpoint");
    run.kill(Target::Coordinator, 0).expect("killed");
    run.wait(PATIENCE).expect("it is gone");
    let recipe = folder.path().join("recipe.yaml");
    let two = std::fs::read_to_string(&recipe).expect("readable");
    let one = two.replace("workers: {min: 2, max: 2}", "workers: {min: 1, max: 1}");
    assert_ne!(one, two);
    std::fs::write(&recipe, one).expect("writable");
    let mut run = run.with("SIM_STEP_MS", STEP_MS);
    run.start().expect("the same command again");
    run.finish(PATIENCE).expect("it finishes");
    let warning = "seg4 goes on with 1 engine instead of 2";
    assert!(run.log().contains(warning), "{}", run.log_tail());

    let summary = run.output().join("report/summary.json");
    let summary = std::fs::read(summary).expect("a summary");
    let summary: serde_json::Value = serde_json::from_slice(&summary).expect("JSON");
    assert_eq!(summary["coordinator_lives"], 2);
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or_default();
    let stages = &summary["stages"];
    let names = ["trajectories", "seg4", "seg2"];
    let walls = names.map(|name| number(&stages[name]["wall_seconds"]));
    let wall = number(&summary["wall_seconds"]);
    assert!(walls.iter().all(|&stage| stage > 0.0), "{summary:#}");
    assert!(walls.iter().sum::<f64>() <= wall, "{summary:#}");
    // Eight shards, each at least as long as a task.
    let engines = number(&stages["trajectories"]["engine_seconds"]);
    assert!(engines >= 8.0 * f64::from(TASK_MS) / 1e3, "{summary:#}");
    for name in names {
        assert!(
            number(&stages[name]["engine_peak_bytes"]) > 1e6,
            "{summary:#}"
        );
    }
    let engines = stages["seg4"]["engines"].as_str().expect("text");
    assert!(engines.starts_with("2 to step "), "{engines}");
    assert!(engines.ends_with(", 1 to step 40"), "{engines}");
    assert_eq!(stages["seg2"]["engines"], "1");
}

#[test]
fn a_worker_that_was_away_past_its_lease_commits_nothing_a_second_time() {
    let (expected, _) = undisturbed();
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = sim(&folder);
    run.start().expect("starts");
    run.await_process(Target::Engine, PATIENCE)
        .expect("an engine");
    let worker = run
        .await_process(Target::Worker, PATIENCE)
        .expect("a worker");
    signal(worker, "STOP").expect("stopped");
    // Longer than the lease's time to live and its grace: the task is granted elsewhere meanwhile.
    std::thread::sleep(Duration::from_secs(40));
    signal(worker, "CONT").expect("continued");
    run.finish(PATIENCE).expect("it finishes");
    assert_eq!(run.made().expect("readable"), expected);
    let commits = run.count_objects("COMMIT").expect("countable");
    assert_eq!(
        commits.0, commits.1,
        "one COMMIT for each folder that has one"
    );
}

/// Whether a worker of the run has something in hand, as a second process is told.
fn is_busy(run: &Run) -> bool {
    let mut status = run.command("coordinator");
    status.arg("status").arg(run.output()).arg("--json");
    let output = status.output().expect("it starts");
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let workers = status["workers"].as_array();
    workers.is_some_and(|workers| workers.iter().any(|worker| worker["doing"] != ""))
}

/// A coordinator that cannot answer for a while, as when its store is away, loses its workers' leases on their side
/// alone: they must say so, or each waits for the other for ever.
#[test]
fn leases_that_ended_while_the_coordinator_stood_still_are_given_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = Run::new(folder.path(), sim_recipe(), EngineKind::Sim)
        .expect("the programs are built")
        .with("SIM_TASK_MS", 6000)
        .with(
            "DISTILLERY_TIMINGS",
            "beat=200ms,suspect=20s,member_silence=20s,lease_ttl=5s,lease_grace=60s",
        );
    run.start().expect("starts");
    run.await_some(|| is_busy(&run).then_some(()), "busy worker", PATIENCE)
        .expect("it works");
    let coordinator = run.await_process(Target::Coordinator, PATIENCE);
    let coordinator = coordinator.expect("it lives");
    signal(coordinator, "STOP").expect("stopped");
    // Longer than a lease, and a lease is shorter than a task.
    std::thread::sleep(Duration::from_secs(8));
    signal(coordinator, "CONT").expect("continued");
    run.finish(PATIENCE).expect("it finishes");
}
