//! `simulate`: whole fleets in virtual time, one for each seed; see `distillery_tests::simulation`.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Parser;
use distillery_tests::simulation::{
    Account, History, KINDS, Strike, Violation, named, shrink, simulate, sweep,
};

/// Runs simulated fleets and says which promises they kept.
#[derive(Debug, Parser)]
#[command(name = "simulate")]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Tell every event of this seed alone.
    #[arg(long, value_name = "SEED")]
    replay: Option<u64>,
    /// Make failing histories short before they are shown.
    #[arg(long)]
    shrink: bool,
    /// Go on after a failing seed.
    #[arg(long)]
    keep_going: bool,
    /// Instead of seeds, let every operation on the store of a small run fail in every way.
    #[arg(long)]
    every_store_operation: bool,
    /// Instead of seeds, live through the named histories: bugs that were.
    #[arg(long)]
    named: bool,
    /// Tell every event of the small run in which this operation on the store fails, as `51:Killed`.
    #[arg(long, value_name = "OPERATION:HOW")]
    operation: Option<String>,
    /// Threads; each lives through histories of its own.
    #[arg(long, default_value_t = 2)]
    threads: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.every_store_operation {
        return sweep_operations();
    }
    if arguments.named {
        return run_named();
    }
    if let Some(seed) = arguments.replay {
        // What the programs would have logged, between the events.
        tracing_subscriber::fmt()
            .without_time()
            .with_writer(std::io::stderr)
            .init();
        return replay(seed, arguments.shrink);
    }
    if let Some(text) = &arguments.operation {
        return operation(text);
    }
    run_seeds(&arguments)
}

fn operation(text: &str) -> ExitCode {
    let parsed = text.split_once(':').and_then(|(number, how)| {
        let strike = Strike::ALL
            .into_iter()
            .find(|strike| format!("{strike:?}") == how)?;
        Some((number.parse().ok()?, strike))
    });
    let Some(struck) = parsed else {
        eprintln!("{text} is no operation and way to fail, such as 51:Killed");
        return ExitCode::from(64);
    };
    let history = History::small(Some(struck));
    match simulate(&history, true) {
        Ok(_) => ExitCode::SUCCESS,
        Err(violation) => {
            show(0, &history, &violation);
            ExitCode::FAILURE
        }
    }
}

fn replay(seed: u64, short: bool) -> ExitCode {
    let history = History::of(seed);
    eprintln!("{history}");
    if short {
        return match simulate(&history, false) {
            Ok(_) => ExitCode::SUCCESS,
            Err(violation) => {
                let (shorter, violation) = shrink(&history, &violation);
                let _ = simulate(&shorter, true);
                show(seed, &shorter, &violation);
                ExitCode::FAILURE
            }
        };
    }
    match simulate(&history, true) {
        Ok(account) => {
            println!(
                "seed {seed}: green, {} events, trace {:016x}",
                account.events, account.trace
            );
            ExitCode::SUCCESS
        }
        Err(violation) => {
            show(seed, &history, &violation);
            ExitCode::FAILURE
        }
    }
}

fn run_seeds(arguments: &Arguments) -> ExitCode {
    let next = AtomicU64::new(arguments.from);
    let end = arguments.from + arguments.seeds;
    let lived = AtomicU64::new(0);
    let total = Mutex::new(Account::default());
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let failed = !failures.lock().expect("no panics here").is_empty();
                    if seed >= end || (failed && !arguments.keep_going) {
                        return;
                    }
                    lived.fetch_add(1, Ordering::Relaxed);
                    match simulate(&History::of(seed), false) {
                        Ok(account) => add(&mut total.lock().expect("no panics here"), &account),
                        Err(violation) => {
                            failures
                                .lock()
                                .expect("no panics here")
                                .push((seed, violation));
                        }
                    }
                }
            });
        }
    });
    let total = total.into_inner().expect("no panics here");
    let mut failures = failures.into_inner().expect("no panics here");
    failures.sort_by_key(|(seed, _)| *seed);
    account(&total);
    for (seed, violation) in &failures {
        let history = History::of(*seed);
        if arguments.shrink {
            let (short, violation) = shrink(&history, violation);
            show(*seed, &short, &violation);
        } else {
            show(*seed, &history, violation);
        }
    }
    if failures.is_empty() {
        println!("sim: {} seeds green (goal {0})", arguments.seeds);
        ExitCode::SUCCESS
    } else {
        println!(
            "sim: {} seeds failed of {} that ran, of {} asked for (goal 0)",
            failures.len(),
            lived.into_inner(),
            arguments.seeds
        );
        ExitCode::FAILURE
    }
}

fn run_named() -> ExitCode {
    let (mut all, mut failed) = (0, 0);
    for (name, histories) in named() {
        for history in histories {
            all += 1;
            if let Err(violation) = simulate(&history, false) {
                failed += 1;
                println!("{name}:");
                show(history.seed, &history, &violation);
            }
        }
    }
    println!("named: {failed} of {all} histories failed (goal 0)");
    ExitCode::from(u8::from(failed > 0))
}

fn add(total: &mut Account, account: &Account) {
    total.events += account.events;
    total.strikes += account.strikes;
    total.lives += account.lives;
    total.workers += account.workers;
    total.generations += account.generations;
    total.operations += account.operations;
    total.elapsed += account.elapsed;
    // Sums do not depend on the order in which seeds end.
    total.trace = total.trace.wrapping_add(account.trace);
    for (total, one) in total.faults.iter_mut().zip(account.faults) {
        *total += one;
    }
}

fn account(total: &Account) {
    println!("events                     {}", total.events);
    println!("coordinator lives          {}", total.lives);
    println!("worker processes           {}", total.workers);
    println!("generations formed         {}", total.generations);
    println!(
        "store operations           {}, {} struck",
        total.operations, total.strikes
    );
    let days = Duration::as_secs_f64(&total.elapsed) / 86_400.0;
    println!("virtual time               {days:.1} days");
    println!("trace                      {:016x}", total.trace);
    println!(
        "faults                     {}",
        total.faults.iter().sum::<u64>()
    );
    for (kind, n) in KINDS.iter().zip(total.faults) {
        println!("  {kind:<38} {n}");
    }
}

fn show(seed: u64, history: &History, violation: &Violation) {
    println!(
        "seed {seed}: {} broken at event {} after {:.3} s: {}",
        violation.invariant,
        violation.event,
        violation.at.as_secs_f64(),
        violation.seen
    );
    println!("{history}");
    println!("replay: simulate --replay {seed}");
}

fn sweep_operations() -> ExitCode {
    match sweep(1) {
        Err(violation) => {
            show(0, &History::small(None), &violation);
            ExitCode::FAILURE
        }
        Ok(sweep) => {
            for (operation, strike, violation) in &sweep.failures {
                show(0, &History::small(Some((*operation, *strike))), violation);
            }
            println!(
                "sweep: {} runs over {} store operations, {} failed (goal 0)",
                sweep.runs,
                sweep.operations,
                sweep.failures.len()
            );
            ExitCode::from(u8::from(!sweep.failures.is_empty()))
        }
    }
}
