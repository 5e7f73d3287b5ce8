//! Whoever reads what a command says may stop reading: no command minds.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use distillery_tests::harness::{programs, repository};

fn configs() -> PathBuf {
    repository().join("configs")
}

/// Starts `coordinator` with pipes for its output.
fn start(arguments: &[&str]) -> Child {
    let program = programs()
        .expect("the programs are built")
        .join("coordinator");
    Command::new(program)
        .args(arguments)
        .current_dir(configs())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the coordinator starts")
}

/// Closes the standard output of a command at once; gives its exit code and what it said on standard error.
fn without_output(arguments: &[&str]) -> (Option<i32>, String) {
    let mut child = start(arguments);
    drop(child.stdout.take());
    let mut said = String::new();
    let mut stderr = child.stderr.take().expect("it was asked for");
    stderr.read_to_string(&mut said).expect("readable");
    (child.wait().expect("it ends").code(), said)
}

#[test]
fn results_that_nobody_reads_are_dropped() {
    for arguments in [
        &["schema"][..],
        &["--help"],
        &["plan", "tiny.yaml"],
        &["plan", "tiny.yaml", "--json"],
        &["check", "tiny.yaml", "--json"],
    ] {
        let (code, said) = without_output(arguments);
        assert_eq!((code, said.as_str()), (Some(0), ""), "{arguments:?}");
    }
    let faulty = ["check", "tiny.yaml", "--json", "--set", "seed=x"];
    assert_eq!(without_output(&faulty), (Some(2), String::new()));
}

#[test]
fn the_first_line_can_be_read_and_the_rest_left() {
    let mut child = start(&["schema"]);
    let mut stdout = child.stdout.take().expect("it was asked for");
    let mut first = [0; 1];
    stdout.read_exact(&mut first).expect("a schema");
    drop(stdout);
    assert_eq!(&first, b"{");
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}

#[test]
fn errors_that_nobody_reads_keep_their_exit_code() {
    for (arguments, code) in [
        (&["check", "tiny.yaml"][..], 0),
        (&["check", "tiny.yaml", "--set", "seed=x"], 2),
        (&["check", "nowhere.yaml"], 2),
        (&["status", "nowhere"], 1),
        (&["-vv", "status", "nowhere"], 1),
        (&["unheard-of"], 64),
    ] {
        let mut child = start(arguments);
        drop(child.stderr.take());
        let ended = child.wait().expect("it ends");
        assert_eq!(ended.code(), Some(code), "{arguments:?}");
    }
}

#[test]
fn a_full_disk_is_an_error_and_no_panic() {
    let program = programs()
        .expect("the programs are built")
        .join("coordinator");
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("Linux has it");
    let output = Command::new(program)
        .arg("schema")
        .stdout(full)
        .output()
        .expect("the coordinator starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.starts_with("error: ") && said.contains("No space left"),
        "{said}"
    );
}
