//! Runs whose workers are pods, against a Kubernetes API server in this process that runs them as real processes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use distillery_tests::harness::{EngineKind, Made, Run, Target, repository, signal, sim_recipe};
use distillery_tests::kubernetes::{Fake, Program, Refusal, Room, Rule, Ways, rules};

const PATIENCE: Duration = Duration::from_secs(180);

/// The recipe of the stand-in with workers as pods of this host's network.
///
/// Pods know the coordinator by one address for as long as they live, as a Service gives it.
fn recipe() -> String {
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
    let port = free.expect("a free port").port();
    let local = sim_recipe();
    let (before, _) = local
        .split_once("cluster:")
        .expect("the recipe says who works");
    format!(
        "{before}cluster:\n  launcher: kubernetes\n  listen: \"127.0.0.1:{port}\"\n  workers: {{min: 2, max: 2}}\n  kubernetes: {{image: \"registry.example.com/worker:1\", service: 127.0.0.1, grace_seconds: 10, unreachable_seconds: 30}}\n"
    )
}

fn role() -> Vec<Rule> {
    let manifest = repository().join("deploy/kubernetes/launcher/role.yaml");
    rules(&manifest).expect("the Role that is deployed")
}

/// A run and the cluster that it asks for workers.
struct Scene {
    run: Run,
    fake: Fake,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new(ways: Ways, pace_ms: u32, change: impl FnOnce(&mut Program)) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path();
        let kubeconfig: PathBuf = path.join("cluster/kubeconfig");
        let run = Run::new(path, &recipe(), EngineKind::Sim)
            .expect("the programs are built")
            .with("SIM_STEP_MS", pace_ms)
            .with("SIM_TASK_MS", pace_ms * 4)
            .with("KUBECONFIG", kubeconfig.display());
        let mut program = Program::of(&run.command("worker"));
        change(&mut program);
        let ways = Ways {
            role: Some(role()),
            ..ways
        };
        let fake = Fake::start(&path.join("cluster"), program, ways).expect("a cluster");
        Self {
            run,
            fake,
            _folder: folder,
        }
    }

    /// Waits until both pods run, and gives their names.
    fn both_run(&self) -> Vec<String> {
        let both = self.fake.until("two pods that run", PATIENCE, |world| {
            let running = world.running();
            (running.len() == 2).then_some(running)
        });
        both.unwrap_or_else(|error| panic!("{error}\n{}", self.run.log_tail()))
    }

    /// Waits until the coordinator has said `words`.
    fn said(&self, words: &str) {
        let log = || self.run.log().contains(words).then_some(());
        self.run
            .await_some(log, words, PATIENCE)
            .expect("it is said");
    }

    /// The run ends well and leaves nothing in the cluster.
    fn finish(&mut self) -> Made {
        self.run.finish(PATIENCE).expect("it finishes");
        self.nothing_left();
        self.run.made().expect("everything is readable")
    }

    fn nothing_left(&self) {
        let empty = self.fake.until("empty cluster", PATIENCE, |world| {
            let left = world.jobs().len() + world.secrets().len() + world.phases().len();
            (left == 0).then_some(())
        });
        empty.expect("Job, Secret and pods are gone");
        self.run.no_orphans(PATIENCE).expect("all processes end");
        let forbidden = self.fake.world(|world| world.forbidden.clone());
        assert_eq!(forbidden, [], "the Role allows what is asked");
    }

    fn jobs_made(&self) -> usize {
        self.fake.world(|world| world.jobs_made.len())
    }
}

/// What the same recipe makes with workers of this host.
fn undisturbed() -> Made {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = Run::new(folder.path(), sim_recipe(), EngineKind::Sim).expect("built");
    run.finish(PATIENCE).expect("it finishes");
    run.made().expect("everything is readable")
}

#[test]
fn a_run_goes_through_pods_although_one_and_the_coordinator_are_killed() {
    let mut scene = Scene::new(Ways::default(), 120, |_| {});
    scene.run.start().expect("starts");
    let pods = scene.both_run();
    let pid = scene
        .fake
        .world(|world| world.pid_of(&pods[0]))
        .expect("it runs");
    signal(pid, "KILL").expect("killed");
    let others = scene.fake.until("a pod in its place", PATIENCE, |world| {
        let running = world.running();
        (running.len() == 2 && !running.contains(&pods[0])).then_some(running)
    });
    let others = others.expect("it is replaced");
    assert_eq!(scene.run.kill(Target::Coordinator, 0).expect("killed"), 1);
    scene.run.wait(PATIENCE).expect("it is dead");
    assert_eq!(scene.fake.running(), others, "pods outlive a coordinator");
    scene.run.start().expect("starts again");
    let made = scene.finish();
    assert_eq!(scene.jobs_made(), 1, "the Job is adopted");
    assert_eq!(scene.fake.world(|world| world.made), 3);
    assert_eq!(made, undisturbed(), "the same bits");
}

/// And in doing so it asks for everything that the Role allows, and for nothing else.
#[test]
fn pods_of_a_dead_node_are_released_and_replaced() {
    let mut scene = Scene::new(Ways::default(), 50, |_| {});
    scene.run.start().expect("starts");
    let pods = scene.both_run();
    let node = scene
        .fake
        .world(|world| world.node_of(&pods[0]))
        .expect("it is bound");
    scene.fake.world(|world| world.power_off(&node));
    let leaving =
        |world: &distillery_tests::kubernetes::World| world.is_leaving(&pods[0]).then_some(());
    scene
        .fake
        .until("pod that leaves", PATIENCE, leaving)
        .expect("its toleration ends");
    scene.said("its node is given up");
    let replaced = scene.fake.until("a pod in its place", PATIENCE, |world| {
        let running = world.running();
        (running.len() == 2 && !running.contains(&pods[0])).then_some(())
    });
    replaced.expect("it is replaced");
    scene.finish();
    let asked: Vec<Rule> = scene.fake.asked().into_iter().collect();
    let mut allowed = role();
    allowed.sort();
    assert_eq!(asked, allowed, "what is asked is what the Role allows");
}

/// Pods are probed all the time, here and in all other tests, and only the one that hangs is ended.
#[test]
fn a_worker_that_hangs_is_ended_by_its_probe_and_replaced() {
    let mut scene = Scene::new(Ways::default(), 120, |_| {});
    scene.run.start().expect("starts");
    let pods = scene.both_run();
    let pid = scene
        .fake
        .world(|world| world.pid_of(&pods[0]))
        .expect("it runs");
    let sign = scene.fake.on_volume(&pods[0], "scratch").join("alive");
    scene
        .run
        .await_path(&sign, PATIENCE)
        .expect("it shows that it lives");
    signal(pid, "STOP").expect("stopped");
    // Nobody waits for minutes: as if it had hung for an hour.
    let hour = std::time::Duration::from_secs(3600);
    let file = std::fs::File::options().append(true).open(&sign);
    let file = file.expect("there");
    let signed = file.metadata().and_then(|file| file.modified());
    let long_ago = signed.expect("a time") - hour;
    file.set_modified(long_ago).expect("set");
    let replaced = scene.fake.until("a pod in its place", PATIENCE, |world| {
        let running = world.running();
        (running.len() == 2 && !running.contains(&pods[0])).then_some(running)
    });
    let running = replaced.expect("it is replaced");
    assert!(running.contains(&pods[1]), "the other pod is left alone");
    scene.finish();
    assert_eq!(scene.fake.world(|world| world.made), 3);
}

#[test]
fn an_evicted_worker_leaves_in_order_and_is_replaced() {
    let mut scene = Scene::new(Ways::default(), 120, |_| {});
    scene.run.start().expect("starts");
    let pods = scene.both_run();
    scene.fake.world(|world| world.evict(&pods[0]));
    let replaced = scene.fake.until("a pod in its place", PATIENCE, |world| {
        let running = world.running();
        (running.len() == 2 && !running.contains(&pods[0])).then_some(())
    });
    replaced.expect("an index whose pod was made to leave is not done");
    scene.finish();
}

#[test]
fn a_worker_that_was_started_wrongly_ends_the_run_with_its_words() {
    let wrong = |program: &mut Program| program.before = vec!["--nonsense".into()];
    let mut scene = Scene::new(Ways::default(), 0, wrong);
    scene.run.start().expect("starts");
    let status = scene.run.wait(PATIENCE).expect("it ends");
    assert_eq!(status.code(), Some(1), "{}", scene.run.log_tail());
    let said = scene.run.log();
    assert!(said.contains("PodFailurePolicy"), "{said}");
    assert!(said.contains("unexpected argument '--nonsense'"), "{said}");
    scene.nothing_left();
    // The same command makes another Job, once the cause is gone.
    scene.fake.world(|world| world.correct_program());
    scene.run.start().expect("starts again");
    scene.finish();
    assert_eq!(scene.jobs_made(), 2);
}

#[test]
fn waiting_for_room_or_an_image_is_told_and_fails_nothing() {
    let ways = Ways {
        room: Room::None,
        ..Ways::default()
    };
    let mut scene = Scene::new(ways, 0, |_| {});
    scene.run.start().expect("starts");
    scene.said("no node has room: 0/4 nodes are available: 4 Insufficient nvidia.com/gpu.");
    scene.fake.world(|world| world.set_room(Room::NoImage));
    scene.said(
        "the image cannot be pulled: Back-off pulling image \"registry.example.com/worker:1\"",
    );
    scene.fake.world(|world| world.set_room(Room::Free));
    scene.finish();
    let told = scene.run.log().matches("no node has room").count();
    assert_eq!(told, 1, "{}", scene.run.log_tail());
}

#[test]
fn trouble_with_the_api_server_costs_no_pod() {
    let mut scene = Scene::new(Ways::default(), 150, |_| {});
    let refusal = |verb, resource, code, retry_after| Refusal {
        verb,
        resource,
        code,
        retry_after,
    };
    scene.fake.world(|world| {
        world.refusals = vec![
            refusal("create", "jobs", 409, None),
            refusal("patch", "secrets", 429, Some(1)),
            refusal("list", "pods", 429, Some(1)),
            refusal("get", "jobs", 500, None),
            refusal("watch", "pods", 410, None),
        ];
    });
    scene.run.start().expect("starts");
    scene.both_run();
    // A watch is not always under way.
    let expired = || {
        scene.fake.compact();
        scene.fake.world(|world| world.expired > 0).then_some(())
    };
    let expired = scene
        .run
        .await_some(expired, "watch that expired", PATIENCE);
    expired.expect("watches see that their version is too old");
    let said = |words: &str| scene.run.log().matches(words).count();
    let before = said("answers again");
    let failures = said("; trying again");
    scene.fake.away(true);
    let noticed = || (said("; trying again") > failures).then_some(());
    let noticed = scene.run.await_some(noticed, "failure", PATIENCE);
    noticed.expect("the launcher is not answered");
    scene.fake.away(false);
    let again = || (said("answers again") > before).then_some(());
    let again = scene
        .run
        .await_some(again, "answer after the silence", PATIENCE);
    again.expect("the launcher tries again");
    scene.finish();
    let (made, refused, left) = scene
        .fake
        .world(|world| (world.made, world.refused, world.refusals.len()));
    assert_eq!(
        (made, refused, left),
        (2, 5, 0),
        "pods made, requests refused, refusals left"
    );
    assert_eq!(scene.jobs_made(), 1);
}

/// What a webhook or a proxy refuses once, it may allow the next time; pods that run are worth more than its word.
#[test]
fn only_a_job_that_is_refused_itself_ends_the_run() {
    let mut scene = Scene::new(Ways::default(), 100, |_| {});
    let refusal = |verb, resource, code| Refusal {
        verb,
        resource,
        code,
        retry_after: None,
    };
    let elsewhere = vec![
        refusal("get", "jobs", 400),
        refusal("patch", "secrets", 422),
        refusal("patch", "secrets", 400),
        refusal("list", "pods", 422),
        refusal("watch", "pods", 400),
    ];
    scene.fake.world(|world| world.refusals = elsewhere);
    scene.run.start().expect("starts");
    scene.both_run();
    scene.said("listing pods: refused by the test (422); trying again");
    scene.finish();
    assert_eq!(scene.jobs_made(), 1);
    let refused = scene.fake.world(|world| world.refused);
    assert_eq!(refused, 5, "all of them were met");

    for code in [400, 422] {
        let mut scene = Scene::new(Ways::default(), 0, |_| {});
        let wrong = vec![refusal("create", "jobs", code)];
        scene.fake.world(|world| world.refusals = wrong);
        scene.run.start().expect("starts");
        let status = scene.run.wait(PATIENCE).expect("it ends");
        assert_eq!(status.code(), Some(1), "{}", scene.run.log_tail());
        let said = scene.run.log();
        let words = format!("making the Job: refused by the test ({code})");
        assert!(said.contains(&words), "{said}");
    }
}

/// What the coordinator left behind when it was killed goes with the run that is cancelled.
#[test]
fn a_cancelled_run_without_a_coordinator_leaves_no_job() {
    let mut scene = Scene::new(Ways::default(), 120, |_| {});
    scene.run.start().expect("starts");
    scene.both_run();
    scene.run.kill(Target::Coordinator, 0).expect("killed");
    scene.run.wait(PATIENCE).expect("it is dead");
    let mut command = scene.run.command("coordinator");
    command.args(["cancel"]).arg(scene.run.output());
    let output = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    scene.nothing_left();
}

#[test]
fn a_cancelled_run_says_how_its_job_is_deleted_where_no_cluster_is_known() {
    let mut scene = Scene::new(Ways::default(), 120, |_| {});
    scene.run.start().expect("starts");
    scene.both_run();
    let job = scene.fake.world(|world| world.jobs()).pop().expect("a Job");
    scene.run.kill(Target::Coordinator, 0).expect("killed");
    scene.run.wait(PATIENCE).expect("it is dead");
    let mut command = scene.run.command("coordinator");
    command.args(["cancel"]).arg(scene.run.output());
    command.env("KUBECONFIG", scene.run.output().join("nowhere"));
    let output = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let words = format!("`kubectl delete job {job}` ends them");
    assert!(
        said.contains("the run is cancelled") && said.contains(&words),
        "{said}"
    );
    scene.fake.world(|world| world.delete_a_job(&job));
    scene.nothing_left();
}

#[test]
fn a_job_that_somebody_deletes_is_made_again() {
    let mut scene = Scene::new(Ways::default(), 120, |_| {});
    scene.run.start().expect("starts");
    scene.both_run();
    let name = scene.fake.world(|world| world.jobs()).pop().expect("a Job");
    scene.fake.world(|world| world.delete_a_job(&name));
    let again = scene.fake.until("another Job", PATIENCE, |world| {
        (world.jobs_made.len() == 2).then_some(())
    });
    again.expect("the run needs workers");
    scene.finish();
}

/// A Job that an earlier coordinator left is not what the recipe says any more.
#[test]
fn a_job_of_other_settings_is_replaced_after_a_restart() {
    let mut scene = Scene::new(Ways::default(), 40, |_| {});
    scene.run.start().expect("starts");
    scene.both_run();
    scene.run.kill(Target::Coordinator, 0).expect("killed");
    scene.run.wait(PATIENCE).expect("it is dead");
    let recipe = scene.run.output().with_file_name("recipe.yaml");
    let text = std::fs::read_to_string(&recipe).expect("the recipe");
    let changed = text.replace("grace_seconds: 10", "grace_seconds: 11");
    assert_ne!(text, changed);
    std::fs::write(&recipe, changed).expect("written");
    scene.run.start().expect("starts again");
    scene.said("made from other settings");
    scene.finish();
    assert_eq!(scene.jobs_made(), 2);
}

#[test]
fn without_a_cluster_the_run_says_what_is_missing() {
    let folder = tempfile::tempdir().expect("a folder");
    let nowhere = folder.path().join("nowhere");
    let run = Run::new(folder.path(), &recipe(), EngineKind::Sim).expect("built");
    let mut run = run.with("KUBECONFIG", nowhere.display());
    run.start().expect("starts");
    let status = run.wait(PATIENCE).expect("it ends");
    assert_eq!(status.code(), Some(1));
    let said = run.log();
    assert!(
        said.contains("there is no cluster") && said.contains("KUBECONFIG"),
        "{said}"
    );
}

/// What the doctor says of Kubernetes where KUBECONFIG is `kubeconfig`: the state in a word, and what was seen.
fn examined(kubeconfig: &Path) -> (String, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &recipe(), EngineKind::Sim).expect("built");
    let mut doctor = run.command("coordinator");
    doctor.args(["doctor", "--json"]);
    doctor.env("KUBECONFIG", kubeconfig);
    doctor.env("HOME", folder.path());
    doctor.env_remove("KUBERNETES_SERVICE_HOST");
    let output = doctor.output().expect("it starts");
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = said["checks"].as_array().expect("a list");
    let check = checks.iter().find(|check| check["name"] == "Kubernetes");
    let check = check.expect("it looks for Kubernetes");
    let text = |key: &str| check[key].as_str().expect("text").to_owned();
    (text("state"), text("seen"))
}

fn cluster(folder: &Path, role: Vec<Rule>) -> Fake {
    let ways = Ways {
        role: Some(role),
        ..Ways::default()
    };
    let idle = Program::of(&std::process::Command::new("true"));
    Fake::start(folder, idle, ways).expect("a cluster")
}

#[test]
fn the_doctor_says_whether_the_launcher_may_do_what_it_must() {
    let folder = tempfile::tempdir().expect("a folder");
    let fake = cluster(&folder.path().join("whole"), role());
    let (state, seen) = examined(&fake.kubeconfig());
    assert_eq!(state, "ok", "{seen}");
    assert!(
        seen.contains("v1.36.0") && seen.contains("namespace distillery"),
        "{seen}"
    );
    assert_eq!(fake.world(|world| world.forbidden.clone()), []);

    // Each rule of the Role is one that the doctor misses.
    for missing in role() {
        let left = role().into_iter().filter(|rule| *rule != missing);
        let fake = cluster(&folder.path().join("less"), left.collect());
        let (state, seen) = examined(&fake.kubeconfig());
        let words = match missing.group.as_str() {
            "" => format!("may not: {} {}", missing.verb, missing.resource),
            group => format!("may not: {} {}.{group}", missing.verb, missing.resource),
        };
        assert_eq!(state, "WARN", "{missing:?}: {seen}");
        assert!(seen.ends_with(&words), "{words}: {seen}");
    }

    fake.away(true);
    let (state, seen) = examined(&fake.kubeconfig());
    assert_eq!(state, "WARN", "{seen}");
    assert!(seen.contains("does not answer as it should"), "{seen}");
}

/// Of several clusters in a file only that of the current context counts, and a port that is open is no API server.
#[test]
fn the_doctor_asks_the_cluster_of_the_current_context() {
    let folder = tempfile::tempdir().expect("a folder");
    let fake = cluster(&folder.path().join("cluster"), role());
    let text = std::fs::read_to_string(fake.kubeconfig()).expect("a kubeconfig");
    let config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let good = config["clusters"][0]["cluster"]["server"].as_str();
    let good = good.expect("an address");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = format!("http://{}", listener.local_addr().expect("bound"));
    let written = |current: &str, first: &str, token: &str| {
        let path = folder.path().join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- cluster:\n    server: {first}\n  name: first\n- cluster:\n    server: {good}\n  name: good\n\
             users:\n- name: me\n  user: {{token: {token}}}\n\
             contexts:\n- name: first\n  context: {{cluster: first, user: me}}\n- name: good\n  context: {{cluster: good, user: me, namespace: distillery}}\n\
             current-context: {current}\n"
        );
        std::fs::write(&path, text).expect("written");
        path
    };
    // Nobody listens at port 1.
    let dead = "http://127.0.0.1:1";
    let token = config["users"][0]["user"]["token"].as_str().expect("text");
    let (state, seen) = examined(&written("good", dead, token));
    assert_eq!(state, "ok", "{seen}");
    for (current, first, token, words) in [
        ("first", dead, token, "does not answer as it should"),
        ("first", silent.as_str(), token, "no answer within 5 s"),
        ("good", dead, "another", "Unauthorized"),
        (
            "first",
            good,
            token,
            "in namespace default its launcher may not",
        ),
        ("nowhere", good, token, "its configuration cannot be used"),
    ] {
        let (state, seen) = examined(&written(current, first, token));
        assert_eq!(state, "WARN", "{current} {first}: {seen}");
        assert!(seen.contains(words), "{words}: {seen}");
    }
    let (state, seen) = examined(&folder.path().join("no-such-file"));
    assert_eq!(state, "WARN", "{seen}");
    let (state, seen) = examined(Path::new(""));
    assert_eq!(state, "ok", "{seen}");
    assert!(seen.starts_with("not here"), "{seen}");
}
