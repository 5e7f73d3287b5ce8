//! Histories in which something was wrong once, each with what it was.
//!
//! A failing seed is made short with `simulate --replay SEED --shrink`, and comes here before the bug is mended.

use super::history::{Client, Direction, Fault, History, Peer, Trouble};

/// Every named history: what it is about, and the fleets that live through it.
pub fn named() -> Vec<(&'static str, Vec<History>)> {
    vec![
        (
            "a coordinator that was replaced while the run was paused lets go of its workers",
            a_coordinator_that_was_replaced_while_the_run_was_paused_lets_go_of_its_workers(),
        ),
        (
            "a late report of a pruned checkpoint",
            a_late_report_of_a_pruned_checkpoint(),
        ),
        (
            "a leaving worker waits for its engine",
            a_leaving_worker_waits_for_its_engine(),
        ),
        (
            "a lease that ended on one side alone",
            a_lease_that_ended_on_one_side_alone(),
        ),
        (
            "a task that was done while its holder was away",
            a_task_that_was_done_while_its_holder_was_away(),
        ),
        (
            "a worker that finds the replaced coordinator",
            a_worker_that_finds_the_replaced_coordinator(),
        ),
        (
            "checkpoints that are verified out of order",
            checkpoints_that_are_verified_out_of_order(),
        ),
        (
            "members that are back before their group",
            members_that_are_back_before_their_group(),
        ),
        (
            "an engine that hangs over the last checkpoint",
            an_engine_that_hangs_over_the_last_checkpoint(),
        ),
        (
            "a member that did not hear where its peers listen is told again",
            a_member_that_did_not_hear_where_its_peers_listen_is_told_again(),
        ),
        (
            "a group whose member went on to a younger one is over",
            a_group_whose_member_went_on_to_a_younger_one_is_over(),
        ),
    ]
}

/// A coordinator that has nothing to write never met its successor's segment: it kept workers that the other waited for.
fn a_coordinator_that_was_replaced_while_the_run_was_paused_lets_go_of_its_workers() -> Vec<History>
{
    let paused = Fault::PauseRun { ms: 53_055 };
    vec![History::with(
        915,
        &[(9_325, paused), (49_845, Fault::Rival)],
    )]
}

/// The new coordinator had pruned the checkpoints that a member, when it came back, still reported: its group was ended.
fn a_late_report_of_a_pruned_checkpoint() -> Vec<History> {
    vec![History::of_every_kind(49), History::of(76)]
}

/// Livelock: a leaving worker had told its engine to die, and looked for its exit without a pause.
fn a_leaving_worker_waits_for_its_engine() -> Vec<History> {
    let slow = Fault::Store {
        client: Client::Everybody,
        trouble: Trouble::Slow,
        one_in: 1,
        ms: 60_586,
    };
    let drain = Fault::DrainWorker {
        worker: 1,
        now: false,
    };
    vec![History::with(36, &[(17_646, slow), (29_740, drain)])]
}

/// Deadlock: the coordinator's answers came too late for the worker's lease, the worker's beats in time for it.
fn a_lease_that_ended_on_one_side_alone() -> Vec<History> {
    vec![History::of_every_kind(39), History::of(262)]
}

/// The worker went on with what had been committed while the coordinator was away.
fn a_task_that_was_done_while_its_holder_was_away() -> Vec<History> {
    let kill = |worker, silent| Fault::KillWorker { worker, silent };
    let slow = Fault::Store {
        client: Client::Everybody,
        trouble: Trouble::Slow,
        one_in: 3,
        ms: 40_742,
    };
    let faults = [
        (6_717, Fault::PauseCoordinator { ms: 62_342 }),
        (10_772, kill(3, false)),
        (37_361, Fault::Rival),
        (43_608, slow),
        (49_942, kill(3, true)),
        (65_488, Fault::KillCoordinator { silent: false }),
        (75_671, kill(0, true)),
        (76_760, kill(3, true)),
    ];
    vec![History::with(86, &faults)]
}

/// A coordinator that had been replaced acknowledged a report that only its successor could understand.
fn a_worker_that_finds_the_replaced_coordinator() -> Vec<History> {
    let cut = Fault::CutStream {
        worker: 2,
        worker_first: false,
        lag_ms: 5_057,
    };
    let faults = [
        (10_738, Fault::KillCoordinator { silent: true }),
        (17_282, Fault::Rival),
        (23_185, cut),
        (62_908, Fault::Rival),
    ];
    vec![History::with(818, &faults)]
}

/// Checkpoints were read at the same time, and the older one was recorded after it had been pruned for the newer.
fn checkpoints_that_are_verified_out_of_order() -> Vec<History> {
    [26, 122, 654].map(History::of).into()
}

/// Deadlock: the stage was sealed before there was a group again whose members could be let go.
fn members_that_are_back_before_their_group() -> Vec<History> {
    let slow = Fault::Store {
        client: Client::Everybody,
        trouble: Trouble::Slow,
        one_in: 1,
        ms: 25_609,
    };
    let faults = [
        (43_221, slow),
        (43_779, Fault::Stop { now: true }),
        (84_931, Fault::PauseCoordinator { ms: 41_992 }),
        (117_944, Fault::Stop { now: true }),
    ];
    vec![History::with(1384, &faults)]
}

/// An engine that could not write the last checkpoint was not killed when its group was given up.
fn an_engine_that_hangs_over_the_last_checkpoint() -> Vec<History> {
    let faults = [
        (
            4_551,
            Fault::KillWorker {
                worker: 3,
                silent: false,
            },
        ),
        (
            8_744,
            Fault::CrashEngine {
                worker: 2,
                killed: true,
            },
        ),
        (
            42_034,
            Fault::Partition {
                worker: 1,
                peer: Peer::Store,
                direction: Direction::Out,
                ms: 74_418,
            },
        ),
    ];
    vec![History::with(1613, &faults)]
}

/// Where its peers listen was said on a stream that a member had left: the group stood still until it was taken for
/// hanging.
fn a_member_that_did_not_hear_where_its_peers_listen_is_told_again() -> Vec<History> {
    let partition = Fault::Partition {
        worker: 2,
        peer: Peer::Workers,
        direction: Direction::Both,
        ms: 71_252,
    };
    let full = Fault::Store {
        client: Client::Everybody,
        trouble: Trouble::Full,
        one_in: 4,
        ms: 8_744,
    };
    vec![History::with(
        1326,
        &[
            (10_248, Fault::Duplicate { ms: 5_608 }),
            (58_086, partition),
            (98_798, Fault::PauseCoordinator { ms: 65_827 }),
            (120_917, full),
        ],
    )]
}

/// A worker went on to another stage's group before it was known whether its old one had outlived the coordinator; the
/// coordinator after that waited for it in both.
fn a_group_whose_member_went_on_to_a_younger_one_is_over() -> Vec<History> {
    let slow = Fault::Store {
        client: Client::Everybody,
        trouble: Trouble::Slow,
        one_in: 3,
        ms: 76_851,
    };
    let crash = Fault::CrashEngine {
        worker: 0,
        killed: false,
    };
    vec![History::with(
        3112,
        &[
            (
                918,
                Fault::KillWorker {
                    worker: 0,
                    silent: false,
                },
            ),
            (14_870, slow),
            (27_119, crash),
            (65_566, Fault::KillCoordinator { silent: false }),
            (98_129, Fault::Rival),
        ],
    )]
}
