//! A sign of life for whoever looks at this process from outside, such as a kubelet.
//!
//! ```text
//!  agent's loop ──▶ breath ─┐
//!  agent's loop ──▶ breath ─┴─▶ once all have breathed: the file's time of change is now ◀── `worker alive FILE`
//! ```
//!
//! The loops themselves give it, not a thread of its own: that would go on for a worker that hangs. It says nothing of the
//! coordinator, which may be away for long, nor of engines, which may compute for long: their worker watches those.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// Time from one sign of a loop to its next.
const BREATH: Duration = Duration::from_secs(2);

/// The file in which all loops of this process show that they turn.
#[derive(Debug)]
pub struct Alive {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Loops that have begun and not ended.
    living: BTreeSet<usize>,
    /// Those of them that have not breathed since the file was last touched.
    awaited: BTreeSet<usize>,
    begun: usize,
    /// Whether it was said that the file cannot be touched.
    complained: bool,
}

impl Alive {
    /// Signs in the file at `path`, which must be in a folder that this process may write.
    ///
    /// # Errors
    /// When the file cannot be made: a probe would end a worker that is well.
    pub fn at(path: PathBuf) -> io::Result<Arc<Self>> {
        touch(&path)?;
        let state = Mutex::default();
        Ok(Arc::new(Self { path, state }))
    }

    /// One more loop, for as long as its breath is held.
    pub fn begin(self: &Arc<Self>) -> Breath {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let own = state.begun;
        state.begun += 1;
        state.living.insert(own);
        state.awaited.insert(own);
        Breath {
            alive: Arc::clone(self),
            own,
            next: None,
        }
    }

    fn breathed(&self, own: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.awaited.remove(&own);
        if !state.awaited.is_empty() {
            return;
        }
        state.awaited = state.living.clone();
        match touch(&self.path) {
            Ok(()) => state.complained = false,
            Err(error) if !state.complained => {
                state.complained = true;
                tracing::error!(file = %self.path.display(), %error, "no sign of life can be given");
            }
            Err(_) => {}
        }
    }
}

/// The part of one loop. Dropping it says that the loop has ended.
#[derive(Debug)]
pub struct Breath {
    alive: Arc<Alive>,
    own: usize,
    next: Option<Instant>,
}

impl Breath {
    /// The loop turns now.
    pub(super) fn turned(&mut self, now: Instant) {
        if self.next.is_none_or(|next| now >= next) {
            self.next = Some(now + BREATH);
            self.alive.breathed(self.own);
        }
    }

    /// When the loop should turn at the latest.
    pub(super) fn next(&self) -> Option<Instant> {
        self.next
    }
}

impl Drop for Breath {
    fn drop(&mut self) {
        let state = self.alive.state.lock();
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        state.living.remove(&self.own);
        state.awaited.remove(&self.own);
    }
}

/// Sets the file's time of change. It is not written: that could need room on a disk that is full.
fn touch(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600);
    options.open(path)?.set_modified(wall_clock())
}

/// How long ago all loops of the worker that signs in the file at `path` had turned.
///
/// A time that lies ahead counts as far away as one that lies behind: the host's clock was set, and a worker that lives signs
/// anew within seconds.
///
/// # Errors
/// Where there is no such file, or it cannot be looked at.
pub fn age(path: &Path) -> io::Result<Duration> {
    let signed = File::open(path)?.metadata()?.modified()?;
    let now = wall_clock();
    Ok(now
        .duration_since(signed)
        .unwrap_or_else(|ahead| ahead.duration()))
}

#[expect(
    clippy::disallowed_methods,
    reason = "times of files are told by the wall clock, to another process"
)]
fn wall_clock() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that was signed long ago, and how to tell whether it was signed again.
    fn old(path: &Path) {
        let file = File::options().append(true).open(path).expect("there");
        file.set_modified(SystemTime::UNIX_EPOCH).expect("set");
    }

    fn is_signed(path: &Path) -> bool {
        age(path).expect("there") < Duration::from_secs(3600)
    }

    #[test]
    fn the_file_is_signed_when_every_loop_that_lives_has_turned() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("alive");
        let alive = Alive::at(path.clone()).expect("writable");
        let (mut one, mut other) = (alive.begin(), alive.begin());
        let start = super::super::now();
        assert!(is_signed(&path), "from the start");
        old(&path);
        one.turned(start);
        one.turned(start + BREATH);
        one.turned(start + 9 * BREATH);
        assert!(!is_signed(&path), "the other one hangs");
        other.turned(start + 9 * BREATH);
        assert!(is_signed(&path));
        old(&path);
        drop(other);
        one.turned(start + 9 * BREATH);
        assert!(!is_signed(&path), "it is too early for another breath");
        assert_eq!(one.next(), Some(start + 10 * BREATH));
        one.turned(start + 10 * BREATH);
        assert!(is_signed(&path), "who has ended is not waited for");
    }

    #[test]
    fn a_time_that_lies_ahead_is_no_sign_of_life() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("alive");
        assert!(age(&path).is_err(), "nobody has signed");
        let _alive = Alive::at(path.clone()).expect("writable");
        let file = File::options().append(true).open(&path).expect("there");
        let ahead = wall_clock() + Duration::from_secs(7200);
        file.set_modified(ahead).expect("set");
        assert!(!is_signed(&path));
        let nowhere = folder.path().join("nowhere/alive");
        assert!(Alive::at(nowhere).is_err());
    }
}
