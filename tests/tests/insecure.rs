//! A run without TLS that other hosts can reach: only whoever types `--insecure` gets one, and is told so loudly.

use std::time::Duration;

use distillery_tests::harness::{EngineKind, Run, sim_recipe};

const PATIENCE: Duration = Duration::from_secs(120);

/// What is said when the token crosses the network in plain text.
const WARNING: &str = "WARNING: --insecure: the token of this run";

fn run(folder: &tempfile::TempDir, listen: &str, tls: &str) -> Run {
    let cluster = "cluster: {launcher: local,";
    assert!(sim_recipe().contains(cluster));
    let open = format!("{cluster} listen: \"{listen}:0\", tls: \"{tls}\",");
    let recipe = sim_recipe().replace(cluster, &open);
    Run::new(folder.path(), &recipe, EngineKind::Sim).expect("the programs are built")
}

/// Runs to the end: how it ended, and what it said.
fn told(run: &Run, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = run.run_command();
    let output = command.args(arguments).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    run.no_orphans(PATIENCE).expect("all processes end");
    (output.status.code(), said)
}

#[test]
fn plain_text_for_other_hosts_must_be_typed_and_is_warned_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = run(&folder, "0.0.0.0", "off");
    let (code, said) = told(&run, &[]);
    assert_eq!(code, Some(1), "{said}");
    for words in [
        "cluster.listen 0.0.0.0:0",
        "cluster.tls is off",
        "--insecure",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(!said.contains("WARNING: --insecure"), "{said}");
    assert!(!run.output().join("join").exists(), "nobody was invited");

    let (code, said) = told(&run, &["--insecure"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(WARNING), "{said}");
    let join = std::fs::read_to_string(run.output().join("join")).expect("a join string");
    assert!(join.starts_with("http://"), "workers spoke in plain text");
    let made = run.made().expect("everything is readable");

    // On a loopback address nobody else listens, and with TLS nothing is plain: no word, and the same students.
    for (listen, tls, arguments) in [
        ("127.0.0.1", "off", &[][..]),
        ("0.0.0.0", "on", &["--insecure"][..]),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let other = self::run(&folder, listen, tls);
        let (code, said) = told(&other, arguments);
        assert_eq!(code, Some(0), "{listen} {tls}: {said}");
        assert!(!said.contains(WARNING), "{listen} {tls}: {said}");
        assert_eq!(other.made().expect("readable"), made);
    }
}
