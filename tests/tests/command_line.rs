//! What commands answer, as a person or a program meets them: processes, exit codes, words, and what is left behind.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use distillery_tests::harness::programs;

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
