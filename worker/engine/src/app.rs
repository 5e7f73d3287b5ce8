//! Serves a worker: opens the device, connects, and does what it is told, one thing at a time.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use distillery_common::group::Membership;
use distillery_common::task::{Failure, FailureClass, Lease};
use distillery_common::telemetry::Meter;

use crate::cli::Serve;
use crate::collective::nccl::Nvidia;
use crate::collective::seat::LIBRARY_VARIABLE;
use crate::device;
use crate::inbox::Inbox;
use crate::io::Io;
use crate::link::{Command, CommitOutcome, Event, Link};
use crate::task::current::Current;
use crate::task::distill::{self, Outcome, StageWork};
use crate::task::{Fault, contained, evaluate, export, reference, trajectories};
use crate::workbench::{LIBTORCH_VERSION, Workbench};

/// Prints what computes here, so that a coordinator, which knows no tensor library, can record it.
/// With `devices`, also what a doctor wants to know, which takes longer.
pub fn describe(devices: bool) -> anyhow::Result<ExitCode> {
    let mut software = serde_json::json!({
        "libtorch": LIBTORCH_VERSION,
        "cpu_capability": device::cpu_capability(),
    });
    if devices {
        software["cuda_devices"] = device::cuda_devices().into();
        let named = std::env::var(LIBRARY_VARIABLE).ok();
        software["nccl"] = match Nvidia::open(named.as_deref()) {
            Ok(_) => "loads".into(),
            Err(error) => error.to_string().into(),
        };
    }
    println!("{software}");
    Ok(ExitCode::SUCCESS)
}

/// Serves the worker that listens at `socket` until it says drain or closes.
pub fn serve(args: &Serve, socket: &Path) -> anyhow::Result<ExitCode> {
    let device = device::open(&args.device)?;
    tch::set_num_interop_threads(1);
    let io = Io::start().context("starting the IO threads")?;
    let current = Current::default();
    let observer = current.clone();
    let (link, commands) = Link::connect_observed(socket, move |command| {
        if let Command::Abort { group, .. } = command {
            observer.abort(group);
        }
    })?;
    link.send(Event::Ready {
        device: device::name(device),
        device_name: device::hardware(device),
        libtorch_version: LIBTORCH_VERSION.to_owned(),
    });
    let mut inbox = Inbox::new(commands);
    let Some(Command::Setup(setup)) = inbox.next_command() else {
        anyhow::bail!("the worker's first command is not a setup");
    };
    let mut server = Server {
        bench: Workbench::open(io, link.clone(), inbox, device, setup)
            .map_err(|fault| anyhow::anyhow!("{fault}"))?,
        link,
        current,
        kept: None,
        args,
    };
    if let Some(threads) = args.threads.or(server.bench.recipe.compute.threads) {
        tch::set_num_threads(i32::try_from(threads)?);
    }
    server.run();
    Ok(ExitCode::SUCCESS)
}

struct Server<'a> {
    bench: Workbench,
    link: Link,
    current: Current,
    /// The stage that was trained last, with its state in memory.
    kept: Option<StageWork>,
    args: &'a Serve,
}

impl Server<'_> {
    fn run(&mut self) {
        while let Some(command) = self.bench.inbox.next_command() {
            match command {
                Command::Start(lease) => self.perform(&lease),
                Command::Join(membership) => self.train(&membership),
                Command::Drain { .. } => return,
                // These answer something that has already ended here.
                Command::Cancel(_) | Command::Peers { .. } | Command::Abort { .. } => {}
                Command::Setup(_) => tracing::warn!("a second setup is ignored"),
            }
        }
    }

    /// Does one leased task and asks for its commit.
    fn perform(&mut self, lease: &Lease) {
        tracing::info!(%lease, "task started");
        // A task may need the memory. Of a stage that is not done the state is worth keeping.
        self.kept.take_if(|stage| stage.is_finished());
        let bench = &mut self.bench;
        bench.meter = Meter::start();
        let made = contained(|| match lease.task.stage.as_str() {
            "trajectories" => trajectories::draw(bench, lease),
            "reference" => reference::draw(bench, lease),
            "evaluate" => evaluate::judge(bench, lease),
            "export" => export::write(bench, lease),
            other => Err(Fault::config(format!("no task stage is called {other:?}"))),
        });
        let failure = match made {
            Ok(None) => Failure {
                class: FailureClass::Superseded,
                message: "the lease was taken back".into(),
            },
            Ok(Some(request)) => match self.link.commit(request) {
                // The worker reports these itself.
                CommitOutcome::Won | CommitOutcome::Lost => return,
                CommitOutcome::Expired => Failure {
                    class: FailureClass::Stale,
                    message: "the lease had ended before the commit".into(),
                },
                CommitOutcome::Failed(message) => Failure {
                    class: FailureClass::Io,
                    message,
                },
            },
            Err(fault) => fault.to_failure(),
        };
        tracing::warn!(%lease, %failure, "task ended without a commit");
        self.link.send(Event::TaskFailed {
            lease: lease.clone(),
            failure,
        });
    }

    /// Takes part in a training group until it ends.
    fn train(&mut self, membership: &Membership) {
        let group = &membership.group;
        tracing::info!(%group, rank = membership.rank, world = membership.world, "joining");
        let bench = &mut self.bench;
        bench.meter = Meter::start();
        let (kept, current) = (&mut self.kept, &self.current);
        let advertise = self.args.advertise;
        let trained = contained(|| distill::train(bench, kept, membership, advertise, current));
        let failure = match trained {
            Ok(Outcome::Finished | Outcome::Drained) => return,
            Ok(Outcome::Aborted(reason)) => Failure {
                class: FailureClass::Superseded,
                message: reason,
            },
            Err(fault) => fault.to_failure(),
        };
        tracing::warn!(%group, %failure, "left the group");
        self.link.send(Event::GroupFailed {
            group: group.clone(),
            rank: membership.rank,
            failure,
        });
    }
}
