//! `make test-attacks` and `make fuzz` in short, so that neither rots; the full counts are for people.

use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// Attacks are timed by the coordinator that they meet: nothing else of this file goes on meanwhile.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs a program to a good end, whose last line begins with `says`.
fn check(program: &str, arguments: &[&str], says: &str) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{errors}");
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with(says), "{said}{errors}");
}

#[test]
fn attacks_on_a_living_run_are_refused_and_leave_nothing_behind() {
    check(
        env!("CARGO_BIN_EXE_test-attacks"),
        // More than there are places.
        &["--idle", "3000"],
        "test-attacks: ",
    );
}

#[test]
fn no_changed_input_breaks_a_parser_or_takes_its_memory() {
    let keep = concat!(env!("CARGO_TARGET_TMPDIR"), "/fuzz");
    let arguments = ["--inputs", "1500", "--keep", keep];
    check(
        env!("CARGO_BIN_EXE_fuzz"),
        &arguments,
        "fuzz: 0 harmful inputs",
    );
}
