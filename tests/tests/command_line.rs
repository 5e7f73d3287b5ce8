//! What commands answer, as a person or a program meets them: processes, exit codes, words, and what is left behind.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use distillery_tests::harness::{programs, repository, sim_recipe};
use serde_json::Value;

/// A terminal's height: whoever meets an error should see all of it.
const SCREEN: usize = 24;

fn command(program: &str) -> Command {
    let path = programs().expect("the programs are built").join(program);
    let mut command = Command::new(path);
    command.stdin(Stdio::null()).env("NO_COLOR", "1");
    command
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = command(program).args(arguments).output();
    output.expect("the program starts")
}

/// Exit code, standard output and standard error.
fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// Everything below a folder.
fn below(folder: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("readable") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                folders.push(path.clone());
            }
            found.push(path);
        }
    }
    found
}

#[test]
fn commands_that_read_refuse_a_missing_folder_and_make_none() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = |name: &str| folder.path().join(name).display().to_string();
    let (missing, uri) = (place("no/such"), format!("file://{}", place("no/such")));
    let (page, out) = (place("page.html"), place("out"));
    for (program, arguments) in [
        ("coordinator", &["status", &missing][..]),
        ("coordinator", &["status", &uri]),
        ("coordinator", &["report", &missing, "--out", &page]),
        ("coordinator", &["export", &missing, "--out", &out]),
        ("coordinator", &["export", &uri, "--out", &out]),
        (
            "coordinator",
            &["sample", &missing, "--prompt", "x", "--out", &out],
        ),
        (
            "coordinator",
            &["sample", &uri, "--prompt", "x", "--out", &out],
        ),
        ("compare", &[&missing]),
    ] {
        let (code, stdout, said) = told(&run(program, arguments));
        assert_eq!(
            (code, stdout.as_str()),
            (Some(1), ""),
            "{arguments:?}: {said}"
        );
        assert!(said.contains("no/such"), "{arguments:?}: {said}");
        assert!(said.lines().count() <= SCREEN, "{arguments:?}: {said}");
        assert_eq!(
            below(folder.path()),
            [""; 0].map(PathBuf::from),
            "{arguments:?}"
        );
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("readable") {
        let from = entry.expect("readable").path();
        let to = to.join(from.file_name().expect("entries have names"));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(&from, &to).expect("copied");
        }
    }
}

/// A recipe beside a teacher of its own, sound until `change` comes; gives the recipe's path.
fn with_teacher(folder: &Path, change: impl FnOnce(&Path)) -> String {
    let fixture = "worker/engine/tests/fixtures/sd15";
    let teacher = folder.join("teacher");
    copy(&repository().join(fixture), &teacher);
    change(&teacher);
    let text = sim_recipe()
        .replace(&format!("{{repository}}/{fixture}"), "teacher")
        .replace("{repository}", &repository().display().to_string());
    let recipe = folder.join("recipe.yaml");
    std::fs::write(&recipe, text).expect("writable");
    recipe.display().to_string()
}

fn truncate_weights(teacher: &Path) {
    let path = teacher.join("unet/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&path).expect("weights");
    std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("writable");
}

fn spoil_scheduler(teacher: &Path) {
    let path = teacher.join("scheduler/scheduler_config.json");
    std::fs::write(path, "{\"beta_start\": ").expect("writable");
}

#[test]
fn broken_teachers_are_refused_on_one_screen_and_leave_nothing() {
    for (change, named) in [
        (
            truncate_weights as fn(&Path),
            "diffusion_pytorch_model.safetensors",
        ),
        (spoil_scheduler, "scheduler_config.json"),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let recipe = with_teacher(folder.path(), change);
        for action in ["check", "plan", "run"] {
            let (code, stdout, said) = told(&run("coordinator", &[action, &recipe]));
            assert_eq!((code, stdout.as_str()), (Some(1), ""), "{action}: {said}");
            assert!(
                said.starts_with("error: ") && said.contains(named),
                "{said}"
            );
            assert!(
                said.lines().count() <= SCREEN && !said.contains("panicked"),
                "{said}"
            );
            assert!(
                !folder.path().join("run").exists(),
                "{action} left something"
            );
        }
    }
}

#[test]
fn what_a_teacher_makes_one_wonder_about_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let recipe = with_teacher(folder.path(), |teacher| {
        let path = teacher.join("model_index.json");
        let text = std::fs::read_to_string(&path).expect("an index");
        let other = text.replace(
            "\"StableDiffusionPipeline\"",
            "\"LatentConsistencyModelPipeline\"",
        );
        assert_ne!(other, text);
        std::fs::write(&path, other).expect("writable");
    });
    for action in ["check", "plan"] {
        let (code, _, said) = told(&run("coordinator", &[action, &recipe]));
        assert_eq!(code, Some(0), "{said}");
        let warned = said.contains("warning: ") && said.contains("LatentConsistencyModelPipeline");
        assert!(warned, "{action}: {said}");
    }
    let (_, stdout, _) = told(&run("coordinator", &["check", &recipe, "--json"]));
    let answer: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(
        answer["warnings"].as_array().map(Vec::len),
        Some(1),
        "{answer}"
    );
}

#[test]
fn errors_are_json_where_results_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let recipe = with_teacher(folder.path(), spoil_scheduler);
    for (arguments, code, part) in [
        (
            &["--json", "check", &recipe][..],
            1,
            "scheduler_config.json",
        ),
        (&["run", &recipe, "--json"], 1, "scheduler_config.json"),
        (&["status", "no/such", "--json"], 1, "no/such"),
        (
            &["export", "no/such", "--out", "no/out", "--json"],
            1,
            "no/such",
        ),
        (&["unheard-of", "--json"], 64, "unheard-of"),
    ] {
        let (found, stdout, said) = told(&run("coordinator", arguments));
        assert_eq!(found, Some(code), "{arguments:?}: {said}");
        let answer: Value = serde_json::from_str(&stdout).expect("one JSON value");
        let message = answer["error"].as_str().expect("a message");
        assert!(message.contains(part), "{arguments:?}: {message}");
    }
}

#[test]
fn a_plan_shows_the_recipe_with_its_defaults() {
    let recipe = repository().join("configs/tiny.yaml").display().to_string();
    let (code, stdout, said) = told(&run("coordinator", &["plan", &recipe]));
    assert_eq!((code, said.as_str()), (Some(0), ""));
    let (table, values) = stdout.split_once("\n\n").expect("a table, then the recipe");
    assert!(
        table.contains("trajectories") && table.contains("export"),
        "{table}"
    );
    assert!(
        values.contains("max_skipped: "),
        "a default is shown: {values}"
    );
    let (_, stdout, _) = told(&run("coordinator", &["plan", &recipe, "--json"]));
    let answer: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(answer["stages"][0]["name"], "trajectories");
    assert_eq!(answer["recipe"]["seed"], 7);
}

#[test]
fn a_join_file_that_is_not_there_is_called_a_file_and_said_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("nope").display().to_string();
    let arguments = [
        "join",
        "--coordinator",
        &format!("@{file}"),
        "--devices",
        "cpu",
    ];
    let (code, _, said) = told(&run("worker", &arguments));
    assert!(code.is_some_and(|code| code != 0), "{said}");
    assert_eq!(said.matches("No such file").count(), 1, "{said}");
    assert_eq!(said.matches(&file).count(), 1, "{said}");
    assert!(!said.contains("token file"), "{said}");
}
