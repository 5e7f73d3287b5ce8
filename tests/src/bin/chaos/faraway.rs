//! Things that are far away: hosts behind a network, and a store behind a proxy.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;

use super::proxy::{Mood, Proxy};
use super::site::{Setting, Site, Wrap};
use super::{Context, Score};

/// Hosts beside the coordinator's.
const WORKERS: u32 = 3;

/// Hosts as network namespaces, each with a cable to a router that is one, too; gone when dropped.
struct Hosts {
    mark: String,
}

impl Hosts {
    /// The coordinator's host is 1. None where namespaces cannot be made.
    fn new(number: u64) -> anyhow::Result<Option<Self>> {
        let hosts = Self {
            mark: format!("dc{}n{number}", std::process::id()),
        };
        let Self { mark } = &hosts;
        let probe = format!("ip netns add {mark}r && ip netns exec {mark}r iptables -L FORWARD");
        if !sh(&probe)? {
            return Ok(None);
        }
        sh(&format!(
            "ip -n {mark}r link set lo up; ip netns exec {mark}r sysctl -qw net.ipv4.ip_forward=1"
        ))?;
        for host in 1..=WORKERS + 1 {
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
    fn on(&self, host: u32) -> Vec<String> {
        ["ip", "netns", "exec"]
            .map(str::to_owned)
            .into_iter()
            .chain([format!("{}h{host}", self.mark)])
            .collect()
    }

    /// Adds rules to the router; `rule` is what follows the chain.
    fn rule(&self, rule: &str) -> anyhow::Result<()> {
        let done = sh(&format!(
            "ip netns exec {}r iptables -I FORWARD {rule}",
            self.mark
        ))?;
        anyhow::ensure!(done, "the router takes no rule {rule}");
        Ok(())
    }

    /// Every cable is whole again.
    fn heal(&self) -> anyhow::Result<()> {
        sh(&format!("ip netns exec {}r iptables -F FORWARD", self.mark)).map(drop)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in 1..=WORKERS + 1 {
            let _ = sh(&format!("ip netns del {}h{host}", self.mark));
        }
        let _ = sh(&format!("ip netns del {}r", self.mark));
    }
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

/// Partitions both ways and one way, loss, resets, pulled cables.
pub(crate) fn network(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let alone = [
        ("min: 1, max: 2", "min: 1, max: 1"),
        (
            "cluster: {launcher: external,",
            "cluster: {launcher: external, listen: \"10.77.1.2:0\", tls: \"on\",",
        ),
    ];
    let mut setting = Setting::small(&context.base, &alone[..1]);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    for (from, to) in &alone[1..] {
        setting.recipe = setting.recipe.replace(from, to);
    }
    setting.pace = (250, 40);
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        let Some(hosts) = Hosts::new(number)? else {
            score.skipped("no network namespaces here (they take root, iproute2 and iptables)");
            return Ok(());
        };
        number += 1;
        let mut site = Site::new(&setting)?;
        site.wrap = Wrap {
            coordinator: hosts.on(1),
            worker: Vec::new(),
        };
        site.coordinate(&[])?;
        for host in 2..=WORKERS + 1 {
            site.wrap.worker = hosts.on(host);
            site.hire(1)?;
        }
        site.setting.workers = WORKERS as usize;
        score.runs += 1;
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(stream.below(700).into()));
            if site.succeeded()? {
                break;
            }
            let host = 2 + stream.below(WORKERS);
            let (worker, head) = (format!("10.77.{host}.2"), "10.77.1.2");
            match stream.below(5) {
                0 => {
                    hosts.rule(&format!("-s {worker} -d {head} -j DROP"))?;
                    hosts.rule(&format!("-s {head} -d {worker} -j DROP"))?;
                }
                1 => hosts.rule(&format!("-s {worker} -d {head} -j DROP"))?,
                2 => hosts.rule(&format!("-s {head} -d {worker} -j DROP"))?,
                3 => hosts.rule("-m statistic --mode random --probability 0.3 -j DROP")?,
                _ => hosts.rule(&format!(
                    "-s {worker} -p tcp -j REJECT --reject-with tcp-reset"
                ))?,
            }
            score.faults += 1;
            std::thread::sleep(Duration::from_millis(300 + u64::from(stream.below(4000))));
            hosts.heal()?;
        }
        site.finish()?;
        super::workers::check_wins(&site, score)?;
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    Ok(())
}

/// The S3 server; ends when dropped.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start(program: &str) -> anyhow::Result<Self> {
        let free = std::net::TcpListener::bind("127.0.0.1:0")?;
        let port = free.local_addr()?.port();
        drop(free);
        let child = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context(program.to_owned())?;
        let server = Self { child, port };
        for _ in 0..600 {
            if server.make_bucket().is_ok() {
                return Ok(server);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        anyhow::bail!("{program} makes no bucket within a minute")
    }

    fn make_bucket(&self) -> anyhow::Result<()> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        let head = "PUT /chaos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        stream.write_all(head.as_bytes())?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        anyhow::ensure!(reply.starts_with("HTTP/1.1 200"), "no bucket: {reply}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A bucket whose server is away, slow, busy, or loses replies after it did what it was asked.
pub(crate) fn store(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let Ok(program) = std::env::var("DISTILLERY_MOTO") else {
        score.skipped("DISTILLERY_MOTO is not set (make servers)");
        return Ok(());
    };
    let mut setting = Setting::small(&context.base, &[]);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    let server = Server::start(&program)?;
    let proxy = Proxy::before(([127, 0, 0, 1], server.port).into())?;
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        setting.output = Some(format!("s3://chaos/run{number}"));
        setting.variables = [
            (
                "AWS_ENDPOINT_URL",
                format!("http://127.0.0.1:{}", proxy.port),
            ),
            ("AWS_ENDPOINT", format!("http://127.0.0.1:{}", proxy.port)),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", "chaos".into()),
            ("AWS_SECRET_ACCESS_KEY", "chaos".into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        number += 1;
        let mut site = Site::begin(&setting)?;
        score.runs += 1;
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(200 + u64::from(stream.below(1500))));
            if site.succeeded()? {
                break;
            }
            proxy.be(Mood::BAD[stream.below(Mood::BAD.len() as u32) as usize]);
            std::thread::sleep(Duration::from_millis(200 + u64::from(stream.below(3000))));
            proxy.be(Mood::Good);
            score.faults += 1;
        }
        site.finish()?;
        super::workers::check_wins(&site, score)?;
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(complaint);
        }
    }
    score.note(format!(
        "{} connections and replies were hurt",
        proxy.hurt()
    ));
    Ok(())
}
