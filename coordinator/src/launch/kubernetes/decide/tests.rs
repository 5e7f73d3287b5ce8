use super::*;

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn job() -> SeenJob {
    SeenJob {
        uid: "job".into(),
        current: true,
        leaving: false,
        finished: None,
    }
}

fn pod(name: &str, phase: &str) -> SeenPod {
    SeenPod {
        name: name.into(),
        uid: format!("uid-{name}"),
        phase: phase.into(),
        ..SeenPod::default()
    }
}

fn with(pods: Vec<SeenPod>) -> Seen {
    let job = Some(job());
    Seen { job, pods }
}

fn alive(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn nobody() -> BTreeSet<String> {
    BTreeSet::new()
}

/// What is decided at `now` after whatever `memory` holds.
fn at(now: u64, seen: &Seen, alive: &BTreeSet<String>, memory: &mut Memory) -> Vec<Act> {
    decide(seconds(now), seen, alive, memory)
}

fn told(acts: &[Act]) -> String {
    let texts = acts.iter().map(|act| match act {
        Act::Tell(text) | Act::GiveUp(text) => text.as_str(),
        Act::Create | Act::Replace { .. } | Act::Release { .. } => "",
    });
    texts.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_job_is_made_where_there_is_none_and_adopted_where_it_is_right() {
    let mut memory = Memory::default();
    let acts = at(0, &Seen::default(), &nobody(), &mut memory);
    assert_eq!(acts, [Act::Create]);
    let mut later = Memory::default();
    assert_eq!(at(0, &with(Vec::new()), &nobody(), &mut later), []);
}

#[test]
fn a_job_of_other_settings_or_of_the_past_is_replaced_at_the_start_alone() {
    let mut other = with(Vec::new());
    let mut past = with(Vec::new());
    if let (Some(other), Some(past)) = (&mut other.job, &mut past.job) {
        other.current = false;
        past.finished = Some(Finished::Complete);
    }
    for seen in [&other, &past] {
        let acts = at(0, seen, &nobody(), &mut Memory::default());
        let uid = "job".to_owned();
        assert_eq!(acts.last(), Some(&Act::Replace { uid }));
    }
    let mut memory = Memory::default();
    at(0, &with(Vec::new()), &nobody(), &mut memory);
    assert_eq!(at(1, &other, &nobody(), &mut memory), []);
    // It may be the sign of a run that is about to end; later it is not.
    assert_eq!(at(2, &past, &nobody(), &mut memory), []);
    assert_eq!(at(31, &past, &nobody(), &mut memory), []);
    assert_eq!(at(32, &past, &nobody(), &mut memory).len(), 2);
}

#[test]
fn a_job_that_failed_ends_the_run_with_the_words_of_who_was_started_wrongly() {
    let mut wrong = pod("w-0", "Failed");
    wrong.ended = Some((Some(64), "error: unexpected argument".into()));
    let mut other = pod("w-1", "Failed");
    other.ended = Some((Some(1), "error: no bucket".into()));
    let mut seen = with(vec![wrong, other]);
    let mut memory = Memory::default();
    at(0, &with(Vec::new()), &nobody(), &mut memory);
    if let Some(job) = &mut seen.job {
        job.finished = Some(Finished::Failed {
            reason: "PodFailurePolicy".into(),
            message: "exit code 64".into(),
        });
    }
    let acts = at(1, &seen, &nobody(), &mut memory);
    let [Act::GiveUp(text)] = acts.as_slice() else {
        panic!("{acts:?}");
    };
    assert!(
        text.contains("PodFailurePolicy") && text.contains("unexpected argument"),
        "{text}"
    );
    assert_eq!(at(2, &seen, &nobody(), &mut memory), [], "it is said once");
}

#[test]
fn a_pod_is_released_when_its_time_is_up_and_its_worker_is_not_heard() {
    let mut stuck = pod("w-0", "Running");
    stuck.leaving = Some(seconds(120));
    let seen = with(vec![stuck.clone(), pod("w-1", "Running")]);
    let release = Act::Release {
        pod: "w-0".into(),
        uid: "uid-w-0".into(),
    };
    let mut memory = Memory::default();
    assert_eq!(at(100, &seen, &nobody(), &mut memory), []);
    assert_eq!(at(234, &seen, &nobody(), &mut memory), []);
    assert_eq!(
        at(240, &seen, &alive(&["w-0"]), &mut memory),
        [],
        "it is heard"
    );
    assert!(at(241, &seen, &alive(&["w-1"]), &mut memory).contains(&release));
    // Where the node is the reason nobody on it hears of the grace.
    stuck.disrupted = Some(BY_NODE.into());
    let seen = with(vec![stuck]);
    let mut memory = Memory::default();
    assert_eq!(at(0, &seen, &nobody(), &mut memory), []);
    assert_eq!(at(9, &seen, &nobody(), &mut memory), []);
    assert_eq!(
        at(11, &seen, &alive(&["w-0"]), &mut memory),
        [],
        "it is heard"
    );
    assert!(at(12, &seen, &nobody(), &mut memory).contains(&release));
    // A look without the pod forgets it; another pod of its name is another.
    assert_eq!(at(13, &with(Vec::new()), &nobody(), &mut memory), []);
    assert_eq!(at(14, &seen, &nobody(), &mut memory), []);
}

#[test]
fn waits_are_told_once_while_they_last_and_fail_nothing() {
    let mut no_room = pod("w-0", "Pending");
    no_room.unplaced = Some("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.".into());
    let mut no_image = pod("w-1", "Pending");
    no_image.waiting = Some(("ImagePullBackOff".into(), "not found".into()));
    let mut memory = Memory::default();
    let acts = at(
        0,
        &with(vec![no_room.clone(), no_image]),
        &nobody(),
        &mut memory,
    );
    let text = told(&acts);
    assert_eq!(acts.len(), 2, "{text}");
    assert!(text.contains("Insufficient nvidia.com/gpu"), "{text}");
    assert!(text.contains("cannot be pulled: not found"), "{text}");
    let waits = with(vec![no_room.clone()]);
    assert_eq!(at(86_400, &waits, &nobody(), &mut memory), []);
    assert_eq!(at(86_401, &with(Vec::new()), &nobody(), &mut memory), []);
    assert_eq!(
        at(86_402, &waits, &nobody(), &mut memory).len(),
        1,
        "it is a new wait"
    );
}

#[test]
fn an_image_that_cannot_be_a_name_is_hopeless() {
    let mut never = pod("w-0", "Pending");
    never.waiting = Some((NEVER.into(), "invalid reference format".into()));
    let acts = at(0, &with(vec![never]), &nobody(), &mut Memory::default());
    assert!(matches!(acts.as_slice(), [Act::GiveUp(text)] if text.contains("invalid reference")));
}

#[test]
fn workers_that_fail_without_being_heard_are_given_up_and_others_are_not() {
    let failed = |at: usize, code: i32| {
        let mut pod = pod(&format!("w-0-{at}"), "Failed");
        pod.ended = Some((Some(code), "no bucket".into()));
        pod
    };
    let fail = |code: i32, alive: &BTreeSet<String>| {
        let mut memory = Memory::default();
        let mut acts = Vec::new();
        for n in 1..=FAILURES {
            let pods = (0..n).map(|at| failed(at, code)).collect();
            acts = at(n as u64, &with(pods), alive, &mut memory);
        }
        acts
    };
    let acts = fail(1, &nobody());
    assert!(
        matches!(acts.last(), Some(Act::GiveUp(text)) if text.contains("no bucket")),
        "{acts:?}"
    );
    let is_given_up = |acts: &[Act]| acts.iter().any(|act| matches!(act, Act::GiveUp(_)));
    assert!(
        !is_given_up(&fail(1, &alive(&["w-1"]))),
        "another one is heard"
    );
    assert_eq!(
        fail(TRY_AGAIN, &nobody()),
        [],
        "they want to be started again"
    );
    let mut evicted = failed(0, 137);
    evicted.disrupted = Some("EvictionByEvictionAPI".into());
    let acts = at(0, &with(vec![evicted]), &nobody(), &mut Memory::default());
    assert!(
        told(&acts).contains("had to leave (EvictionByEvictionAPI)"),
        "{acts:?}"
    );
}

#[test]
fn a_worker_whose_exit_code_is_not_known_has_not_left_well() {
    let mut lost = pod("w-0-x", "Failed");
    lost.ended = Some((None, "ContainerStatusUnknown".into()));
    let mut seen = with(vec![lost]);
    let mut memory = Memory::default();
    let acts = at(0, &seen, &nobody(), &mut memory);
    assert!(
        told(&acts).contains("its exit code is not known: ContainerStatusUnknown"),
        "{acts:?}"
    );
    if let Some(job) = &mut seen.job {
        job.finished = Some(Finished::Failed {
            reason: "BackoffLimitExceeded".into(),
            message: "too many".into(),
        });
    }
    let acts = at(1, &seen, &nobody(), &mut memory);
    assert!(
        matches!(acts.as_slice(), [Act::GiveUp(text)] if text.contains("ContainerStatusUnknown")),
        "{acts:?}"
    );
}

#[test]
fn pods_that_all_fail_at_once_are_not_given_up() {
    let mut memory = Memory::default();
    let failed = |index: usize, life: usize| {
        let mut pod = pod(&format!("w-{index}-x{life}"), "Failed");
        pod.ended = Some((Some(137), "out of memory".into()));
        pod
    };
    let look = |life: usize, memory: &mut Memory| {
        let pods = (0..16).map(|index| failed(index, life)).collect();
        at(life as u64, &with(pods), &nobody(), memory)
    };
    let is_given_up = |acts: &[Act]| acts.iter().any(|act| matches!(act, Act::GiveUp(_)));
    for life in 1..FAILURES {
        assert!(!is_given_up(&look(life, &mut memory)), "life {life}");
    }
    assert!(is_given_up(&look(FAILURES, &mut memory)));
}
