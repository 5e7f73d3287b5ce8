//! The campaigns of `make chaos` in short, so that none of them rots; the full counts are for people.

use std::process::Command;

/// Runs one campaign, which must find nothing.
fn check(arguments: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_chaos"))
        .args(arguments)
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{errors}");
    assert!(said.contains(" 0 violations (goal 0)"), "{said}{errors}");
}

#[test]
fn a_coordinator_that_is_killed_loses_and_doubles_nothing() {
    check(&[
        "--campaign",
        "coordinator-kills",
        "--number",
        "6",
        "--tasks",
        "600",
    ]);
}

#[test]
fn of_two_coordinators_only_the_later_has_effects() {
    check(&["--campaign", "two-coordinators", "--number", "6"]);
}

#[test]
fn a_killed_workers_task_is_done_elsewhere() {
    check(&["--campaign", "worker-kills", "--number", "6"]);
}

#[test]
fn a_worker_that_stood_still_commits_nothing_twice() {
    check(&["--campaign", "stopped-workers", "--number", "3"]);
}

#[test]
fn a_worker_that_is_told_to_leave_gives_back_what_it_does_not_commit() {
    check(&["--campaign", "drains", "--number", "6"]);
}

#[test]
fn a_killed_writer_loses_nothing_that_was_acknowledged() {
    check(&["--campaign", "writers", "--number", "300"]);
}

#[test]
fn whatever_joins_leaves_or_dies_changes_no_bit_of_a_student() {
    check(&["--campaign", "elastic", "--number", "3"]);
}
