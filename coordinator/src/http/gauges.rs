//! How the run is at this moment, as gauges of Prometheus.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::driver::Snapshot;
use crate::metrics::Labels;
use crate::scheduler::StageView;
use crate::service::Identity;

type Value = Gauge<f64, AtomicU64>;
type Gauges = Family<Labels, Value>;

/// States of a run that a gauge has a series for.
const RUN_STATES: [&str; 3] = ["running", "paused", "stopping"];
/// States of workers that are counted even when there is none.
const WORKER_STATES: [&str; 5] = ["idle", "busy", "draining", "suspect", "disconnected"];

/// Adds the gauges and the end of the text.
pub(super) fn write(identity: &Identity, snapshot: &Snapshot, text: &mut String) -> fmt::Result {
    let mut registry = Registry::with_prefix("distillery");
    run(identity, snapshot, &mut registry);
    stages(snapshot, &mut registry);
    groups(snapshot, &mut registry);
    workers(snapshot, &mut registry);
    encode_registry(text, &registry)?;
    // By the names that every exporter uses.
    let mut registry = Registry::default();
    process(&mut registry);
    encode_registry(text, &registry)?;
    encode_eof(text)
}

fn gauges(registry: &mut Registry, name: &str, help: &str) -> Gauges {
    let gauges = Gauges::default();
    registry.register(name, help, gauges.clone());
    gauges
}

fn set(gauges: &Gauges, labels: &[(&'static str, &str)], value: f64) {
    let labels: Labels = labels
        .iter()
        .map(|&(name, value)| (name, value.to_owned()))
        .collect();
    gauges.get_or_create(&labels).set(value);
}

fn flag(holds: bool) -> f64 {
    f64::from(u8::from(holds))
}

fn run(identity: &Identity, snapshot: &Snapshot, registry: &mut Registry) {
    let info = gauges(registry, "run_info", "What runs; always 1");
    let version = env!("CARGO_PKG_VERSION");
    let labels = [
        ("run_id", identity.run_id.as_str()),
        ("name", &identity.name),
        ("version", version),
    ];
    set(&info, &labels, 1.0);
    let term = gauges(
        registry,
        "coordinator_term",
        "The coordinator's life, counted from 1",
    );
    set(&term, &[], identity.term as f64);
    let up = gauges(
        registry,
        "coordinator_uptime_seconds",
        "Since this coordinator started",
    );
    set(&up, &[], snapshot.elapsed.as_secs_f64());
    let state = gauges(registry, "run_state", "1 for the state that the run is in");
    for name in RUN_STATES {
        set(
            &state,
            &[("state", name)],
            flag(snapshot.view.state == name),
        );
    }
}

fn stages(snapshot: &Snapshot, registry: &mut Registry) {
    let state = gauges(
        registry,
        "stage_state",
        "1 for the state that a stage is in",
    );
    let done = gauges(registry, "stage_done", "Tasks or steps done");
    let total = gauges(registry, "stage_total", "Tasks or steps in all");
    let part = gauges(
        registry,
        "stage_in_flight_units",
        "Units that leased tasks have done, of those they have to do",
    );
    for stage in &snapshot.view.stages {
        let name = ("stage", stage.name.as_str());
        let labels = [name, ("kind", stage.kind.as_str())];
        set(&state, &[name, ("state", stage.state)], 1.0);
        set(&done, &labels, stage.done as f64);
        set(&total, &labels, stage.total as f64);
        let (units, of) = stage.in_flight;
        set(&part, &[name, ("of", "done")], units as f64);
        set(&part, &[name, ("of", "total")], of as f64);
    }
}

fn groups(snapshot: &Snapshot, registry: &mut Registry) {
    type Of = fn(&StageView) -> Option<f64>;
    let measures: [(&str, &str, Of); 6] = [
        ("group_members", "Engines that train the stage", |stage| {
            (stage.world > 0).then_some(f64::from(stage.world))
        }),
        (
            "group_generation",
            "Number of the group that trains the stage",
            |s| Some(s.group.as_ref()?.group.generation.0 as f64),
        ),
        ("group_step", "Optimizer steps applied", |stage| {
            Some(stage.group.as_ref()?.step as f64)
        }),
        ("group_loss", "Training loss, smoothed", |stage| {
            Some(stage.group.as_ref()?.loss)
        }),
        (
            "group_rows_per_second",
            "Rows that all members together consume",
            |stage| Some(stage.group.as_ref()?.samples_per_second),
        ),
        (
            "group_step_seconds",
            "Wall time of one optimizer step",
            |stage| Some(stage.group.as_ref()?.step_ms / 1000.0),
        ),
    ];
    for (name, help, of) in measures {
        let gauges = gauges(registry, name, help);
        for stage in &snapshot.view.stages {
            if let Some(value) = of(stage) {
                set(&gauges, &[("stage", &stage.name)], value);
            }
        }
    }
}

fn workers(snapshot: &Snapshot, registry: &mut Registry) {
    let workers = &snapshot.view.workers;
    let count = gauges(registry, "workers", "Workers, by state");
    for state in WORKER_STATES {
        let n = workers
            .iter()
            .filter(|worker| worker.state == state)
            .count();
        set(&count, &[("state", state)], n as f64);
    }
    let silent = gauges(
        registry,
        "worker_silent_seconds",
        "Since a worker was last heard",
    );
    let memory = gauges(
        registry,
        "worker_resident_memory_bytes",
        "Memory of a worker and its engine",
    );
    for worker in workers {
        let incarnation = worker.incarnation.to_string();
        let labels = [
            ("worker", worker.name.as_str()),
            ("host", &worker.host),
            ("device", &worker.device),
            ("incarnation", &incarnation),
        ];
        set(&silent, &labels, worker.silent.as_secs_f64());
        set(&memory, &labels, worker.rss_bytes as f64);
    }
}

fn process(registry: &mut Registry) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    let files = std::fs::read_dir("/proc/self/fd").map(Iterator::count).ok();
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let most = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    let values = [
        (
            "process_resident_memory_bytes",
            "Memory of the coordinator",
            kib("VmRSS:").map(|kib| kib * 1024.0),
        ),
        (
            "process_open_fds",
            "File descriptors that the coordinator has open",
            files.map(|n| n as f64),
        ),
        (
            "process_max_fds",
            "File descriptors that it may have open",
            most,
        ),
        ("process_threads", "Its threads", kib("Threads:")),
    ];
    for (name, help, value) in values {
        if let Some(value) = value {
            set(&gauges(registry, name, help), &[], value);
        }
    }
}
