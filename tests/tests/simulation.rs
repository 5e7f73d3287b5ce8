//! Whole fleets in virtual time: a thousand seeds, a fault at every operation on the store, and the named histories of
//! every bug that they found. `make sim` lives through more.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use distillery_tests::mutants::{LIST, parse};
use distillery_tests::simulation::{
    Account, Client, Fault, History, KINDS, Strike, Trouble, Violation, named, simulate, sweep,
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

/// Deadlock: the record of the last checkpoint was durable, the seal that follows from it was not.
#[test]
fn a_coordinator_that_dies_between_the_last_checkpoint_and_the_seal() {
    let operations = green(&History::small(None)).operations;
    for operation in 0..operations {
        green(&History::small(Some((operation, Strike::Killed))));
    }
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

/// Every bug that was found and could be told as a history.
#[test]
fn every_named_history_ends_well() {
    for (name, histories) in named() {
        for history in histories {
            simulate(&history, false)
                .unwrap_or_else(|violation| panic!("{name}: {violation:?}\n{history}"));
        }
    }
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
