//! The kubelets: containers are processes of this host.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::Room;
use super::world::{World, is_over, text};
use crate::harness;

/// Bytes of a log that become a termination message.
const LAST_WORDS: usize = 2048;

/// A container that runs.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    log: PathBuf,
    /// When it was asked to end, and has to have ended.
    told: Option<Duration>,
    /// Paths of the container, and where they lie here.
    mounted: Vec<(String, String)>,
    /// When it is asked next whether it lives, and how often in a row it did not.
    probe: (Duration, u64),
}

impl Running {
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it at once.
    pub(super) fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends every container.
pub(super) fn kill_all(world: &mut World) {
    for process in world.processes.values_mut() {
        process.kill();
    }
    world.processes.clear();
}

/// One look of each kubelet that has power.
pub(super) fn look(world: &mut World, now: Duration) {
    let mine = world.pods.iter().filter(|(_, pod)| {
        let node = text(pod, "/spec/nodeName");
        !node.is_empty() && !world.dead.contains(&node)
    });
    let mine: Vec<(String, Value)> = mine.map(|(n, p)| (n.clone(), p.clone())).collect();
    for (name, pod) in mine {
        let leaving = pod["metadata"]["deletionTimestamp"].is_string();
        match world.processes.contains_key(&name) {
            false if is_over(&pod) => {}
            false if leaving => end(world, &name, &json!({ "phase": "Failed" })),
            false => begin(world, &name, &pod),
            true => follow(world, &name, &pod, leaving, now),
        }
    }
    // A container whose pod was taken away by force ends as well.
    let gone: Vec<String> = world
        .processes
        .keys()
        .filter(|name| !world.pods.contains_key(*name))
        .cloned()
        .collect();
    for name in gone {
        if let Some(mut process) = world.processes.remove(&name) {
            process.kill();
        }
    }
}

fn begin(world: &mut World, name: &str, pod: &Value) {
    if world.ways.room == Room::NoImage {
        let image = text(pod, "/spec/containers/0/image");
        let message = format!("Back-off pulling image {image:?}: not found");
        wait(world, name, pod, "ImagePullBackOff", &message);
        return;
    }
    match spawn(world, name, pod) {
        Ok(process) => {
            world.processes.insert(name.to_owned(), process);
            world.change_pod(name, |pod| {
                pod["status"]["phase"] = json!("Running");
                pod["status"]["containerStatuses"] =
                    json!([{ "name": "worker", "state": { "running": {} } }]);
            });
        }
        Err(error) => wait(world, name, pod, "ContainerCreating", &format!("{error:#}")),
    }
}

fn wait(world: &mut World, name: &str, pod: &Value, reason: &str, message: &str) {
    let state = json!([{ "name": "worker", "state": { "waiting": { "reason": reason, "message": message } } }]);
    if pod["status"]["containerStatuses"] != state {
        world.change_pod(name, |pod| pod["status"]["containerStatuses"] = state);
    }
}

/// Starts the container: its arguments with variables filled in and mounted Secrets where they lie here.
fn spawn(world: &World, name: &str, pod: &Value) -> anyhow::Result<Running> {
    let folder = world.folder.join(name);
    std::fs::create_dir_all(&folder)?;
    let container = &pod["spec"]["containers"][0];
    let mut mounted = Vec::new();
    for mount in container["volumeMounts"].as_array().into_iter().flatten() {
        let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
        let volume = volumes
            .into_iter()
            .find(|volume| volume["name"] == mount["name"]);
        let Some(volume) = volume else { continue };
        if volume["emptyDir"].is_object() {
            let here = folder.join(text(volume, "/name"));
            std::fs::create_dir_all(&here)?;
            mounted.push((text(mount, "/mountPath"), here.display().to_string()));
        }
        let Some(secret) = volume["secret"]["secretName"].as_str() else {
            continue;
        };
        let held = world.secrets.get(secret);
        let held =
            held.with_context(|| format!("MountVolume.SetUp failed: secret {secret:?} not found"))?;
        let here = folder.join("secret");
        std::fs::create_dir_all(&here)?;
        for (key, value) in held["stringData"].as_object().into_iter().flatten() {
            let options = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o400)
                .clone();
            let path = here.join(key);
            let _ = std::fs::remove_file(&path);
            std::io::Write::write_all(
                &mut options.open(path)?,
                value.as_str().unwrap_or("").as_bytes(),
            )?;
        }
        mounted.push((text(mount, "/mountPath"), here.display().to_string()));
    }
    let mut command = Command::new(&world.program.path);
    command.args(&world.program.before);
    for arg in container["args"].as_array().into_iter().flatten() {
        let arg = arg.as_str().unwrap_or_default();
        command.arg(lies_here(&arg.replace("$(POD_NAME)", name), &mounted));
    }
    let log = folder.join("log");
    let file = File::create(&log)?;
    command
        .envs(
            world
                .program
                .environment
                .iter()
                .map(|(name, value)| (name, value)),
        )
        .env_remove("DISTILLERY_JOIN")
        .env("POD_NAME", name)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .process_group(0);
    Ok(Running {
        child: command.spawn()?,
        log,
        told: None,
        mounted,
        probe: (Duration::ZERO, 0),
    })
}

/// An argument of the container with the place of a path, or of `@` and a path, on this host.
fn lies_here(arg: &str, mounted: &[(String, String)]) -> String {
    let (at, path) = match arg.strip_prefix('@') {
        Some(path) => ("@", path),
        None => ("", arg),
    };
    let found = mounted.iter().find_map(|(there, here)| {
        let below = path.strip_prefix(there.as_str())?;
        below.starts_with('/').then(|| format!("{at}{here}{below}"))
    });
    found.unwrap_or_else(|| arg.to_owned())
}

/// Asks a container whether it lives, as its pod says; one that fails too often in a row is told to end.
fn probe(process: &mut Running, program: &OsStr, pod: &Value, now: Duration, haste: f64) {
    let probe = &pod["spec"]["containers"][0]["livenessProbe"];
    let command = probe["exec"]["command"].as_array();
    // The first word is the program that the image has.
    let Some((_, arguments)) = command.and_then(|words| words.split_first()) else {
        return;
    };
    let here = |seconds: &Value, usual: f64| {
        Duration::from_secs_f64(seconds.as_f64().unwrap_or(usual) / haste)
    };
    if now < process.probe.0 {
        return;
    }
    let words = arguments.iter().filter_map(Value::as_str);
    let answer = Command::new(program)
        .args(words.map(|word| lies_here(word, &process.mounted)))
        .stdin(Stdio::null())
        .output();
    let failures = match answer {
        Ok(answer) if answer.status.success() => 0,
        Ok(_) | Err(_) => process.probe.1 + 1,
    };
    process.probe = (now + here(&probe["periodSeconds"], 10.0), failures);
    if failures >= probe["failureThreshold"].as_u64().unwrap_or(3) {
        let grace = here(&probe["terminationGracePeriodSeconds"], 30.0);
        process.told = Some(now + grace);
        let _ = harness::signal(process.child.id(), "TERM");
    }
}

/// Tells a container whose pod leaves to end, and says when it has.
fn follow(world: &mut World, name: &str, pod: &Value, leaving: bool, now: Duration) {
    let grace = pod["metadata"]["deletionGracePeriodSeconds"]
        .as_u64()
        .unwrap_or(30);
    let haste = world.ways.haste;
    let program = world.program.path.clone();
    let Some(process) = world.processes.get_mut(name) else {
        return;
    };
    let ended = process.child.try_wait().ok().flatten();
    match (ended, process.told) {
        (Some(status), _) => {
            let code = status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            let log = std::fs::read(&process.log).unwrap_or_default();
            let words = &log[log.len().saturating_sub(LAST_WORDS)..];
            let message = if code == 0 {
                "".into()
            } else {
                String::from_utf8_lossy(words)
            };
            let reason = if code == 0 { "Completed" } else { "Error" };
            let status = json!({
                "phase": if code == 0 { "Succeeded" } else { "Failed" },
                "containerStatuses": [{ "name": "worker", "state": { "terminated": {
                    "exitCode": code, "reason": reason, "message": message,
                } } }],
            });
            world.processes.remove(name);
            end(world, name, &status);
        }
        (None, None) if leaving => {
            process.told = Some(now + Duration::from_secs(grace));
            // The group: what a container started gets the signal with it when it ends, not before.
            let _ = harness::signal(process.child.id(), "TERM");
        }
        (None, Some(until)) if now >= until => process.kill(),
        (None, Some(_)) => {}
        (None, None) => probe(process, &program, pod, now, haste),
    }
}

fn end(world: &mut World, name: &str, status: &Value) {
    world.change_pod(name, |pod| {
        for (key, value) in status.as_object().into_iter().flatten() {
            pod["status"][key] = value.clone();
        }
    });
}
