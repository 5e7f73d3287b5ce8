//! A worker shows whoever looks from outside that its loop turns: through long tasks, without a coordinator, and not when it
//! hangs. Real processes, real signals.

use std::path::Path;
use std::process::Child;
use std::time::Duration;

use distillery_tests::harness::{EngineKind, Run, Target, signal, sim_recipe};

const PATIENCE: Duration = Duration::from_secs(120);
/// Seconds of silence that count as a hang here: several of the worker's signs, and short enough to wait for.
const WITHIN: u64 = 10;

/// The exit code of `worker alive`, and what it says.
fn look(run: &Run, file: &Path) -> (Option<i32>, String) {
    let mut command = run.command("worker");
    command.arg("alive").arg(file);
    command.args(["--within", &WITHIN.to_string()]);
    let output = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code(), said)
}

fn await_code(run: &Run, file: &Path, code: i32) {
    let seen = || (look(run, file).0 == Some(code)).then_some(());
    run.await_some(
        seen,
        &format!("exit code {code} of `worker alive`"),
        PATIENCE,
    )
    .expect("it is seen");
}

/// Looks for longer than a hang would need to be noticed: the worker is alive all the time.
fn stays_alive(run: &Run, file: &Path, worker: &mut Child, while_what: &str) {
    for _ in 0..(WITHIN + 3) * 2 {
        let (code, said) = look(run, file);
        let ended = worker.try_wait().expect("a child");
        assert_eq!(code, Some(0), "{while_what}: {said}; ended: {ended:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

#[test]
fn a_worker_is_alive_while_its_loop_turns_and_only_then() {
    let folder = tempfile::tempdir().expect("a folder");
    let recipe = sim_recipe().replace("launcher: local", "launcher: external");
    let run = Run::new(folder.path(), &recipe, EngineKind::Sim).expect("built");
    // Longer than any of this takes.
    let mut run = run.with("SIM_TASK_MS", 600_000);
    let file = folder.path().join("alive");
    let (code, said) = look(&run, &file);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("No such file"), "{said}");

    run.start().expect("starts");
    let join = run.output().join("join");
    run.read_when_there(&join, PATIENCE).expect("a join string");
    let mut worker = run.command("worker");
    worker.args(["join", "--coordinator"]);
    worker.arg(format!("@{}", join.display()));
    worker.arg("--alive").arg(&file);
    worker.stderr(std::process::Stdio::null());
    let mut worker = worker.spawn().expect("it starts");
    await_code(&run, &file, 0);
    run.await_process(Target::Engine, PATIENCE)
        .expect("it joins, and starts an engine");
    stays_alive(&run, &file, &mut worker, "an engine computes");

    signal(worker.id(), "STOP").expect("sent");
    await_code(&run, &file, 1);
    let (_, said) = look(&run, &file);
    assert!(said.starts_with("not alive: "), "{said}");
    signal(worker.id(), "CONT").expect("sent");
    await_code(&run, &file, 0);

    run.kill(Target::Coordinator, 0).expect("killed");
    run.wait(PATIENCE).expect("it is dead");
    stays_alive(&run, &file, &mut worker, "no coordinator");
    worker.kill().expect("killed");
    worker.wait().expect("it is dead");
    await_code(&run, &file, 1);
}

#[test]
fn a_worker_that_cannot_show_it_is_alive_does_not_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), sim_recipe(), EngineKind::Sim).expect("built");
    let mut worker = run.command("worker");
    let join = format!("http://127.0.0.1:1/run#{}", "0".repeat(64));
    worker.args(["join", "--coordinator", &join, "--alive"]);
    worker.arg(folder.path().join("nowhere/alive"));
    let output = worker.output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("the file of --alive cannot be made"),
        "{said}"
    );
}
