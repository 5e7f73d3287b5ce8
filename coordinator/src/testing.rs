//! What the unit tests share.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes a program of `text` at `path`.
///
/// Another process writes it: were it open in this one, a process that another test forks in that moment would hold it
/// open for writing as well, and it could not be started ("text file busy").
pub(crate) fn program(path: &Path, text: &str) {
    let mut shell = Command::new("sh")
        .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("a shell");
    let mut input = shell.stdin.take().expect("piped");
    input.write_all(text.as_bytes()).expect("it reads");
    drop(input);
    assert!(shell.wait().expect("it ends").success(), "{path:?}");
}
