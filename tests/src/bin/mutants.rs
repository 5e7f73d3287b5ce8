//! `mutants`: breaks a copy of the shipping code in each way of `tests/mutants.txt`, and lives through simulated fleets
//! until one notices.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Context as _;
use clap::Parser;
use distillery_tests::mutants::{LIST, Mutant, parse};

/// What the copy consists of.
const COPIED: [&str; 9] = [
    "Cargo.toml",
    "Cargo.lock",
    "clippy.toml",
    "rust-toolchain.toml",
    "proto",
    "common",
    "coordinator",
    "worker",
    "tests",
];

/// Breaks the code on purpose and sees that the simulation notices.
#[derive(Debug, Clone, Parser)]
#[command(name = "mutants")]
struct Arguments {
    /// Only mutants whose name contains this; the table is not written then.
    #[arg(long, default_value = "")]
    only: String,
    /// Seeds that each mutant must survive to count as unnoticed.
    #[arg(long, default_value_t = 20_000)]
    seeds: u64,
    /// Show the shortest history that notices each.
    #[arg(long)]
    shrink: bool,
}

/// Where the sources are copied to, and built.
struct Bench {
    root: PathBuf,
    copy: PathBuf,
    build: PathBuf,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let root = std::env::current_dir()?;
    let list = std::fs::read_to_string(root.join(LIST))
        .with_context(|| format!("{LIST}: run this in the workspace's folder"))?;
    let mutants = parse(&list)?;
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".into());
    let bench = Bench {
        copy: root.join(&target).join("mutants/sources"),
        build: root.join(&target).join("mutants/build"),
        root,
    };
    std::fs::create_dir_all(&bench.copy)?;
    for name in COPIED {
        copy(&bench.root.join(name), &bench.copy.join(name))?;
    }
    // Whoever fails without a mutant would be said to catch all of them.
    bench.build()?;
    if let Some(broken) = bench.live(&Arguments {
        seeds: 2000,
        ..arguments.clone()
    })? {
        anyhow::bail!("the code is broken without any mutant: {broken}");
    }
    let chosen: Vec<&Mutant> = mutants
        .iter()
        .filter(|mutant| mutant.name.contains(&arguments.only))
        .collect();
    let mut rows = Vec::new();
    for mutant in &chosen {
        let caught = bench.try_out(mutant, &arguments)?;
        println!(
            "{:<56} {}",
            mutant.name,
            caught.as_deref().unwrap_or("SURVIVED")
        );
        rows.push((mutant.name.clone(), caught));
    }
    let caught = rows.iter().filter(|(_, caught)| caught.is_some()).count();
    if arguments.only.is_empty() {
        let lines: Vec<String> = rows
            .iter()
            .map(|(name, by)| format!("{name:<56} | {}", by.as_deref().unwrap_or("survived")))
            .collect();
        let table = format!("mutant | caught by\n{}\n", lines.join("\n"));
        std::fs::write(bench.root.join("tests/mutants-caught.txt"), table)?;
    }
    println!("sim-mutants: {caught} of {} caught (goal all)", rows.len());
    Ok(ExitCode::from(u8::from(caught != rows.len())))
}

impl Bench {
    /// By which invariant and seed the mutant is caught.
    fn try_out(&self, mutant: &Mutant, arguments: &Arguments) -> anyhow::Result<Option<String>> {
        let broken = mutant.apply(&self.root)?;
        let file = self.copy.join(&mutant.file);
        std::fs::write(&file, broken)?;
        let built = self.build();
        let caught = built.and_then(|()| self.live(arguments));
        copy(&self.root.join(&mutant.file), &file)?;
        caught.with_context(|| format!("the mutant {:?}", mutant.name))
    }

    fn build(&self) -> anyhow::Result<()> {
        let built = Command::new("cargo")
            .args(["build", "--release", "--locked", "--quiet"])
            .args(["-p", "distillery-tests", "--bin", "simulate"])
            .args(quickly())
            .current_dir(&self.copy)
            .env("CARGO_TARGET_DIR", &self.build)
            .env("CARGO_INCREMENTAL", "1")
            .output()
            .context("cargo cannot be run")?;
        let said = String::from_utf8_lossy(&built.stderr);
        anyhow::ensure!(built.status.success(), "it does not compile:\n{said}");
        Ok(())
    }

    fn live(&self, arguments: &Arguments) -> anyhow::Result<Option<String>> {
        let simulate = self.build.join("release/simulate");
        let seeds = arguments.seeds.to_string();
        let mut ways = vec![
            vec!["--named"],
            vec!["--every-store-operation"],
            vec!["--seeds", &seeds],
        ];
        if arguments.shrink {
            ways[2].push("--shrink");
        }
        for way in ways {
            let lived = Command::new(&simulate).args(&way).output()?;
            let said = String::from_utf8_lossy(&lived.stdout).into_owned();
            if arguments.shrink {
                println!("{said}");
            }
            if let Some(line) = said.lines().find(|line| line.contains(" broken at event ")) {
                let by = line.split(" after ").next().unwrap_or(line);
                let how = match way[0] {
                    "--named" => "named history, ",
                    "--seeds" => "",
                    _ => "sweep, ",
                };
                return Ok(Some(format!("{how}{by}")));
            }
        }
        Ok(None)
    }
}

/// Our own crates are built often and run briefly.
fn quickly() -> impl Iterator<Item = String> {
    let crates = ["common", "coordinator", "worker", "tests"];
    crates.into_iter().flat_map(|name| {
        let level = u8::from(name == "common");
        let setting = format!("profile.release.package.distillery-{name}.opt-level={level}");
        ["--config".to_owned(), setting]
    })
}

/// Copies a file or folder; what is the same already is left alone, so that little is built again.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    if from.is_dir() {
        std::fs::create_dir_all(to)?;
        for there in std::fs::read_dir(to)? {
            let there = there?;
            if !from.join(there.file_name()).exists() {
                remove(&there.path())?;
            }
        }
        for entry in std::fs::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    let Ok(bytes) = std::fs::read(from) else {
        // A link to nowhere is no source.
        return Ok(());
    };
    if std::fs::read(to).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    std::fs::write(to, bytes).with_context(|| to.display().to_string())
}

/// What an earlier copy held, and the sources hold no more.
fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = match path.is_dir() {
        true => std::fs::remove_dir_all(path),
        false => std::fs::remove_file(path),
    };
    removed.with_context(|| path.display().to_string())
}
