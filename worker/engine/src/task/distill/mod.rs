//! A member's part in training one stage: join the group, start from the agreed state, step, save, leave.
//!
//! ```text
//! Join ─▶ listen, report GroupReady ─▶ student ─▶ Peers ─▶ ring ─▶ one state for all (`sync`) ─▶ rows, steps
//!                                                                                     └▶ final checkpoint
//! ```
//!
//! No message passes between this engine and the coordinator in a step. Whatever breaks a step leaves it unapplied, and
//! what was applied stays in memory ([`StageWork`]): the next generation goes on from the newest state of its members.

mod stage;
mod sync;
mod timed;

use std::net::IpAddr;
use std::time::Duration;

use distillery_common::group::{GroupId, Membership, Phase};
use distillery_common::task::FailureClass;

pub use self::stage::StageWork;
use super::current::Current;
use super::{Fault, OrFault as _};
use crate::collective::seat::Seat;
use crate::collective::{self, Invitation};
use crate::inbox::Inbox;
use crate::link::{Command, Event};
use crate::train;
use crate::workbench::Workbench;

/// How long members wait for each other while a group forms, and for a neighbour in a step.
const DEADLINE: Duration = Duration::from_secs(60);
/// How often a member that waits for its peers looks whether it is still wanted.
const GLANCE: Duration = Duration::from_millis(100);

/// How a member's part ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The stage's last step is applied; rank 0 has committed it.
    Finished,
    /// The engine is told to end, and did what was asked first.
    Drained,
    /// The generation was ended from outside.
    Aborted(String),
}

/// Why a member's part ended before its time. What it has applied is whole either way.
#[derive(Debug)]
enum Broken {
    /// The group broke.
    Group(collective::Error),
    /// Something of this engine's own did.
    Own(Fault),
}

impl From<collective::Error> for Broken {
    fn from(error: collective::Error) -> Self {
        Self::Group(error)
    }
}

impl From<Fault> for Broken {
    fn from(fault: Fault) -> Self {
        Self::Own(fault)
    }
}

/// Trains as `membership` says. `advertise` is this host's address for its peers.
///
/// `kept` is the stage that this engine trained last, with its state: a group that forms again goes on from it. After
/// a panic, when nobody knows what is half written, it is gone.
pub fn train(
    bench: &mut Workbench,
    kept: &mut Option<StageWork>,
    membership: &Membership,
    advertise: IpAddr,
    current: &Current,
) -> Result<Outcome, Fault> {
    let group = &membership.group;
    let mut stage = match kept.take().filter(|stage| stage.is_of(membership)) {
        Some(stage) => stage,
        None => StageWork::fresh(bench, membership)?,
    };
    let Membership { rank, world, .. } = *membership;
    let (seat, card) =
        Seat::open(bench.device, advertise, rank, world).map_err(collective_fault)?;
    // Only now: whoever is said to be there must answer, and a teacher may take a while to load.
    bench.link.send(Event::GroupReady {
        group: group.clone(),
        rank,
        address: card,
    });
    let ending = take_part(bench, &mut stage, seat, membership, current);
    // Also when it has finished: should the last checkpoint come to nothing, another group still has to write it.
    *kept = Some(stage);
    match ending {
        Ok(outcome) => Ok(outcome),
        Err(Broken::Group(error)) => ended_or(bench, group, collective_fault(error)),
        Err(Broken::Own(fault)) => ended_or(bench, group, fault),
    }
}

/// Meets the others and trains with them.
fn take_part(
    bench: &mut Workbench,
    stage: &mut StageWork,
    seat: Seat,
    membership: &Membership,
    current: &Current,
) -> Result<Outcome, Broken> {
    // Before the wait: an abort that comes together with the addresses must be seen too.
    let ended = current.enter(&membership.group);
    stage.tell(bench, membership, Phase::Exchanging, membership.base_step);
    let peers = match wait_for_peers(&mut bench.inbox, membership) {
        Ok(peers) => peers,
        Err(outcome) => {
            current.leave();
            return Ok(outcome);
        }
    };
    let ring = seat.connect(&Invitation {
        group: &membership.group,
        rank: membership.rank,
        peers: &peers,
        token: bench.setup.group_secret.0,
        deadline: DEADLINE,
        ended: ended.clone(),
    });
    let outcome = ring.map_err(Broken::from).and_then(|ring| {
        current.formed(ring.aborter());
        stage.run(bench, membership, ring, ended)
    });
    current.leave();
    outcome
}

/// Waits until every member listens; an abort or a drain ends the wait.
fn wait_for_peers(inbox: &mut Inbox, membership: &Membership) -> Result<Vec<String>, Outcome> {
    let group = &membership.group;
    let ours = |c: &Command| matches!(c, Command::Peers { group: g, .. } if g == group);
    loop {
        if let Some(Command::Peers { addresses, .. }) = inbox.next_matching(GLANCE, ours) {
            return Ok(addresses);
        }
        if let Some(reason) = inbox.aborted(group) {
            return Err(Outcome::Aborted(reason));
        }
        if inbox.draining().is_some() {
            return Err(Outcome::Drained);
        }
    }
}

/// A fault that an abort from outside explains is no fault.
fn ended_or(bench: &mut Workbench, group: &GroupId, fault: Fault) -> Result<Outcome, Fault> {
    // The abort may still be on its way: the coordinator hears of a lost member when we do.
    let ours = |c: &Command| matches!(c, Command::Abort { group: g, .. } if g == group);
    match bench.inbox.next_matching(GLANCE, ours) {
        Some(Command::Abort { reason, .. }) => Ok(Outcome::Aborted(reason)),
        _ => Err(fault),
    }
}

fn collective_fault(error: collective::Error) -> Fault {
    let class = match &error {
        collective::Error::Disagree { .. } => FailureClass::Diverged,
        collective::Error::NcclNotFound { .. } => FailureClass::Config,
        collective::Error::PeerLost { .. }
        | collective::Error::Timeout { .. }
        | collective::Error::Aborted
        | collective::Error::OutOfStep { .. }
        | collective::Error::Setup { .. }
        | collective::Error::Nccl { .. } => FailureClass::Collective,
    };
    Err::<(), _>(error)
        .or_fault(class)
        .expect_err("it is an error")
}

fn train_fault(error: train::Error) -> Broken {
    let class = match error {
        train::Error::Group { source, .. } => return Broken::Group(source),
        train::Error::Diverged { .. } => FailureClass::Diverged,
        train::Error::Handover { .. } => FailureClass::Io,
    };
    let fault = Err::<(), _>(error).or_fault(class);
    Broken::Own(fault.expect_err("it is an error"))
}
