use super::*;

fn workers() -> Workers {
    let pairs = [("b", "2"), ("a", "1")].map(|(key, value)| (key.into(), value.into()));
    Workers {
        kubernetes: Kubernetes {
            image: "registry.example.com/worker:1".into(),
            namespace: None,
            service: "distillery-coordinator".into(),
            service_account: None,
            gpus: 1,
            gpu_resource: "nvidia.com/gpu".into(),
            resources: BTreeMap::from([("memory".into(), "8Gi".into())]),
            node_selector: BTreeMap::from(pairs),
            tolerations: Vec::new(),
            labels: BTreeMap::new(),
            image_pull_secrets: Vec::new(),
            env_from: Vec::new(),
            volumes: Vec::new(),
            priority_class: None,
            grace_seconds: 120,
            unreachable_seconds: 30,
        },
        run_id: "0198f3a2-7c11-7e55-b9f0-3f7a4c1d2e90".into(),
        count: 4,
        join: recipe::Secret::new("one".into()),
        insecure: false,
    }
}

fn settings(workers: &Workers) -> String {
    let (job, settings) = workers.marked_job("distillery").expect("it is written");
    let marks = job.metadata.annotations.expect("a mark");
    assert_eq!(marks.get(SETTINGS), Some(&settings));
    settings
}

/// A coordinator of another build adopts the Job of this one; where this figure changes, it replaces it.
#[test]
fn the_mark_of_a_job_follows_from_what_is_sent_and_from_nothing_else() {
    let own = settings(&workers());
    assert_eq!(own, "f3841ac9c078f2dd0f163007345d8661");
    let mut another = workers();
    another.join = recipe::Secret::new("two".into());
    assert_eq!(settings(&another), own, "the join string is in the Secret");
    type Change = fn(&mut Workers);
    let changes: [Change; 5] = [
        |workers| workers.count = 5,
        |workers| workers.insecure = true,
        |workers| workers.kubernetes.grace_seconds = 121,
        |workers| workers.kubernetes.service = "elsewhere".into(),
        |workers| workers.kubernetes.image = "registry.example.com/worker:2".into(),
    ];
    for change in changes {
        let mut changed = workers();
        change(&mut changed);
        assert_ne!(settings(&changed), own);
    }
}
