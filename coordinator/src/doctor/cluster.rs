//! Schedulers of clusters, as far as they can be reached from here.

use std::os::unix::fs::PermissionsExt as _;

use super::{Check, LOOK, answer};

/// Whether Slurm's launcher finds its programs, and the controller answers.
pub(super) async fn slurm() -> Check {
    const NAME: &str = "Slurm";
    const HELP: &str =
        "its launcher cannot start workers until slurmctld answers (`scontrol ping`)";
    /// What the launcher calls, what its scripts call, and what is asked here.
    const PROGRAMS: [&str; 5] = ["sbatch", "squeue", "scancel", "scontrol", "sinfo"];
    let (here, missing): (Vec<_>, Vec<_>) = PROGRAMS.iter().partition(|name| is_on_path(name));
    if here.is_empty() {
        return Check::well(NAME, "not here; only its launcher needs it");
    }
    let answered = answer("sinfo", &["--noheader", "--format=%P"], LOOK).await;
    if !missing.is_empty() {
        let silent = match answered {
            Some(Err(why)) => format!("; sinfo does not answer: {why}"),
            Some(Ok(_)) | None => String::new(),
        };
        return Check::warn(
            NAME,
            format!(
                "missing: {}; here: {}{silent}",
                listed(&missing),
                listed(&here)
            ),
            "its launcher needs all of them on this host's PATH (Debian: slurm-client)",
        );
    }
    match answered {
        Some(Ok(partitions)) if !partitions.is_empty() => {
            let partitions: Vec<_> = partitions.lines().map(str::trim).collect();
            Check::well(NAME, format!("partitions {}", partitions.join(", ")))
        }
        Some(Ok(_)) => Check::warn(NAME, "sinfo knows no partition that you may use", HELP),
        Some(Err(why)) => Check::warn(NAME, format!("sinfo does not answer: {why}"), HELP),
        // It went away between the two looks.
        None => Check::warn(NAME, "sinfo cannot be started", HELP),
    }
}

fn listed(names: &[&&str]) -> String {
    let names: Vec<&str> = names.iter().map(|name| **name).collect();
    names.join(", ")
}

/// Whether a shell would find `program`.
fn is_on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| {
        let found = std::fs::metadata(folder.join(program));
        found.is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    })
}

/// Whether the cluster that the launcher would ask answers, and lets it do what it must.
#[cfg(feature = "kubernetes")]
pub(super) async fn kubernetes() -> Check {
    use crate::launch::kubernetes::{Found, find};
    const NAME: &str = "Kubernetes";
    const REACH: &str = "its launcher cannot start workers until the API server answers it";
    match tokio::time::timeout(LOOK, find()).await {
        Ok(Found::Nothing) => Check::well(NAME, "not here; only its launcher needs it"),
        Ok(Found::Unusable(why)) => Check::warn(
            NAME,
            format!("its configuration cannot be used: {why}"),
            "mend KUBECONFIG (`kubectl config view`), or unset it",
        ),
        Ok(Found::Unreached { server, why }) => Check::warn(
            NAME,
            format!("{server} does not answer as it should: {why}"),
            REACH,
        ),
        Ok(Found::Reached(cluster)) if cluster.denied.is_empty() => Check::well(
            NAME,
            format!(
                "{} answers ({}); its launcher may work in namespace {}",
                cluster.server, cluster.version, cluster.namespace
            ),
        ),
        Ok(Found::Reached(cluster)) => Check::warn(
            NAME,
            format!(
                "{} answers ({}), but in namespace {} its launcher may not: {}",
                cluster.server,
                cluster.version,
                cluster.namespace,
                cluster.denied.join(", ")
            ),
            "`kubectl apply -k deploy/kubernetes/launcher` makes a Role that allows it; a recipe may name another namespace",
        ),
        Err(_) => Check::warn(
            NAME,
            format!("no answer within {} s", LOOK.as_secs()),
            REACH,
        ),
    }
}

/// A program that was built without the launcher needs no cluster.
#[cfg(not(feature = "kubernetes"))]
pub(super) async fn kubernetes() -> Check {
    Check::well(
        "Kubernetes",
        "not looked at: this program was built without its launcher (feature `kubernetes`)",
    )
}
