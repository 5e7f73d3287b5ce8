//! The manifests of deploy/kubernetes are what their recipes render, are whole, and let no pod do more than it must.

use std::collections::BTreeSet;

use distillery_tests::harness::programs;
use distillery_tests::manifests::{
    Document, OVERLAYS, folder, read, rendered, stored, unknown_keys,
};
use serde_json::Value;

fn objects() -> Vec<(String, Value)> {
    let documents = stored().expect("deploy/kubernetes is readable");
    assert!(documents.len() >= 15, "{} manifests", documents.len());
    let read = |document: Document| {
        let object = read(&document).expect("YAML");
        (document.file, object)
    };
    documents.into_iter().map(read).collect()
}

#[test]
fn the_files_are_what_their_recipes_render() {
    let coordinator = programs().expect("built").join("coordinator");
    let kept = stored().expect("deploy/kubernetes is readable");
    let mut seen = BTreeSet::new();
    for overlay in OVERLAYS {
        for document in rendered(&coordinator, overlay).expect("it renders") {
            let kept = kept.iter().find(|kept| kept.file == document.file);
            assert_eq!(
                kept.map(|kept| kept.text.as_str()),
                Some(document.text.as_str()),
                "{} (`manifests --write` writes what is meant)",
                document.file
            );
            seen.insert(document.file);
        }
    }
    let by_hand: Vec<_> = kept
        .iter()
        .filter(|kept| !seen.contains(&kept.file))
        .collect();
    assert!(
        by_hand
            .iter()
            .all(|kept| kept.file.ends_with("/claim.yaml")),
        "{by_hand:?}"
    );
}

/// A budget of nothing protects nothing, and one of everything keeps nodes from being emptied.
#[test]
fn an_eviction_leaves_somebody_and_is_always_possible() {
    let coordinator = programs().expect("built").join("coordinator");
    for (workers, gpus, kept) in [
        ("{min: 8, max: 16}", 8, 1),
        ("{min: 2, max: 4}", 0, 1),
        ("{min: 4, max: 4}", 1, 3),
        ("{min: 1, max: 4}", 1, 1),
        ("{min: 1, max: 1}", 1, 0),
        ("{min: 4, max: 8}", 8, 0),
    ] {
        let mut render = std::process::Command::new(&coordinator);
        render.args(["render", "kubernetes"]);
        render.arg(folder().join("recipes/gpu.yaml"));
        render.args(["--set", &format!("cluster.workers={workers}")]);
        render.args(["--set", &format!("cluster.kubernetes.gpus={gpus}")]);
        let output = render.output().expect("it starts");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let text = String::from_utf8_lossy(&output.stdout);
        let wanted = format!("minAvailable: {kept}\n");
        assert!(text.contains(&wanted), "{workers} {gpus}: {wanted}");
    }
}

/// What ends a worker asks the worker itself: neither the coordinator nor the store, which may be away for long.
#[test]
fn the_probe_of_a_worker_looks_where_the_worker_signs() {
    let mut seen = 0;
    for (file, object) in objects() {
        let container = &object["spec"]["template"]["spec"]["containers"][0];
        if object["kind"] != "Job" || container["name"] != "worker" {
            continue;
        }
        seen += 1;
        let words = |value: &Value| -> Vec<String> {
            let words = value.as_array().into_iter().flatten();
            words.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let args = words(&container["args"]);
        let at = args.iter().position(|arg| arg == "--alive");
        let signed = &args[at.expect("it signs") + 1];
        let probe = words(&container["livenessProbe"]["exec"]["command"]);
        assert_eq!(probe[..3], ["worker", "alive", signed], "{file}");
        // The root file system is only read.
        let mounts = container["volumeMounts"].as_array().expect("a list");
        let writable = mounts.iter().any(|mount| {
            let path = mount["mountPath"].as_str().expect("text");
            mount["readOnly"] != true && signed.starts_with(&format!("{path}/"))
        });
        assert!(writable, "{file}: {signed}");
    }
    assert!(seen > 0, "a manifest starts workers");
}

#[test]
fn every_key_is_one_of_its_type() {
    for (file, object) in objects() {
        let lost = unknown_keys(&object).unwrap_or_else(|error| panic!("{file}: {error:#}"));
        assert_eq!(lost, [""; 0], "{file}");
    }
    let (_, mut job) = objects()
        .into_iter()
        .find(|(_, object)| object["kind"] == "Job")
        .expect("a Job");
    job["spec"]["template"]["spec"]["bogusField"] = 1.into();
    let lost = unknown_keys(&job).expect("it is read all the same");
    assert_eq!(lost, [".spec.template.spec.bogusField"]);
}

#[test]
fn kustomizations_name_every_file_beside_them_and_nothing_else() {
    let overlays = OVERLAYS.map(|overlay| format!("overlays/{overlay}"));
    for inside in ["base".to_owned(), "launcher".to_owned()]
        .iter()
        .chain(&overlays)
    {
        let path = folder().join(inside);
        let text =
            std::fs::read_to_string(path.join("kustomization.yaml")).expect("a kustomization");
        let kustomization: Value = serde_saphyr::from_str(&text).expect("YAML");
        let named = kustomization["resources"].as_array().expect("resources");
        let named: BTreeSet<&str> = named.iter().filter_map(Value::as_str).collect();
        for resource in &named {
            assert!(path.join(resource).exists(), "{inside} names {resource}");
        }
        for entry in std::fs::read_dir(&path).expect("readable") {
            let name = entry
                .expect("readable")
                .file_name()
                .to_string_lossy()
                .into_owned();
            assert!(
                name == "kustomization.yaml" || named.contains(name.as_str()),
                "{inside} leaves out {name}"
            );
        }
    }
}

/// The standard `restricted`, which the namespace enforces.
#[test]
fn no_pod_is_root_or_writes_where_it_should_not() {
    let mut pods = 0;
    for (file, object) in objects()
        .iter()
        .filter(|(_, object)| object["kind"] == "Job")
    {
        let pod = &object["spec"]["template"]["spec"];
        let security = &pod["securityContext"];
        assert_eq!(security["runAsNonRoot"], true, "{file}");
        assert_eq!(
            security["seccompProfile"]["type"], "RuntimeDefault",
            "{file}"
        );
        for container in pod["containers"].as_array().expect("containers") {
            let own = &container["securityContext"];
            assert_eq!(own["readOnlyRootFilesystem"], true, "{file}");
            assert_eq!(own["allowPrivilegeEscalation"], false, "{file}");
            assert_eq!(own["capabilities"]["drop"][0], "ALL", "{file}");
            let mounts = container["volumeMounts"].as_array().expect("mounts");
            assert!(
                mounts.iter().any(|mount| mount["mountPath"] == "/tmp"),
                "{file}"
            );
            assert!(
                container["resources"]["requests"]["memory"].is_string(),
                "{file}"
            );
        }
        pods += 1;
    }
    assert_eq!(
        pods, 4,
        "a coordinator in each overlay, and the workers that a manifest starts"
    );
}

#[test]
fn what_goes_together_has_the_same_names() {
    let all = objects();
    let named = |kind: &str, file: &str| {
        let found = all
            .iter()
            .find(|(path, object)| object["kind"] == kind && path.contains(file));
        found
            .map(|(_, object)| object)
            .unwrap_or_else(|| panic!("no {kind} in {file}"))
    };
    let service = named("Service", "base/");
    for overlay in OVERLAYS {
        let job = named("Job", &format!("overlays/{overlay}/coordinator"));
        let template = &job["spec"]["template"];
        let labels = &template["metadata"]["labels"];
        let selector = service["spec"]["selector"].as_object().expect("a selector");
        assert!(
            selector.iter().all(|(key, value)| labels[key] == *value),
            "{overlay}"
        );
        let ports = template["spec"]["containers"][0]["ports"]
            .as_array()
            .expect("ports");
        for port in service["spec"]["ports"].as_array().expect("ports") {
            let same = |own: &&Value| {
                own["name"] == port["targetPort"] && own["containerPort"] == port["port"]
            };
            assert!(ports.iter().any(|own| same(&own)), "{overlay}: {port}");
        }
        let account = &template["spec"]["serviceAccountName"];
        assert_eq!(
            *account,
            named("ServiceAccount", "base/")["metadata"]["name"]
        );
        assert_eq!(
            *account,
            named("RoleBinding", "launcher/")["subjects"][0]["name"]
        );
        let launches = overlay != "external";
        assert_eq!(
            template["spec"]["automountServiceAccountToken"], launches,
            "{overlay}"
        );
    }
}

/// Strangers may take all places of the page; that must not have the coordinator killed.
#[test]
fn no_probe_that_kills_the_coordinator_asks_its_page() {
    let jobs = objects()
        .into_iter()
        .filter(|(file, object)| object["kind"] == "Job" && file.ends_with("coordinator.yaml"));
    let mut seen = 0;
    for (file, job) in jobs {
        let container = &job["spec"]["template"]["spec"]["containers"][0];
        for probe in ["startupProbe", "livenessProbe"] {
            let probe = &container[probe];
            assert_eq!(probe["tcpSocket"]["port"], "grpc", "{file}: {probe}");
            assert!(probe.get("httpGet").is_none(), "{file}: {probe}");
        }
        assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/readyz");
        seen += 1;
    }
    assert_eq!(seen, OVERLAYS.len());
}

#[test]
fn a_secret_is_never_written_down() {
    for (file, object) in objects() {
        assert_ne!(object["kind"], "Secret", "{file}");
    }
    let coordinator = programs().expect("built").join("coordinator");
    let render = |set: &str| {
        let output = std::process::Command::new(&coordinator)
            .args(["render", "kubernetes", "--set", set])
            .arg(folder().join("recipes/cpu.yaml"))
            .output()
            .expect("it starts");
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    };
    let token = "7".repeat(64);
    let (code, said) = render(&format!("cluster.token={token}"));
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("distillery-token") && !said.contains(&token),
        "{said}"
    );
    let (code, said) = render("output=/elsewhere/run");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cluster.kubernetes.volumes"), "{said}");
    let (code, said) = render("cluster={launcher: local}");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cluster.kubernetes"), "{said}");
}
