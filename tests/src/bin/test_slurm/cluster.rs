//! A Slurm cluster on one machine: a head and four nodes, each with a network, a host name and processes of its own.
//! Everything lies in one folder and under names that hold this process's id; dropping it takes all of it away.

use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::telemetry::Stopwatch;

/// Nodes beside the head.
pub(crate) const NODES: u32 = 4;
/// The head's address.
pub(crate) const HEAD: &str = "10.77.1.2";
/// Longest that the cluster may take to be up.
const PATIENCE: Duration = Duration::from_secs(60);
/// What must be installed.
const PROGRAMS: [&str; 10] = [
    "slurmctld",
    "slurmd",
    "munged",
    "sbatch",
    "squeue",
    "scontrol",
    "ip",
    "iptables",
    "nsenter",
    "setpriv",
];

/// Clusters of this process so far.
static CLUSTERS: AtomicU32 = AtomicU32::new(0);

/// Why no cluster can be brought up here, if so.
pub(crate) fn cannot() -> Option<String> {
    let own = fs::metadata("/proc/self").ok()?;
    if own.uid() != 0 {
        return Some("it takes root".into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let is_there = |program: &str| folders.iter().any(|folder| folder.join(program).is_file());
    let missing: Vec<_> = PROGRAMS.into_iter().filter(|p| !is_there(p)).collect();
    if !missing.is_empty() {
        return Some(format!("not installed: {}", missing.join(", ")));
    }
    let name = format!("dsp{}", std::process::id());
    let made = sh(&format!(
        "ip netns add {name} && ip netns exec {name} iptables -L FORWARD"
    ));
    let _ = sh(&format!("ip netns del {name}"));
    (!made).then(|| "no network namespaces can be made here".into())
}

/// Runs a line of shell; whether it succeeded.
fn sh(line: &str) -> bool {
    let status = Command::new("sh")
        .args(["-c", line])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .status();
    status.is_ok_and(|status| status.success())
}

/// A daemon in the foreground; killed when this is dropped, and when this program is.
struct Daemon(Child);

impl Daemon {
    /// `line` is run by bash, and should end with `exec`.
    fn start(before: &[String], line: &str, log: &Path) -> anyhow::Result<Self> {
        let log = fs::File::options().create(true).append(true).open(log)?;
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .args(before)
            .args(["bash", "-c", line])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        command.spawn().map(Self).context("setpriv")
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.kill();
    }
}

/// Hosts as network namespaces, each with a cable to a router that is one, too.
struct Hosts {
    mark: String,
}

impl Hosts {
    fn new() -> anyhow::Result<Self> {
        let number = CLUSTERS.fetch_add(1, Ordering::Relaxed);
        let hosts = Self {
            mark: format!("ds{}n{number}", std::process::id()),
        };
        let mark = &hosts.mark;
        let made = sh(&format!(
            "ip netns add {mark}r && ip -n {mark}r link set lo up && \
             ip netns exec {mark}r sysctl -qw net.ipv4.ip_forward=1"
        ));
        anyhow::ensure!(made, "the router cannot be made");
        for host in 1..=NODES + 1 {
            let made = sh(&format!(
                "ip netns add {mark}h{host} && ip -n {mark}h{host} link set lo up && \
                 ip link add e{host} netns {mark}r type veth peer name eth0 netns {mark}h{host} && \
                 ip -n {mark}r addr add 10.77.{host}.1/24 dev e{host} && \
                 ip -n {mark}r link set e{host} up && \
                 ip -n {mark}h{host} addr add 10.77.{host}.2/24 dev eth0 && \
                 ip -n {mark}h{host} link set eth0 up && \
                 ip -n {mark}h{host} route add default via 10.77.{host}.1"
            ));
            anyhow::ensure!(made, "host {host} cannot be made");
        }
        Ok(hosts)
    }

    /// What stands before a command on `host`; the head is 1.
    fn on(&self, host: u32) -> Vec<String> {
        let net = format!("--net=/run/netns/{}h{host}", self.mark);
        vec!["nsenter".into(), net]
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in 1..=NODES + 1 {
            let _ = sh(&format!("ip netns del {}h{host}", self.mark));
        }
        let _ = sh(&format!("ip netns del {}r", self.mark));
    }
}

/// The cluster.
pub(crate) struct Cluster {
    // Before hosts and folder: its processes must be gone when those are removed.
    nodes: Vec<Daemon>,
    controller: Daemon,
    _munge: Daemon,
    hosts: Hosts,
    folder: tempfile::TempDir,
}

impl Cluster {
    /// Brings it up and waits until every node is idle.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("test-slurm-").tempdir()?;
        let path = folder.path();
        for name in ["munge", "run", "log", "state", "spool"] {
            fs::create_dir(path.join(name))?;
        }
        fs::set_permissions(path.join("munge"), fs::Permissions::from_mode(0o700))?;
        let mut key = [0; 1024];
        fs::File::open("/dev/urandom")?.read_exact(&mut key)?;
        fs::write(path.join("munge/key"), key)?;
        fs::set_permissions(path.join("munge/key"), fs::Permissions::from_mode(0o600))?;
        fs::write(path.join("slurm.conf"), configuration(path))?;
        let names = (1..=NODES).map(|node| format!("10.77.{}.2 n{node}\n", node + 1));
        let names: String = names.collect();
        fs::write(
            path.join("hosts"),
            format!("127.0.0.1 localhost\n{HEAD} head\n{names}"),
        )?;
        let hosts = Hosts::new()?;
        let d = path.display();
        let munge = format!(
            "exec munged --foreground --key-file={d}/munge/key --socket={d}/run/munge.sock \
             --pid-file={d}/run/munged.pid --log-file={d}/log/munged.log --seed-file={d}/munge/seed"
        );
        let munge = Daemon::start(&[], &munge, &path.join("log/munged.out"))?;
        await_true("munged's socket", || path.join("run/munge.sock").exists())?;
        let controller = start_controller(&hosts, path, "-i")?;
        let mut cluster = Self {
            nodes: Vec::new(),
            controller,
            _munge: munge,
            hosts,
            folder,
        };
        for node in 1..=NODES {
            let daemon = cluster.start_node(node)?;
            cluster.nodes.push(daemon);
        }
        await_true("idle nodes", || {
            let told = cluster.slurm("sinfo", &["-h", "-N", "-p", "main", "-o", "%T"]);
            told.is_ok_and(|text| text.lines().filter(|l| *l == "idle").count() == NODES as usize)
        })
        .with_context(|| cluster.log("slurmctld.log"))?;
        Ok(cluster)
    }

    fn start_node(&self, node: u32) -> anyhow::Result<Daemon> {
        let apart = [
            "unshare",
            "--uts",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ];
        let mut before = self.hosts.on(node + 1);
        before.extend(apart.map(str::to_owned));
        let folder = self.folder.path().display();
        let line = format!(
            "hostname n{node}; mount --bind {folder}/hosts /etc/hosts; exec slurmd -D -N n{node} -f {folder}/slurm.conf"
        );
        Daemon::start(
            &before,
            &line,
            &self.folder.path().join(format!("log/slurmd-n{node}.out")),
        )
    }

    fn conf(&self) -> PathBuf {
        self.folder.path().join("slurm.conf")
    }

    /// The last lines of a daemon's log.
    pub(crate) fn log(&self, name: &str) -> String {
        let text =
            fs::read_to_string(self.folder.path().join("log").join(name)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// A command on the head.
    pub(crate) fn command(&self, inner: &Command) -> Command {
        let before = self.hosts.on(1);
        let mut command = Command::new(&before[0]);
        command
            .args(&before[1..])
            .arg(inner.get_program())
            .args(inner.get_args());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
            .env("SLURM_CONF", self.conf())
            .stdin(Stdio::null())
            .process_group(0);
        command
    }

    /// What one of Slurm's programs says on the head.
    pub(crate) fn slurm(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let mut inner = Command::new(program);
        inner.args(arguments);
        let output = self
            .command(&inner)
            .output()
            .with_context(|| program.to_owned())?;
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{program} {arguments:?}: {said}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Cuts a node's power.
    pub(crate) fn cut_power(&mut self, node: u32) -> anyhow::Result<()> {
        self.nodes[node as usize - 1].kill()
    }

    /// Drops whatever a node sends and is sent.
    pub(crate) fn isolate(&self, node: u32) -> anyhow::Result<()> {
        let Hosts { mark } = &self.hosts;
        let host = node + 1;
        let done = sh(&format!(
            "ip netns exec {mark}r iptables -I FORWARD -s 10.77.{host}.2 -j DROP && \
             ip netns exec {mark}r iptables -I FORWARD -d 10.77.{host}.2 -j DROP"
        ));
        anyhow::ensure!(done, "the router takes no rules");
        Ok(())
    }

    /// Every cable is whole again.
    pub(crate) fn heal(&self) -> anyhow::Result<()> {
        let done = sh(&format!(
            "ip netns exec {}r iptables -F FORWARD",
            self.hosts.mark
        ));
        anyhow::ensure!(done, "the router keeps its rules");
        Ok(())
    }

    /// SIGKILL of slurmctld.
    pub(crate) fn kill_controller(&mut self) -> anyhow::Result<()> {
        self.controller.kill()
    }

    /// Starts it again, on what it had saved.
    pub(crate) fn restart_controller(&mut self) -> anyhow::Result<()> {
        self.controller = start_controller(&self.hosts, self.folder.path(), "")?;
        await_true("an answer of slurmctld", || {
            self.slurm("squeue", &["-h"]).is_ok()
        })
    }
}

fn start_controller(hosts: &Hosts, folder: &Path, option: &str) -> anyhow::Result<Daemon> {
    let mut before = hosts.on(1);
    before.extend(["unshare", "--uts"].map(str::to_owned));
    let conf = folder.join("slurm.conf");
    let line = format!(
        "hostname head; exec slurmctld -D {option} -f {}",
        conf.display()
    );
    Daemon::start(&before, &line, &folder.join("log/slurmctld.out"))
}

fn await_true(what: &str, look: impl Fn() -> bool) -> anyhow::Result<()> {
    let watch = Stopwatch::start();
    while !look() {
        anyhow::ensure!(!super::interrupted(), "interrupted");
        anyhow::ensure!(watch.elapsed() < PATIENCE, "no {what} after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Waits so short that a lost node is noticed, and its jobs are back, within half a minute. One job fills a node. Jobs of the
/// partition `urgent` go first: whom they need the node of has ten seconds to leave.
fn configuration(folder: &Path) -> String {
    let d = folder.display();
    let mut text = format!(
        "ClusterName=distillery\nSlurmctldHost=head({HEAD})\nSlurmUser=root\nSlurmdUser=root\n\
         AuthType=auth/munge\nCredType=cred/munge\nAuthInfo=socket={d}/run/munge.sock,cred_expire=5\n\
         StateSaveLocation={d}/state\nSlurmdSpoolDir={d}/spool/%n\n\
         SlurmctldPidFile={d}/run/slurmctld.pid\nSlurmdPidFile={d}/run/slurmd-%n.pid\n\
         SlurmctldLogFile={d}/log/slurmctld.log\nSlurmdLogFile={d}/log/slurmd-%n.log\n\
         ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\n\
         AccountingStorageType=accounting_storage/none\nMpiDefault=none\nSwitchType=switch/none\n\
         MailProg=/bin/true\nSelectType=select/cons_tres\nSelectTypeParameters=CR_Core\n\
         SchedulerType=sched/backfill\n\
         SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=1\n\
         ReturnToService=2\nSlurmctldTimeout=10\nSlurmdTimeout=3\nTCPTimeout=2\nMessageTimeout=5\n\
         KillWait=3\nPreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\nMinJobAge=300\nBatchStartTimeout=10\nSlurmdParameters=config_overrides\n"
    );
    for node in 1..=NODES {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "NodeName=n{node} NodeHostname=n{node} NodeAddr=10.77.{}.2 CPUs=2 RealMemory=1000 State=UNKNOWN",
            node + 1
        );
    }
    let _ = writeln!(
        text,
        "PartitionName=main Nodes=n[1-{NODES}] Default=YES MaxTime=INFINITE State=UP GraceTime=10\n\
         PartitionName=urgent Nodes=n[1-{NODES}] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"
    );
    text
}
