//! A run's secrets stay where they belong: no byte of output, log, journal, report or object holds the token, however it was
//! given, whatever is asked of the run, and however much is logged.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use distillery_common::ids::Digest;
use distillery_common::security::{GroupSecret, Join, PageKey, Token};
use distillery_tests::harness::{EngineKind, Run, Target, get, sim_recipe};

const PATIENCE: Duration = Duration::from_secs(180);
const SECRET: &str = "5eC2e7";
/// Where the stand-in's recipe takes a token.
const CLUSTER: &str = "cluster: {launcher: local,";

/// How the token reaches the run.
#[derive(Debug, Clone, Copy)]
enum Given {
    /// `${env:…}` in the recipe.
    Environment,
    /// `${file:…}` in the recipe.
    File,
    /// The coordinator makes it.
    Made,
}

/// Everything that admits to a run, in every form that it could be written in.
fn forms(join: &Join) -> Vec<(&'static str, Vec<u8>)> {
    let token = join.token().reveal();
    let bytes = Digest::parse(&token).expect("a token is a number").0;
    let GroupSecret(group) = GroupSecret::derive(join.token(), join.run_id());
    let page = PageKey::derive(join.token(), join.run_id())
        .reveal()
        .to_owned();
    let group_digits = Digest(group).to_string();
    vec![
        ("the token", token.clone().into_bytes()),
        ("the token in capitals", token.to_uppercase().into_bytes()),
        ("half of the token", token.as_bytes()[..32].to_vec()),
        ("the token's bytes", bytes.to_vec()),
        ("the token as a list", format!("{bytes:?}").into_bytes()),
        ("the group's secret", group.to_vec()),
        ("the group's secret in digits", group_digits.into_bytes()),
        (
            "the group's secret as a list",
            format!("{group:?}").into_bytes(),
        ),
        ("the page's key", page.into_bytes()),
        ("a private key", b"PRIVATE KEY".to_vec()),
    ]
}

fn holds(hay: &[u8], needle: &[u8]) -> bool {
    hay.windows(needle.len()).any(|window| window == needle)
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("readable") {
        let path = entry.expect("readable").path();
        match path.is_dir() {
            true => found.extend(files_below(&path)),
            false => found.push(path),
        }
    }
    found
}

/// Asks the page and the metrics as somebody who may, and keeps what comes beside the run. The link's first answer leaves its
/// key in a cookie, which is where it belongs.
fn look_at_the_page(run: &Run, join: &Join, folder: &Path) {
    let (address, _) = run.page(PATIENCE).expect("a link");
    let bearer = format!("Authorization: Bearer {}", join.token().reveal());
    for (at, path) in ["/", "/metrics", "/nothing", "/healthz", "/readyz"]
        .into_iter()
        .enumerate()
    {
        let answer = get(&address, path, std::slice::from_ref(&bearer));
        let (head, body) = answer.expect("it answers");
        let code = match path {
            "/nothing" => "HTTP/1.1 404 ",
            _ => "HTTP/1.1 200 ",
        };
        assert!(head.starts_with(code), "{path}: {head}");
        fs::write(folder.join(format!("page-{at}")), head + &body).expect("written");
    }
}

/// Runs the coordinator's command with `arguments`, and keeps what it says beside the run. Gives whether it succeeded.
fn ask(run: &Run, folder: &Path, answer: String, arguments: &[&str]) -> bool {
    let mut command = run.command("coordinator");
    command.args(arguments).arg("-vv");
    let said = command.output().expect("it starts");
    let errors = String::from_utf8_lossy(&said.stderr);
    assert_ne!(
        said.status.code(),
        Some(64),
        "{arguments:?} is no command: {errors}"
    );
    fs::write(folder.join(answer), [said.stdout, said.stderr].concat()).expect("written");
    said.status.success()
}

/// Asks everything that can be asked, and keeps the answers beside the run.
fn ask_everything(run: &Run, folder: &Path, moment: &str) {
    let output = run.output().display().to_string();
    let recipe = folder.join("recipe.yaml").display().to_string();
    let asked: [&[&str]; 13] = [
        &["status", &output],
        &["status", &output, "--json"],
        &["plan", &recipe],
        &["plan", &recipe, "--json"],
        &["check", &recipe, "--json"],
        &["doctor", &output],
        &["run", &recipe, "--set", "seed=9"],
        &["run", &recipe, "--set", "cluster.launcher=nobody", "--json"],
        &["pause", &output, "--reason", "to see what it says"],
        &["drain", &output, "nobody"],
        &["workers", &output],
        &["logs", &output],
        &["gc", &output],
    ];
    for (at, arguments) in asked.into_iter().enumerate() {
        ask(run, folder, format!("answer-{moment}-{at}"), arguments);
    }
    let report = folder.join(format!("report-{moment}.html"));
    let report = ["report", &output, "--out", &report.display().to_string()];
    assert!(ask(run, folder, format!("report-{moment}"), &report));
    render(run, folder, moment, &recipe);
    join_wrongly(run, folder, moment);
}

/// Has the recipe rendered for clusters, with a token that is named and not written, and without.
fn render(run: &Run, folder: &Path, moment: &str, recipe: &str) {
    let token = "token: \"${env:TOKEN_OF_THE_TEST}\"";
    let pods = "launcher: kubernetes, kubernetes: {image: somewhere/engine}";
    for (at, (what, cluster, succeeds)) in [
        (
            "slurm",
            format!("launcher: slurm, slurm: {{}}, {token}"),
            true,
        ),
        ("kubernetes", pods.to_owned(), true),
        // It would stand in a ConfigMap.
        ("kubernetes", format!("{pods}, {token}"), false),
    ]
    .into_iter()
    .enumerate()
    {
        let cluster = format!("cluster={{{cluster}, workers: {{max: 2}}}}");
        let output = "output=s3://bucket/run";
        let asked = ["render", what, recipe, "--set", &cluster, "--set", output];
        let rendered = ask(run, folder, format!("rendered-{moment}-{at}"), &asked);
        assert_eq!(rendered, succeeds, "{asked:?}");
    }
}

/// Has workers join with broken and foreign join strings.
fn join_wrongly(run: &Run, folder: &Path, moment: &str) {
    let join = fs::read_to_string(run.output().join("join")).expect("there");
    let (head, token) = join.trim().rsplit_once('#').expect("a token");
    let broken = [
        format!("{head}#{}", &token[..63]),
        format!("{head}#{token}0"),
        format!("{}#{token}", head.replace("https", "ftp")),
        format!("https://somewhere/run#{token}"),
        head.replace('#', &format!("#{token}#")),
    ];
    for (at, text) in broken.into_iter().enumerate() {
        let mut command = run.command("worker");
        command.args(["join", "--coordinator", &text]);
        let said = command.output().expect("it starts");
        assert!(!said.status.success());
        let path = folder.join(format!("worker-{moment}-{at}"));
        fs::write(path, [said.stdout, said.stderr].concat()).expect("written");
    }
}

fn check(given: Given) {
    let folder = tempfile::tempdir().expect("a folder");
    let token = Token::generate().expect("random").reveal();
    let token_file = folder.path().join("token-of-the-user");
    fs::write(&token_file, format!("{token}\n")).expect("written");
    fs::set_permissions(&token_file, fs::Permissions::from_mode(0o600)).expect("private");
    let cluster = match given {
        Given::Environment => "cluster: {token: \"${env:TOKEN_OF_THE_TEST}\", launcher: local,",
        Given::File => "cluster: {token: \"${file:token-of-the-user}\", launcher: local,",
        Given::Made => CLUSTER,
    };
    assert!(sim_recipe().contains(CLUSTER));
    let recipe = sim_recipe().replace(CLUSTER, cluster);
    let run = Run::new(folder.path(), &recipe, EngineKind::Sim).expect("the programs are built");
    let mut run = run
        .with("SIM_TASK_MS", 500)
        .with("RUST_LOG", "trace")
        .with("TOKEN_OF_THE_TEST", &token);
    run.start().expect("starts");
    // Whatever is asked takes longer than the work would.
    run.page(PATIENCE).expect("somebody to tell");
    let output = run.output().display().to_string();
    let pause = ["pause", &output];
    assert!(ask(&run, folder.path(), "pause".into(), &pause));
    let path = run.output().join("join");
    let join = run.read_when_there(&path, PATIENCE).expect("a join string");
    let join = Join::parse(&join, false).expect("usable");
    if !matches!(given, Given::Made) {
        assert_eq!(join.token().reveal(), token);
    }
    // A worker is told by its join string, and by nothing else.
    let worker = run.await_process(Target::Worker, PATIENCE).expect("one");
    let handed = fs::read(format!("/proc/{worker}/environ")).expect("it lives");
    let holding = handed
        .split(|&byte| byte == 0)
        .filter(|variable| holds(variable, join.token().reveal().as_bytes()));
    for variable in holding {
        let variable = String::from_utf8_lossy(variable);
        let name = variable.split('=').next();
        assert_eq!(name, Some("DISTILLERY_JOIN"), "{given:?}");
    }
    ask_everything(&run, folder.path(), "during");
    look_at_the_page(&run, &join, folder.path());
    let resume = ["resume", &output];
    assert!(ask(&run, folder.path(), "resume".into(), &resume));
    // A worker that dies has its engine's last words in the report of the failure.
    run.kill(Target::Engine, 0).expect("killed");
    run.finish(PATIENCE).expect("it finishes");
    ask_everything(&run, folder.path(), "after");

    let kept = [
        run.output().join("join"),
        run.output().join("token"),
        run.output().join("page"),
        run.output().join("page-key"),
        token_file,
    ];
    let mut seen = 0;
    for path in files_below(folder.path()) {
        let bytes = fs::read(&path).expect("readable");
        if kept.contains(&path) {
            let mode = fs::metadata(&path).expect("there").permissions().mode();
            assert_eq!(mode & 0o077, 0, "{} may be read by others", path.display());
            continue;
        }
        for (what, form) in forms(&join) {
            assert!(
                !holds(&bytes, &form),
                "{given:?}: {} holds {what}",
                path.display()
            );
        }
        seen += usize::from(holds(&bytes, join.run_id().as_bytes()));
    }
    // The search finds what is there: the run's id, which is no secret, is in many of them.
    assert!(seen > 10, "the run's id is in {seen} files only");
}

#[test]
fn a_token_from_the_environment_stays_there() {
    check(Given::Environment);
}

#[test]
fn a_token_from_a_file_stays_there() {
    check(Given::File);
}

#[test]
fn a_token_that_was_made_stays_beside_the_run() {
    check(Given::Made);
}

/// The permission bits of a file or folder.
fn mode(path: &Path) -> u32 {
    let mode = fs::metadata(path).expect("there").permissions().mode();
    mode & 0o777
}

/// The same command as a process that forbids nothing to others unless it says so itself.
fn without_umask(command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 0; exec \"$@\"", "sh"]);
    shell.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
}

/// An engine that tells of its socket before it becomes the stand-in.
fn telling_engine(run: &Run, folder: &Path) -> PathBuf {
    let path = folder.join("telling-engine");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --socket ] && stat -c %a \"${{2%/*}}\" \"$2\" >>'{}'\nexec '{}' \"$@\"\n",
        folder.join("modes").display(),
        run.program(EngineKind::Sim.program()).display(),
    );
    fs::write(&path, script).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("executable");
    path
}

/// The mask is the user's; what must be private is so under any.
#[test]
fn what_is_private_is_private_under_any_umask() {
    let folder = tempfile::tempdir().expect("a folder");
    let temporary = folder.path().join("temporary");
    fs::create_dir(&temporary).expect("made");
    let run = Run::new(folder.path(), sim_recipe(), EngineKind::Sim).expect("built");
    let engine = telling_engine(&run, folder.path());
    let run = run
        .with("DISTILLERY_ENGINE", engine.display())
        .with("TMPDIR", temporary.display())
        .with("XDG_CACHE_HOME", folder.path().join("cache").display());
    let output = without_umask(&run.run_command()).output();
    let output = output.expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");

    let modes = fs::read_to_string(folder.path().join("modes")).expect("engines were started");
    let modes: Vec<&str> = modes.lines().collect();
    assert!(modes.len() >= 4, "two engines at least: {modes:?}");
    for engine in modes.chunks(2) {
        assert_eq!(engine, ["700", "600"], "an engine's folder and socket");
    }
    let left = fs::read_dir(&temporary).expect("readable").count();
    assert_eq!(left, 0, "temporary files are left");
    let (beside, cache) = (run.output(), folder.path().join("cache/distillery"));
    let logs = beside.join("logs");
    let mut private = vec![cache.join("memo.json"), beside.clone(), cache];
    private.extend(["token", "join", "page", "page-key"].map(|name| beside.join(name)));
    private.extend(["local-0.log", "local-1.log"].map(|name| logs.join(name)));
    private.push(logs);
    for path in private {
        let mode = mode(&path);
        assert_eq!(mode & 0o077, 0, "{}: {mode:03o}", path.display());
    }
}

#[test]
fn a_word_that_is_no_token_is_not_told_by_the_complaint_about_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let broken = [
        format!("cluster: {{token: \"{SECRET}\", launcher: nobody,"),
        format!("cluster: {{token: \"{SECRET}\", launcher: local,"),
        format!("cluster: {{token: \"{SECRET}, launcher: local,"),
        format!("cluster: {{token: {{a: {SECRET}}}, launcher: local,"),
        format!("cluster: {{token: [{SECRET}], launcher: local,"),
        format!("cluster: {{token: \"${{file:/{SECRET}\", launcher: local,"),
    ];
    for cluster_with_token in broken {
        let recipe = sim_recipe().replace(CLUSTER, &cluster_with_token);
        let run = Run::new(folder.path(), &recipe, EngineKind::Sim).expect("built");
        for json in [false, true] {
            let mut command: Command = run.run_command();
            if json {
                command.arg("--json");
            }
            let said = command.output().expect("it starts");
            assert!(!said.status.success(), "{cluster_with_token}");
            let told = [said.stdout, said.stderr].concat();
            let is_path = cluster_with_token.contains("file:");
            let text = String::from_utf8_lossy(&told);
            assert!(
                is_path || !text.contains(SECRET),
                "{cluster_with_token}: {text}"
            );
        }
    }
}
