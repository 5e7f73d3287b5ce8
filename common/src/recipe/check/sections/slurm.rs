//! The section `cluster.slurm`.

use super::super::super::slurm::{Devices, Slurm};
use super::View;

pub(super) fn slurm(v: View<'_>) -> Slurm {
    let text = |key: &str| v.get(key).maybe_text().map(str::to_owned);
    let texts = |key: &str| v.get(key).items().map(|line| line.text().to_owned());
    Slurm {
        partition: text("partition"),
        account: text("account"),
        qos: text("qos"),
        gres: text("gres"),
        time: text("time"),
        cpus: v.get("cpus").maybe_small(),
        memory: text("memory"),
        extra: texts("extra").collect(),
        setup: texts("setup").collect(),
        srun: texts("srun").collect(),
        container: texts("container").collect(),
        // Another text is refused with its place, in `cross`.
        devices: Devices::parse(v.get("devices").text()).unwrap_or_default(),
        worker: v.get("worker").maybe_text().map(Into::into),
        engine: v.get("engine").maybe_text().map(Into::into),
        poll_s: v.get("poll").small(),
    }
}
