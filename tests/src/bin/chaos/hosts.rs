//! Hosts on one machine: network namespaces round a router whose rules are the faults. They take root.

use std::process::{Command, Stdio};

/// Why there are none.
pub(crate) const NEEDED: &str =
    "no network namespaces here (they take root, iproute2 and iptables)";

/// Hosts as network namespaces, each with a cable to a router that is one, too; gone when dropped.
pub(crate) struct Hosts {
    mark: String,
    count: u32,
}

impl Hosts {
    /// Hosts 1 to `count`, of which `number` names the set. None where namespaces cannot be made.
    pub(crate) fn new(number: u64, count: u32) -> anyhow::Result<Option<Self>> {
        let mark = format!("dc{}n{number}", std::process::id());
        let hosts = Self { mark, count };
        let Self { mark, .. } = &hosts;
        let probe = format!("ip netns add {mark}r && ip netns exec {mark}r iptables -L FORWARD");
        if !sh(&probe)? {
            return Ok(None);
        }
        sh(&format!(
            "ip -n {mark}r link set lo up; ip netns exec {mark}r sysctl -qw net.ipv4.ip_forward=1"
        ))?;
        for host in 1..=count {
            let made = sh(&format!(
                "ip netns add {mark}h{host} && ip -n {mark}h{host} link set lo up && \
                 ip link add e{host} netns {mark}r type veth peer name eth0 netns {mark}h{host} && \
                 ip -n {mark}r addr add 10.77.{host}.1/24 dev e{host} && \
                 ip -n {mark}r link set e{host} up && \
                 ip -n {mark}h{host} addr add 10.77.{host}.2/24 dev eth0 && \
                 ip -n {mark}h{host} link set eth0 up && \
                 ip -n {mark}h{host} route add default via 10.77.{host}.1"
            ))?;
            anyhow::ensure!(made, "host {host} cannot be made");
        }
        Ok(Some(hosts))
    }

    /// What stands before a command that runs on `host`.
    pub(crate) fn on(&self, host: u32) -> Vec<String> {
        ["ip", "netns", "exec"]
            .map(str::to_owned)
            .into_iter()
            .chain([format!("{}h{host}", self.mark)])
            .collect()
    }

    /// Adds rules to the router; `rule` is what follows the chain.
    pub(crate) fn rule(&self, rule: &str) -> anyhow::Result<()> {
        let done = sh(&format!(
            "ip netns exec {}r iptables -I FORWARD {rule}",
            self.mark
        ))?;
        anyhow::ensure!(done, "the router takes no rule {rule}");
        Ok(())
    }

    /// Nothing passes between two hosts, in either direction.
    pub(crate) fn part(&self, one: u32, other: u32) -> anyhow::Result<()> {
        for (from, to) in [(one, other), (other, one)] {
            self.rule(&format!("-s {} -d {} -j DROP", address(from), address(to)))?;
        }
        Ok(())
    }

    /// Every cable is whole again.
    pub(crate) fn heal(&self) -> anyhow::Result<()> {
        sh(&format!("ip netns exec {}r iptables -F FORWARD", self.mark)).map(drop)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in 1..=self.count {
            let _ = sh(&format!("ip netns del {}h{host}", self.mark));
        }
        let _ = sh(&format!("ip netns del {}r", self.mark));
    }
}

/// The address of `host`.
pub(crate) fn address(host: u32) -> String {
    format!("10.77.{host}.2")
}

/// Runs a line of shell; whether it succeeded.
fn sh(line: &str) -> anyhow::Result<bool> {
    let status = Command::new("sh")
        .args(["-c", line])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    Ok(status.success())
}
