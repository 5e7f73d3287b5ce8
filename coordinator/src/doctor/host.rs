//! This host: its engine, devices, network and limits.

use std::path::Path;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::net::{TcpListener, lookup_host};

use super::{Check, LOOK, answer};
use crate::service::gate::Limits;

/// How long an engine may take to say what it is: it loads libtorch first.
const ENGINE: Duration = Duration::from_secs(60);
/// Connections of workers that a host should have room for: each device is one.
const CONNECTIONS: usize = 1024;
/// Ports that a host should have for connections of its own.
const PORTS: u32 = 10_000;

/// The engine, GPUs and NCCL.
pub(super) async fn programs(engine: &Path) -> Vec<Check> {
    const ENGINE_NAME: &str = "libtorch";
    let described = answer(
        &engine.display().to_string(),
        &["describe", "--devices"],
        ENGINE,
    )
    .await;
    let build = "build it (deploy/README.md), or say where it is with DISTILLERY_ENGINE";
    let engine_check = match &described {
        None => Check::missing(
            ENGINE_NAME,
            format!("there is no engine at {}", engine.display()),
            build,
        ),
        Some(Err(why)) => Check::missing(
            ENGINE_NAME,
            format!("the engine cannot start: {why}"),
            "`engine describe` says more; is libtorch where the engine was built with it?",
        ),
        Some(Ok(said)) => match serde_json::from_str::<serde_json::Value>(said) {
            Ok(said) => Check::well(
                ENGINE_NAME,
                format!(
                    "libtorch {}, instruction set {}",
                    said["libtorch"].as_str().unwrap_or("unknown"),
                    said["cpu_capability"].as_str().unwrap_or("unknown")
                ),
            ),
            Err(error) => Check::missing(
                ENGINE_NAME,
                format!(
                    "{} does not answer as an engine does: {error}",
                    engine.display()
                ),
                build,
            ),
        },
    };
    let described = match described {
        Some(Ok(said)) => serde_json::from_str(&said).unwrap_or_default(),
        Some(Err(_)) | None => serde_json::Value::Null,
    };
    let gpus = match answer("nvidia-smi", &["-L"], LOOK).await {
        Some(Ok(listed)) => listed
            .lines()
            .filter(|line| line.starts_with("GPU "))
            .count(),
        Some(Err(_)) | None => 0,
    };
    vec![
        engine_check,
        devices(gpus, &described),
        nccl(gpus, &described),
    ]
}

fn devices(gpus: usize, described: &serde_json::Value) -> Check {
    const NAME: &str = "devices";
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    match (gpus, described["cuda_devices"].as_u64()) {
        (0, _) => Check::well(NAME, format!("{cpus} CPUs, no NVIDIA GPU")),
        (n, None) => Check::well(NAME, format!("{cpus} CPUs, {n} NVIDIA GPUs")),
        (n, Some(0)) => Check::warn(
            NAME,
            format!("{cpus} CPUs; none of {n} NVIDIA GPUs can be used by this engine"),
            "install libtorch for CUDA (deploy/libtorch.sh cuda) and build again, or look at the driver",
        ),
        (n, Some(used)) => Check::well(NAME, format!("{cpus} CPUs, {used} of {n} NVIDIA GPUs")),
    }
}

/// Whether an engine can load NCCL, by its own word.
fn nccl(gpus: usize, described: &serde_json::Value) -> Check {
    const NAME: &str = "NCCL";
    match (described["nccl"].as_str(), gpus) {
        (Some("loads"), _) => Check::well(NAME, "the engine can load it"),
        (_, 0) => Check::well(NAME, "not found, and not needed without a GPU"),
        (why, _) => Check::warn(
            NAME,
            format!(
                "{}; groups of GPUs fall back to TCP",
                why.unwrap_or("no engine could try to load it")
            ),
            "install NCCL 2, or say where it is with DISTILLERY_NCCL",
        ),
    }
}

/// Ports, and this host's name.
pub(super) async fn network() -> Vec<Check> {
    vec![listening().await, ephemeral(), own_name().await]
}

async fn listening() -> Check {
    const NAME: &str = "listening";
    for address in ["127.0.0.1:0", "0.0.0.0:0"] {
        if let Err(error) = TcpListener::bind(address).await {
            return Check::missing(
                NAME,
                format!("{address} cannot be bound: {error}"),
                "coordinator and engines listen for each other; what forbids it here?",
            );
        }
    }
    Check::well(NAME, "ports can be bound")
}

fn ephemeral() -> Check {
    const NAME: &str = "ports";
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let text = text.unwrap_or_default();
    let mut bounds = text
        .split_whitespace()
        .filter_map(|n| n.parse::<u32>().ok());
    match (bounds.next(), bounds.next()) {
        (Some(low), Some(high)) if high.saturating_sub(low) < PORTS => Check::warn(
            NAME,
            format!("only {low} to {high} for connections of this host's own"),
            "sysctl -w net.ipv4.ip_local_port_range='32768 60999'",
        ),
        (Some(low), Some(high)) => Check::well(NAME, format!("{low} to {high}")),
        _ => Check::warn(NAME, "the range of ports is not known", ""),
    }
}

/// Where `cluster.listen` names no address, workers on other hosts are told this host's name.
async fn own_name() -> Check {
    const NAME: &str = "name";
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim().to_owned();
    let help = "workers elsewhere would not find it: name an address in cluster.listen";
    let asked = tokio::time::timeout(LOOK, lookup_host((name.as_str(), 0))).await;
    let found: Vec<_> = match asked {
        Err(_) => return Check::warn(NAME, format!("looking up {name} takes too long"), help),
        Ok(Err(error)) => {
            return Check::warn(NAME, format!("{name} has no address: {error}"), help);
        }
        Ok(Ok(found)) => found.map(|address| address.ip()).collect(),
    };
    let shown: Vec<_> = found.iter().map(ToString::to_string).collect();
    let seen = format!("{name} is {}", shown.join(", "));
    if found.iter().all(std::net::IpAddr::is_loopback) {
        return Check::warn(NAME, seen, help);
    }
    Check::well(NAME, seen)
}

/// The limit on open files, which a coordinator raises for itself as far as it goes.
pub(super) fn files() -> Check {
    let limit = getrlimit(Resource::Nofile);
    connections(limit.current, limit.maximum)
}

/// How many workers the door would let in with these limits; none is no limit.
fn connections(soft: Option<u64>, hard: Option<u64>) -> Check {
    const NAME: &str = "open files";
    const RAISE: &str =
        "`ulimit -Hn 65536`, or LimitNOFILE= of the coordinator's service, for a larger fleet";
    let Some(hard) = hard else {
        return Check::well(NAME, "no limit on a coordinator's connections");
    };
    let raised = match soft {
        Some(soft) if soft < hard => format!(" (it raises its {soft} to that)"),
        Some(_) | None => String::new(),
    };
    let seen = format!("at most {hard} for a coordinator{raised}");
    let files = usize::try_from(hard).unwrap_or(usize::MAX);
    let Some(limits) = Limits::with_files(files) else {
        return Check::missing(NAME, format!("{seen}, which can serve nobody"), RAISE);
    };
    let seen = format!("{seen}: room for {} connections of workers", limits.members);
    if limits.members < CONNECTIONS {
        return Check::warn(NAME, seen, RAISE);
    }
    Check::well(NAME, seen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    #[test]
    fn the_hard_limit_says_how_many_workers_may_connect() {
        for (soft, hard, state, room) in [
            (Some(1024), Some(20_000), State::Well, "room for 18464 "),
            (Some(4096), Some(4096), State::Well, "room for 2560 "),
            (Some(1024), Some(1024), State::Warn, "room for 512 "),
            (Some(64), Some(255), State::Missing, "can serve nobody"),
            (Some(1024), None, State::Well, "no limit"),
        ] {
            let check = connections(soft, hard);
            assert_eq!(check.state, state, "{}", check.seen);
            assert!(check.seen.contains(room), "{}", check.seen);
        }
        assert!(
            connections(Some(64), Some(256))
                .seen
                .contains("raises its 64")
        );
    }
}
