//! What people and programs see of a run: the live page, metrics, logs, workers, failures.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Output;
use std::time::Duration;

use distillery_tests::harness::{EngineKind, Run, Target, repository, signal, sim_recipe};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

fn slow(folder: &tempfile::TempDir) -> Run {
    let run = Run::new(folder.path(), sim_recipe(), EngineKind::Sim);
    let run = run.expect("the programs are built");
    run.with("SIM_TASK_MS", 300).with("SIM_STEP_MS", 100)
}

fn uri(run: &Run) -> String {
    run.output().display().to_string()
}

fn ask(run: &Run, arguments: &[&str]) -> Output {
    let mut command = run.command("coordinator");
    command.args(arguments);
    command.output().expect("the coordinator starts")
}

fn told(run: &Run, arguments: &[&str]) -> String {
    let output = ask(run, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}

fn status(run: &Run) -> Value {
    let told = told(run, &["status", &uri(run), "--json"]);
    serde_json::from_str(&told).expect("JSON")
}

/// Host and port of the page, and the path of its link.
fn page(run: &Run) -> (String, String) {
    let (address, key) = run.page(PATIENCE).expect("a link");
    (address, format!("/?key={key}"))
}

/// Head and body of an answer.
fn get(address: &str, path: &str, headers: &[String]) -> (String, String) {
    distillery_tests::harness::get(address, path, headers).expect("it answers")
}

fn bearer(run: &Run) -> String {
    let token = std::fs::read_to_string(run.output().join("token")).expect("a token");
    format!("Authorization: Bearer {}", token.trim())
}

/// The answer to a method that the page does not know.
fn delete(address: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("it listens");
    let request = "DELETE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer
}

fn await_training(run: &Run) {
    let training = run.output().join("checkpoints/seg4");
    run.await_path(&training, PATIENCE).expect("it trains");
}

#[test]
fn the_page_and_metrics_want_the_token_and_the_health_checks_do_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder);
    run.start().expect("starts");
    let (address, link) = page(&run);
    for path in ["/healthz", "/readyz"] {
        let (head, body) = get(&address, path, &[]);
        assert!(head.starts_with("HTTP/1.1 200 "), "{path}: {head}");
        assert!(body.len() < 10, "it says nothing else: {body}");
    }
    let token = bearer(&run);
    let other = format!("Authorization: Bearer {}", "0".repeat(64));
    let key = link.split_once("key=").expect("a key").1.to_owned();
    // The page's key opens the page, and is not the token.
    assert!(!token.contains(&key));
    for path in ["/", "/metrics", "/nothing", "/?key=0000"] {
        for headers in [vec![], vec![other.clone()], vec!["Cookie: x=y".into()]] {
            let (head, body) = get(&address, path, &headers);
            assert!(head.starts_with("HTTP/1.1 401 "), "{path}: {head}");
            assert!(!body.contains("seg4"), "{body}");
        }
        let (head, _) = get(&address, path, std::slice::from_ref(&token));
        let code = if path == "/nothing" { "404" } else { "200" };
        assert!(
            head.starts_with(&format!("HTTP/1.1 {code} ")),
            "{path}: {head}"
        );
    }
    // Scrapers are given the key, in a file of its own, and never the token.
    let kept = std::fs::read_to_string(run.output().join("page-key")).expect("there");
    assert_eq!(kept.trim(), key);
    let shown = format!("Authorization: Bearer {key}");
    for (path, has) in [("/", "seg4"), ("/metrics", "# EOF")] {
        let (head, body) = get(&address, path, std::slice::from_ref(&shown));
        assert!(head.starts_with("HTTP/1.1 200 "), "{path}: {head}");
        assert!(body.contains(has), "{path}: {body}");
    }
    let cut = shown[..shown.len() - 1].to_owned();
    let (head, _) = get(&address, "/metrics", &[cut]);
    assert!(head.starts_with("HTTP/1.1 401 "), "{head}");
    let (head, _) = get(&address, &link, &[]);
    assert!(head.starts_with("HTTP/1.1 303 "), "{head}");
    let cookie = head
        .lines()
        .find_map(|line| line.strip_prefix("set-cookie: "));
    let cookie = cookie.expect("a cookie");
    assert!(
        cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"),
        "{cookie}"
    );
    let cookie = format!("Cookie: {}", cookie.split(';').next().expect("a pair"));
    // Shown as soon as it has joined.
    let shows_worker = || {
        let (head, html) = get(&address, "/", std::slice::from_ref(&cookie));
        html.contains("local-0").then_some((head, html))
    };
    let shown = run.await_some(shows_worker, "worker on the page", PATIENCE);
    let (head, html) = shown.expect("it joins");
    assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("default-src 'none'"));
    assert!(html.contains("seg4"), "{html}");
    assert!(!html.contains("<script") && !html.contains(&key));
    let refused = delete(&address);
    assert!(refused.starts_with("HTTP/1.1 405 "), "{refused}");
    run.finish(PATIENCE).expect("it finishes");
    let said = run.log();
    assert!(
        said.contains("page: ") && !said.contains(&key),
        "no key in a log: {said}"
    );
}

/// Names of metrics in a query of Prometheus.
fn names(query: &str) -> impl Iterator<Item = &str> {
    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("distillery_") || word.starts_with("process_"))
}

/// Values of an exposition by name, which must have the form that scrapers read.
fn exposed(text: &str) -> BTreeSet<String> {
    assert!(text.ends_with("# EOF\n"), "{text}");
    let mut found = BTreeSet::new();
    let mut typed = BTreeSet::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            if let Some(of) = comment.strip_prefix("TYPE ") {
                let name = of.split(' ').next().expect("a name").to_owned();
                assert!(typed.insert(name), "one family, one place: {line}");
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect("a value");
        assert!(value.parse::<f64>().is_ok(), "{line}");
        let name = series.split('{').next().expect("a name");
        assert!(
            series.len() == name.len() || series.ends_with('}'),
            "{line}"
        );
        found.insert(name.to_owned());
    }
    found
}

#[test]
fn every_metric_of_the_dashboard_is_there_and_counts() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder).with("SIM_TASK_MS", 0);
    run.start().expect("starts");
    await_training(&run);
    run.kill(Target::Engine, 0).expect("killed");
    let (address, _) = page(&run);
    let token = bearer(&run);
    let metrics = || get(&address, "/metrics", std::slice::from_ref(&token)).1;
    let again = || {
        let text = metrics();
        let is_back = text.contains("distillery_generations_given_up_total{stage=\"seg4\"} 1")
            && text.contains("distillery_group_loss{");
        is_back.then_some(text)
    };
    let text = run
        .await_some(again, "group that was given up and formed again", PATIENCE)
        .expect("it goes on");
    let exposed = exposed(&text);
    let path = repository().join("deploy/grafana/distillery.json");
    let dashboard = std::fs::read_to_string(path).expect("there");
    let dashboard: Value = serde_json::from_str(&dashboard).expect("JSON");
    let mut used = BTreeSet::new();
    for panel in dashboard["panels"].as_array().expect("panels") {
        for target in panel["targets"].as_array().expect("targets") {
            let query = target["expr"].as_str().expect("a query");
            assert!(names(query).next().is_some(), "{query}");
            used.extend(names(query).map(str::to_owned));
        }
    }
    assert!(used.len() > 15, "{used:?}");
    let unknown: Vec<_> = used.difference(&exposed).collect();
    assert!(unknown.is_empty(), "{unknown:?} are not in\n{text}");
    for counted in [
        "distillery_commits_total 8",
        "distillery_run_state{state=\"running\"} 1",
        "distillery_stage_done{stage=\"trajectories\",kind=\"trajectories\"} 8",
        "distillery_failures_total{class=\"HostLost\"} 1",
    ] {
        assert!(
            text.lines().any(|line| line.starts_with(counted)),
            "{counted}: {text}"
        );
    }
    run.finish(PATIENCE).expect("it finishes");
}

#[test]
fn an_engine_that_breaks_leaves_its_last_lines_in_every_report() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder).with("SIM_TASK_MS", 1500);
    run.start().expect("starts");
    let mut following = run.command("coordinator");
    following.args(["logs", &uri(&run), "-f", "--json"]);
    let seen = folder.path().join("followed");
    let trajectories = run.output().join("trajectories");
    run.await_path(&trajectories, PATIENCE).expect("it works");
    following.stdout(std::fs::File::create(&seen).expect("writable"));
    let mut following = following.spawn().expect("starts");
    let engine = run.await_process(Target::Engine, PATIENCE).expect("one");
    signal(engine, "ABRT").expect("it lives");
    let failed = || {
        let failures = status(&run)["failures"].clone();
        failures.get(0).is_some().then_some(failures)
    };
    let failures = run.await_some(failed, "failure", PATIENCE).expect("told");
    let (message, output) = (&failures[0]["message"], &failures[0]["output"]);
    let message = message.as_str().expect("text");
    assert!(message.contains("was ended by signal 6"), "{message}");
    assert_eq!(message.lines().count(), 1);
    let output = output.as_str().expect("text");
    assert!(output.contains("task started"), "{output}");
    let text = told(&run, &["status", &uri(&run)]);
    let decision = text.lines().find(|line| line.contains("counted failures"));
    let decision = decision.expect("a decision");
    assert!(!decision.contains("task started"), "short: {decision}");
    assert!(
        text.contains("last failure") && text.contains("coordinator logs"),
        "{text}"
    );
    run.finish(PATIENCE).expect("it finishes");

    assert!(following.wait().expect("it ends with the run").success());
    let followed = std::fs::read_to_string(&seen).expect("text");
    let lines: Vec<Value> = followed
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let of = |worker: &str, words: &str| {
        let text = |line: &Value| line["text"].as_str().is_some_and(|t| t.contains(words));
        lines
            .iter()
            .any(|line| line["worker"] == worker && text(line))
    };
    assert!(of("local-0", "task started") && of("local-1", "task started"));
    assert!(
        of("local-0", "signal 6") || of("local-1", "signal 6"),
        "{followed}"
    );
    // Without a coordinator the store says the same, of one worker if asked.
    let one = told(&run, &["logs", &uri(&run), "--worker", "local-1"]);
    assert!(!one.is_empty() && one.lines().all(|line| line.starts_with("local-1 | ")));
    assert!(!one.contains('\u{1b}'));
    let last = told(&run, &["logs", &uri(&run), "-n", "3"]);
    assert_eq!(last.lines().count(), 3);
}

#[test]
fn workers_are_listed_and_an_unknown_one_cannot_be_drained() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = slow(&folder);
    run.start().expect("starts");
    let both = || {
        let workers = ask(&run, &["workers", &uri(&run), "--json"]).stdout;
        let workers: Value = serde_json::from_slice(&workers).ok()?;
        (workers.as_array()?.len() == 2).then_some(workers)
    };
    let workers = run.await_some(both, "two workers", PATIENCE).expect("both");
    for worker in workers.as_array().expect("a list") {
        assert!(
            worker["name"]
                .as_str()
                .is_some_and(|n| n.starts_with("local-"))
        );
        assert_eq!(worker["device"], "cpu");
        assert!(worker["host"].as_str().is_some_and(|host| !host.is_empty()));
    }
    let text = told(&run, &["workers", &uri(&run)]);
    assert!(
        text.lines().count() == 3 && text.contains("registration"),
        "{text}"
    );
    let refused = ask(&run, &["drain", &uri(&run), "gpu-9"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        said.contains("\"gpu-9\"") && said.contains("there are: local-0, local-1"),
        "{said}"
    );
    run.finish(PATIENCE).expect("it finishes");
    let none = ask(&run, &["workers", &uri(&run)]);
    assert_eq!(none.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&none.stderr).contains("it succeeded"));
}

/// A collector on this host: bodies of all requests until `enough` of them says so.
fn collect(listener: std::net::TcpListener, enough: impl Fn(&str) -> bool) -> Vec<Value> {
    let mut bodies = Vec::new();
    for stream in listener.incoming() {
        let mut stream = stream.expect("a connection");
        let mut request = Vec::new();
        let mut part = [0; 4096];
        let body = loop {
            let n = stream.read(&mut part).expect("it sends");
            assert!(n > 0, "the request ends early");
            request.extend_from_slice(&part[..n]);
            let text = String::from_utf8_lossy(&request).into_owned();
            let Some((head, body)) = text.split_once("\r\n\r\n") else {
                continue;
            };
            assert!(head.starts_with("POST /v1/traces HTTP/1.1"), "{head}");
            let lower = head.to_ascii_lowercase();
            assert!(lower.contains("x-key: sesame"), "{head}");
            let length = lower
                .lines()
                .find_map(|l| l.strip_prefix("content-length: "));
            let length: usize = length.expect("a length").parse().expect("a number");
            if body.len() >= length {
                break body.to_owned();
            }
        };
        write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}"
        )
        .expect("it reads");
        bodies.push(serde_json::from_str(&body).expect("JSON"));
        if enough(&body) {
            break;
        }
    }
    bodies
}

#[test]
fn spans_of_attempts_and_generations_reach_a_collector() {
    let folder = tempfile::tempdir().expect("a folder");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let last = |body: &str| body.contains("\"name\":\"run\"");
    let (collected, bodies) = std::sync::mpsc::channel();
    std::thread::spawn(move || collected.send(collect(listener, last)));
    let mut run = slow(&folder)
        .with("SIM_TASK_MS", 0)
        .with("SIM_STEP_MS", 0)
        .with("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}"))
        .with("OTEL_EXPORTER_OTLP_HEADERS", "x-key=sesame");
    run.finish(PATIENCE).expect("it finishes");
    let bodies = bodies
        .recv_timeout(PATIENCE)
        .expect("it ends with the run's span");
    let spans: Vec<&Value> = bodies
        .iter()
        .flat_map(|body| body["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array())
        .flatten()
        .collect();
    let named = |name: &str| spans.iter().filter(|span| span["name"] == name).count();
    assert_eq!(named("attempt trajectories"), 8);
    assert_eq!((named("generation seg4"), named("generation seg2")), (1, 1));
    let root = spans
        .iter()
        .find(|span| span["name"] == "run")
        .expect("one");
    let time = |span: &Value, key: &str| -> u64 {
        let text = span[key].as_str().expect("text");
        text.parse().expect("a number")
    };
    let mut ids = BTreeSet::new();
    for span in &spans {
        assert_eq!(span["traceId"], root["traceId"]);
        assert!(
            ids.insert(span["spanId"].as_str().expect("text")),
            "one span, one id"
        );
        if span["name"] != "run" {
            assert_eq!(span["parentSpanId"], root["spanId"]);
        }
        assert_eq!(span["status"]["code"], 1, "{span}");
        assert!(time(span, "startTimeUnixNano") <= time(span, "endTimeUnixNano"));
    }
    let said = run.log();
    assert!(!said.contains("sesame"), "{said}");
}

/// What is typed counts for more than what the environment says.
#[test]
fn a_collector_can_be_named_on_the_command_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let last = |body: &str| body.contains("\"name\":\"run\"");
    let (collected, bodies) = std::sync::mpsc::channel();
    std::thread::spawn(move || collected.send(collect(listener, last)));
    let run = slow(&folder)
        .with("SIM_TASK_MS", 0)
        .with("SIM_STEP_MS", 0)
        .with("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
        .with("OTEL_EXPORTER_OTLP_HEADERS", "x-key=sesame");
    let mut command = run.run_command();
    command.args(["--otlp", &format!("http://{address}/")]);
    let output = command.output().expect("the coordinator starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let bodies = bodies
        .recv_timeout(PATIENCE)
        .expect("it ends with the run's span");
    let text = bodies.iter().map(Value::to_string).collect::<String>();
    assert!(text.contains("attempt trajectories"), "{text}");
}

#[test]
fn a_collector_that_is_no_url_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = slow(&folder);
    for wrong in ["", "127.0.0.1:4318", "ftp://127.0.0.1"] {
        let mut command = run.run_command();
        let output = command.args(["--otlp", wrong]).output();
        let output = output.expect("the coordinator starts");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(
            errors.contains("--otlp is no URL of a collector"),
            "{wrong:?}: {errors}"
        );
    }
}

#[test]
fn all_logs_can_be_lines_of_json() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = slow(&folder).with("SIM_TASK_MS", 0).with("SIM_STEP_MS", 0);
    let mut command = run.run_command();
    command.args(["--log-format", "json", "--verbose", "--json"]);
    let output = command.output().expect("the coordinator starts");
    let errors = String::from_utf8(output.stderr).expect("text");
    assert!(output.status.success(), "{errors}");
    let lines = errors.lines().filter(|line| line.starts_with('{'));
    assert!(lines.clone().count() > 5, "{errors}");
    for line in lines {
        let line: Value = serde_json::from_str(line).expect("JSON");
        assert!(line["timestamp"].is_string() && line["level"].is_string());
    }
    let log = run.output().join("logs/local-0.log");
    let log = std::fs::read_to_string(log).expect("a log");
    let mut engine = 0;
    for line in log.lines() {
        let line: Value = serde_json::from_str(line).expect("each line is JSON");
        assert!(
            line["timestamp"].is_string() && line["level"].is_string(),
            "{line}"
        );
        // The engine's own fields are in it.
        engine += usize::from(line["said"]["fields"]["message"] == "task started");
    }
    assert!(engine > 0, "{log}");
}
