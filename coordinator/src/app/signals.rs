//! Signals that end a run so that it can be resumed.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use distillery_common::recipe::{Launcher, Recipe};

use crate::console;
use crate::driver::Handle;
use crate::scheduler::Event;

/// How long a signal from a scheduler may echo: it goes to a script and to its children, and the script hands it on.
const ECHO: Duration = Duration::from_secs(1);

/// Ctrl-C once: checkpoint and stop; twice: stop now. A scheduler's SIGTERM is the same, and so is the end of the terminal,
/// where it is not ignored (`nohup`). A scheduler starts the same command again, and workers that others than the run's own
/// launcher have started are told so.
pub(super) fn watch(handle: Handle, recipe: &Recipe) -> JoinHandle<anyhow::Result<()>> {
    let awaited = recipe.cluster.launcher == Launcher::External;
    tokio::spawn(hear(handle, awaited))
}

/// With `awaited`, whoever sends SIGTERM starts the same command again.
async fn hear(handle: Handle, awaited: bool) -> anyhow::Result<()> {
    // Whoever asks for a signal no longer ignores it.
    let hangs_up = !is_hangup_ignored();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = match hangs_up {
        true => Some(signal(SignalKind::hangup())?),
        false => None,
    };
    let mut now = false;
    loop {
        let mut scheduled = async || {
            tokio::select! {
                _ = terminate.recv() => awaited,
                () = async {
                    match &mut hangup {
                        Some(hangup) => drop(hangup.recv().await),
                        None => std::future::pending().await,
                    }
                } => false,
            }
        };
        let (by_hand, returns) = tokio::select! {
            _ = interrupt.recv() => (true, false),
            returns = scheduled() => (false, returns),
        };
        console::note(if now {
            "stopping now"
        } else {
            "stopping after a checkpoint; once more to stop now"
        });
        handle.event(Event::StopRequested { now, returns }).await?;
        now = true;
        if !by_hand {
            // However often it comes meanwhile.
            let echoes = async {
                loop {
                    scheduled().await;
                }
            };
            let _: Result<(), _> = tokio::time::timeout(ECHO, echoes).await;
        }
    }
}

/// Whether this process was started so that the end of its terminal does not concern it.
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignored(&status) & 1 != 0
}

/// Signals that a process ignores, as its `/proc/PID/status` tells: bit 0 is signal 1, SIGHUP.
fn ignored(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_off_a_status() {
        let status = "Name:\tx\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000001001\nSigCgt:\t0\n";
        assert_eq!(ignored(status), 0x1001);
        assert_eq!(ignored("Name:\tx\n"), 0);
    }
}
