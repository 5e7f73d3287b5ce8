//! Whole fleets in virtual time: a thousand seeds, a fault at every operation on the store, and the named histories of
//! every bug that they found. `make sim` lives through more.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use distillery_tests::mutants::{LIST, parse};
use distillery_tests::simulation::{
    Account, Client, Direction, Fault, History, KINDS, Peer, Strike, Trouble, Violation, simulate,
    sweep,
};

const SEEDS: u64 = 1_000;

fn green(history: &History) -> Account {
    simulate(history, false).unwrap_or_else(|violation| panic!("{violation:?}\n{history}"))
}

#[test]
fn every_seed_ends_well_and_keeps_every_promise() {
    let next = AtomicU64::new(1);
    let accounts = Mutex::new(Vec::new());
    let failures = Mutex::new(BTreeMap::<u64, Violation>::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > SEEDS {
                        return;
                    }
                    match simulate(&History::of(seed), false) {
                        Ok(account) => accounts.lock().unwrap().push(account),
                        Err(violation) => {
                            failures.lock().unwrap().insert(seed, violation);
                        }
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(
        failures.is_empty(),
        "{failures:#?}\nreplay with: simulate --replay SEED --shrink"
    );
    let accounts = accounts.into_inner().unwrap();
    for (kind, name) in KINDS.iter().enumerate() {
        let n: u64 = accounts.iter().map(|account| account.faults[kind]).sum();
        assert!(
            n >= 50,
            "{n} faults of the kind {name} are too few to show anything"
        );
    }
    let lives: u64 = accounts.iter().map(|account| account.lives).sum();
    assert!(lives > 2 * SEEDS, "{lives} coordinator lives are too few");
}

#[test]
fn a_seed_replays_to_the_same_event() {
    for seed in [3, 17, 26, 86] {
        let one = green(&History::of(seed));
        let two = green(&History::of(seed));
        assert_eq!(one, two, "seed {seed}");
        assert!(one.trace != 0 && one.events > 500);
    }
    let other = green(&History::of(4));
    assert_ne!(other.trace, green(&History::of(5)).trace);
}

/// U8: before, after, with a lost reply, and with the writer killed right there.
#[test]
fn a_fault_at_every_store_operation_loses_nothing() {
    let sweep = sweep(1).unwrap_or_else(|violation| panic!("without faults: {violation:?}"));
    assert!(sweep.failures.is_empty(), "{:#?}", sweep.failures);
    assert!(sweep.operations > 50 && sweep.runs == sweep.operations * 4);
}

/// A coordinator that has nothing to write never met its successor's segment: it kept workers that the other waited for.
#[test]
fn a_coordinator_that_was_replaced_while_the_run_was_paused_lets_go_of_its_workers() {
    let paused = Fault::PauseRun { ms: 53_055 };
    green(&History::with(
        915,
        &[(9_325, paused), (49_845, Fault::Rival)],
    ));
}

/// Deadlock: the record of the last checkpoint was durable, the seal that follows from it was not.
#[test]
fn a_coordinator_that_dies_between_the_last_checkpoint_and_the_seal() {
    let operations = green(&History::small(None)).operations;
    for operation in 0..operations {
        green(&History::small(Some((operation, Strike::Killed))));
    }
}

/// The new coordinator had pruned the checkpoints that a member, when it came back, still reported: its group was ended.
#[test]
fn a_late_report_of_a_pruned_checkpoint() {
    green(&History::of(49));
    green(&History::of(76));
}

/// Livelock: a leaving worker had told its engine to die, and looked for its exit without a pause.
#[test]
fn a_leaving_worker_waits_for_its_engine() {
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
    green(&History::with(36, &[(17_646, slow), (29_740, drain)]));
}

/// The coordinator ended although the store only needed a moment.
#[test]
fn conflicts_over_nothing_for_a_while() {
    let conflict = |at| {
        let fault = Fault::Store {
            client: Client::Coordinators,
            trouble: Trouble::Conflict,
            one_in: 1,
            ms: 3_000,
        };
        (at, fault)
    };
    let faults: Vec<_> = (1..12).map(|n| conflict(5_000 * n)).collect();
    let account = green(&History::with(19, &faults));
    assert_eq!(account.lives, 1, "no coordinator had to be started again");
}

/// Deadlock: the coordinator's answers came too late for the worker's lease, the worker's beats in time for it.
#[test]
fn a_lease_that_ended_on_one_side_alone() {
    green(&History::of(39));
    green(&History::of(262));
}

/// The worker went on with what had been committed while the coordinator was away.
#[test]
fn a_task_that_was_done_while_its_holder_was_away() {
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
    green(&History::with(86, &faults));
}

/// A coordinator that had been replaced acknowledged a report that only its successor could understand.
#[test]
fn a_worker_that_finds_the_replaced_coordinator() {
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
    green(&History::with(818, &faults));
}

/// Checkpoints were read at the same time, and the older one was recorded after it had been pruned for the newer.
#[test]
fn checkpoints_that_are_verified_out_of_order() {
    for seed in [26, 122, 654] {
        green(&History::of(seed));
    }
}

/// Deadlock: the stage was sealed before there was a group again whose members could be let go.
#[test]
fn members_that_are_back_before_their_group() {
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
    green(&History::with(1384, &faults));
}

/// An engine that could not write the last checkpoint was not killed when its group was given up.
#[test]
fn an_engine_that_hangs_over_the_last_checkpoint() {
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
    green(&History::with(1613, &faults));
}

/// Every mutant of `make sim-mutants` still finds what it breaks.
#[test]
fn every_mutant_can_be_applied() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let list = std::fs::read_to_string(root.join(LIST)).unwrap();
    let mutants = parse(&list).unwrap();
    assert!(mutants.len() >= 15, "{} mutants are too few", mutants.len());
    let lost: Vec<String> = mutants
        .iter()
        .filter_map(|mutant| Some(mutant.apply(&root).err()?.to_string()))
        .collect();
    assert!(lost.is_empty(), "{lost:#?}");
}

/// Where its peers listen was said on a stream that a member had left: the group stood still until it was taken for
/// hanging.
#[test]
fn a_member_that_did_not_hear_where_its_peers_listen_is_told_again() {
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
    green(&History::with(
        1326,
        &[
            (10_248, Fault::Duplicate { ms: 5_608 }),
            (58_086, partition),
            (98_798, Fault::PauseCoordinator { ms: 65_827 }),
            (120_917, full),
        ],
    ));
}

/// A worker went on to another stage's group before it was known whether its old one had outlived the coordinator; the
/// coordinator after that waited for it in both.
#[test]
fn a_group_whose_member_went_on_to_a_younger_one_is_over() {
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
    green(&History::with(
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
    ));
}
