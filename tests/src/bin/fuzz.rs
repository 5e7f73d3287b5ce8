//! `make fuzz`: feeds every parser of foreign bytes with changed inputs, and stops at the first panic or the first input
//! that takes far more memory than it should. That input is kept and can be fed again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use distillery_common::ids::Digest;
use distillery_common::seed::{Purpose, Stream};
use distillery_common::telemetry::Stopwatch;
use distillery_tests::fuzz::{Corpus, Target, mutate, targets};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Inputs that grow from changed ones, of each target.
const POPULATION: usize = 256;

/// How long, and what.
#[derive(Debug, Parser)]
struct Arguments {
    /// Feeds for so many minutes, every target for the same share.
    #[arg(long, conflicts_with = "inputs")]
    minutes: Option<f64>,
    /// Feeds so many inputs to every target.
    #[arg(long, default_value_t = 2000)]
    inputs: u64,
    /// The same seed makes the same inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this target.
    #[arg(long)]
    target: Option<String>,
    /// Feeds the input in this file, once, to `--target`.
    #[arg(long, requires = "target")]
    replay: Option<PathBuf>,
    /// Where an input is kept that does harm.
    #[arg(long, default_value = "target/fuzz")]
    keep: PathBuf,
}

/// What one target has been fed.
#[derive(Debug, Default)]
struct Fed {
    inputs: u64,
    most_mib: f64,
    longest: Duration,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    // Parsers warn of what they pass over.
    distillery_common::telemetry::init("off", Default::default());
    let corpus = Corpus::make()?;
    let mut targets = targets(&corpus)?;
    if let Some(only) = &arguments.target {
        targets.retain(|target| target.name == only);
        ensure!(!targets.is_empty(), "there is no target {only:?}");
    }
    if let Some(file) = &arguments.replay {
        let input =
            std::fs::read(file).with_context(|| format!("{} cannot be read", file.display()))?;
        println!("{:?}", feed(&targets[0], &input));
        return Ok(ExitCode::SUCCESS);
    }
    // A panic is told with its input.
    std::panic::set_hook(Box::new(|_| {}));
    let share = arguments
        .minutes
        .map(|minutes| minutes * 60.0 / targets.len() as f64);
    let (mut inputs, mut harm) = (0, 0);
    for (at, target) in (0..).zip(&targets) {
        let (fed, found) = fuzz(target, at, &arguments, share.map(Duration::from_secs_f64));
        println!(
            "{}: {} inputs of {} seeds, at most {:.1} MiB and {:.0} ms for one",
            target.name,
            fed.inputs,
            target.seeds.len(),
            fed.most_mib,
            fed.longest.as_secs_f64() * 1e3
        );
        inputs += fed.inputs;
        if let Some((input, what)) = found {
            harm += 1;
            let path = keep(&arguments.keep, target, &input)?;
            println!(
                "HARM {}: {what}; the input is {}",
                target.name,
                path.display()
            );
        }
    }
    println!(
        "fuzz: {harm} harmful inputs of {inputs} (goal 0), {} parsers",
        targets.len()
    );
    Ok(ExitCode::from(u8::from(harm > 0)))
}

/// Feeds one target; gives the first input that did harm, and what it did.
fn fuzz(
    target: &Target,
    number: u64,
    arguments: &Arguments,
    share: Option<Duration>,
) -> (Fed, Option<(Vec<u8>, String)>) {
    let watch = Stopwatch::start();
    let mut stream = Stream::new(arguments.seed, Purpose::Bootstrap, number, 0);
    let mut population = target.seeds.clone();
    let mut fed = Fed::default();
    let is_over = |fed: &Fed| match share {
        Some(share) => watch.elapsed() >= share,
        None => fed.inputs >= arguments.inputs,
    };
    while !is_over(&fed) {
        let pick = |stream: &mut Stream| stream.below(population.len() as u32) as usize;
        let (base, other) = (pick(&mut stream), pick(&mut stream));
        let input = mutate(&population[base], &population[other], &mut stream);
        let once = Stopwatch::start();
        match feed(target, &input) {
            Ok(mib) => fed.most_mib = fed.most_mib.max(mib),
            Err(what) => return (fed, Some((input, what))),
        }
        fed.inputs += 1;
        fed.longest = fed.longest.max(once.elapsed());
        // Changes of changes lead further away from what is valid; seeds stay.
        if stream.below(16) == 0 {
            let newest = target.seeds.len() + stream.below(POPULATION as u32) as usize;
            match population.get_mut(newest) {
                Some(place) => *place = input,
                None => population.push(input),
            }
        }
    }
    (fed, None)
}

/// Memory that the target took for `input` at most, in MiB, or the harm that it did.
fn feed(target: &Target, input: &[u8]) -> Result<f64, String> {
    let before = MEMORY.current_usage_as_mb();
    MEMORY.reset_peak_usage();
    let parsed = catch_unwind(AssertUnwindSafe(|| (target.parse)(input)));
    let taken = f64::from(MEMORY.peak_usage_as_mb() - before);
    if let Err(panic) = parsed {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        return Err(format!("panic: {}", text.unwrap_or("without words")));
    }
    if taken > target.memory_mib {
        return Err(format!("{taken:.0} MiB for {} bytes", input.len()));
    }
    Ok(taken)
}

fn keep(folder: &std::path::Path, target: &Target, input: &[u8]) -> Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    let digest = Digest::of(input).to_string();
    let name = target.name.replace(' ', "-");
    let path = folder.join(format!("{name}-{}", &digest[..16]));
    std::fs::write(&path, input)?;
    Ok(path)
}
