//! Hostile files and names: each is refused by `coordinator check` or the worker, in clear words, with little memory.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use distillery_common::telemetry::Stopwatch;
use distillery_tests::harness::{repository, sim_recipe};

use super::site::{Site, Trial};

/// How long a refusal may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a refusal may cost.
const MEMORY_MIB: f64 = 512.0;
/// Must never be told.
const SECRET: &str = "a-secret-of-this-host";

/// A change that makes a sound recipe and its files hostile; gives the recipe's text.
type Hostility = fn(&Place) -> Result<String>;

/// Who finds it: `check` reads no prompts, `run` does before it starts anything.
const CHECK: &str = "check";
const RUN: &str = "run";

/// A folder with a sound recipe, a teacher and a secret beside it.
#[derive(Debug)]
struct Place {
    folder: PathBuf,
}

/// Every hostile file.
pub(crate) fn all(site: &Site, scratch: &Path) -> Vec<Trial> {
    let checks: [(&str, &str, Hostility, &str); 9] = [
        (
            "a YAML bomb of aliases",
            CHECK,
            aliases,
            "values, copies made by aliases included",
        ),
        (
            "a safetensors header of 2^60 bytes",
            CHECK,
            header,
            "claims a header of 1152921504606846976 bytes",
        ),
        (
            "a link in a teacher's folder",
            CHECK,
            link,
            "is a link that leads out of the teacher's folder",
        ),
        (
            "a pipe in a teacher's folder",
            CHECK,
            pipe,
            "is not a regular file",
        ),
        (
            "a device in a teacher's folder",
            CHECK,
            device,
            "is a link that leads out of the teacher's folder",
        ),
        (
            "a shard's name that leads elsewhere",
            CHECK,
            shard,
            "plain name",
        ),
        (
            "prompts that grow a thousandfold",
            RUN,
            bomb,
            "longer than 65536 bytes",
        ),
        ("prompts that are a device", RUN, endless, "prompts"),
        (
            "credentials in a run's URI",
            CHECK,
            credentials,
            "output holds credentials",
        ),
    ];
    let mut trials: Vec<Trial> = (0..)
        .zip(checks)
        .map(|(at, (name, by, hostility, says))| {
            let folder = scratch.join(format!("files-{at}"));
            Trial::of(name, check(site, folder, by, hostility, says))
        })
        .collect();
    for name in ["../../escape", "a/b", "", "x\ny"] {
        let trial = worker_name(site, name);
        trials.push(Trial::of(format!("a worker called {name:?}"), trial));
    }
    trials
}

fn check(
    site: &Site,
    folder: PathBuf,
    by: &str,
    hostility: Hostility,
    says: &str,
) -> Result<String> {
    let place = Place::new(folder)?;
    let recipe = place.folder.join("recipe.yaml");
    std::fs::write(&recipe, hostility(&place)?)?;
    let mut command = site.run.command("coordinator");
    command.arg(by).arg(&recipe);
    let output = place.folder.join("run");
    if by == RUN {
        command
            .arg("--set")
            .arg(format!("output={}", output.display()));
    }
    let said = refused(command, says)?;
    ensure!(!output.join("journal").exists(), "a run was begun");
    Ok(said)
}

fn worker_name(site: &Site, name: &str) -> Result<String> {
    let mut command = site.run.command("worker");
    let join = format!("@{}", site.run.output().join("join").display());
    command.args(["join", "--coordinator", &join, "--name", name]);
    refused(command, "is not made of letters, digits and")
}

/// Runs `command`, which must fail, say `says` and no secret, and take little memory.
fn refused(mut command: Command, says: &str) -> Result<String> {
    let log = tempfile::NamedTempFile::new()?;
    command.stdout(log.reopen()?).stderr(log.reopen()?);
    let mut child = command.stdin(Stdio::null()).spawn()?;
    let watch = Stopwatch::start();
    let mut peak: f64 = 0.0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        peak = peak.max(peak_mib(child.id()).unwrap_or(0.0));
        if watch.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("no answer after {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let said = std::fs::read_to_string(log.path())?;
    ensure!(!status.success(), "it was accepted: {said}");
    ensure!(said.contains(says), "it does not say {says:?}: {said}");
    ensure!(!said.contains("panicked"), "{said}");
    ensure!(!said.contains(SECRET), "it tells what it must not");
    ensure!(peak < MEMORY_MIB, "it took {peak:.0} MiB of memory");
    let line = said
        .lines()
        .find(|line| line.contains(says))
        .unwrap_or(says);
    Ok(line.trim().to_owned())
}

/// The most memory that a living process has taken.
fn peak_mib(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

impl Place {
    fn new(folder: PathBuf) -> Result<Self> {
        let fixtures = repository().join("worker/engine/tests/fixtures/sd15");
        copy(&fixtures, &folder.join("teacher"))?;
        std::fs::write(folder.join("secret"), SECRET)?;
        Ok(Self { folder })
    }

    /// A sound recipe of this place's teacher, with `old` in it replaced.
    fn recipe(&self, old: &str, new: &str) -> Result<String> {
        let teacher = "{repository}/worker/engine/tests/fixtures/sd15";
        let recipe = sim_recipe().replace(teacher, &self.teacher("").display().to_string());
        ensure!(
            old.is_empty() || recipe.contains(old),
            "the stand-in's recipe has changed"
        );
        let recipe = if old.is_empty() {
            recipe
        } else {
            recipe.replace(old, new)
        };
        Ok(recipe.replace("{repository}", &repository().display().to_string()))
    }

    fn teacher(&self, file: &str) -> PathBuf {
        self.folder.join("teacher").join(file)
    }
}

fn aliases(place: &Place) -> Result<String> {
    let mut text = place.recipe("", "")?;
    text.push_str("a: &a [x, x, x, x, x, x, x, x, x, x]\n");
    for (earlier, later) in ('a'..='y').zip('b'..='z') {
        let list = vec![format!("*{earlier}"); 10].join(", ");
        text.push_str(&format!("{later}: &{later} [{list}]\n"));
    }
    Ok(text)
}

fn header(place: &Place) -> Result<String> {
    let path = place.teacher("unet/diffusion_pytorch_model.safetensors");
    let mut bytes = std::fs::read(&path)?;
    bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    std::fs::write(path, bytes)?;
    place.recipe("", "")
}

fn link(place: &Place) -> Result<String> {
    replace_by_link(
        &place.teacher("tokenizer/tokenizer.json"),
        &place.folder.join("secret"),
    )?;
    place.recipe("", "")
}

fn device(place: &Place) -> Result<String> {
    replace_by_link(&place.teacher("unet/config.json"), Path::new("/dev/zero"))?;
    place.recipe("", "")
}

fn replace_by_link(path: &Path, target: &Path) -> Result<()> {
    std::fs::remove_file(path)?;
    symlink(target, path).context("linking")
}

fn pipe(place: &Place) -> Result<String> {
    let path = place.teacher("unet/config.json");
    std::fs::remove_file(&path)?;
    let made = Command::new("mkfifo").arg(&path).status()?;
    ensure!(made.success(), "mkfifo failed");
    place.recipe("", "")
}

fn shard(place: &Place) -> Result<String> {
    let whole = place.teacher("unet/diffusion_pytorch_model.safetensors");
    std::fs::remove_file(&whole)?;
    let index = serde_json::json!({"metadata": {}, "weight_map": {"conv_in.bias": "../../secret"}});
    let name = "unet/diffusion_pytorch_model.safetensors.index.json";
    std::fs::write(place.teacher(name), index.to_string())?;
    place.recipe("", "")
}

fn prompts(place: &Place, file: &str) -> Result<String> {
    place.recipe("{repository}/tests/recipes/sim-prompts.txt", file)
}

fn bomb(place: &Place) -> Result<String> {
    prompts(
        place,
        "{repository}/common/tests/fixtures/prompts/long.parquet",
    )
}

fn endless(place: &Place) -> Result<String> {
    prompts(place, "/dev/zero")
}

fn credentials(place: &Place) -> Result<String> {
    place.recipe(
        "output: run",
        &format!("output: s3://key:{SECRET}@bucket/run"),
    )
}
