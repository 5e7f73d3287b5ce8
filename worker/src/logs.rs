//! Keeps what engines print with the run, so that `coordinator logs` shows it from anywhere.
//!
//! One task for each engine writes what has gathered every [`EVERY`], or sooner where it is much. A store that is slow
//! or gone costs lines and never time: the queue before the task is bounded, and what does not fit is counted and left
//! out. Old parts are removed, so that no life of an engine keeps more than [`KEPT_BYTES`].

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use distillery_common::logs::{self, Line};
use distillery_common::storage::Store;
use distillery_common::storage::layout::{self, Key, Prefix};
use distillery_common::telemetry;
use tokio::sync::mpsc;

/// Longest time from a line to its part in the store.
const EVERY: Duration = Duration::from_secs(5);
/// A part that is as long is written at once.
const PART_BYTES: usize = 64 << 10;
/// Lines that may wait for the store.
const QUEUE: usize = 4096;
/// Most bytes, and most parts, that one life of an engine keeps.
const KEPT_BYTES: usize = 16 << 20;
const KEPT_PARTS: usize = 2000;

/// Keeps the output of this process's engines.
#[derive(Debug)]
pub struct Keeper {
    alive: mpsc::Sender<Infallible>,
}

/// Ends when everything is kept.
#[derive(Debug)]
pub struct Kept(mpsc::Receiver<Infallible>);

impl Keeper {
    /// A keeper, and the way to wait for it.
    pub fn new() -> (Self, Kept) {
        let (alive, ends) = mpsc::channel(1);
        (Self { alive }, Kept(ends))
    }

    /// Begins to keep lines in `folder`.
    pub fn keep(&self, store: Store, folder: Prefix) -> Intake {
        let (lines, queued) = mpsc::channel(QUEUE);
        let left_out = Arc::new(AtomicU64::new(0));
        let parts = Parts {
            store,
            folder,
            left_out: Arc::clone(&left_out),
            next: 0,
            kept: VecDeque::new(),
            kept_bytes: 0,
            _alive: self.alive.clone(),
        };
        tokio::spawn(parts.keep(queued));
        Intake { lines, left_out }
    }
}

impl Kept {
    /// Waits until the last lines of all engines are in the store, but no longer than `most`. Every keeper and every
    /// engine must be gone, or it is as long.
    pub async fn within(mut self, most: Duration) {
        // Nothing is ever sent: the queue ends with its last sender.
        let _ = tokio::time::timeout(most, self.0.recv()).await;
    }
}

/// Takes lines, and never waits.
#[derive(Debug, Clone)]
pub struct Intake {
    lines: mpsc::Sender<Line>,
    left_out: Arc<AtomicU64>,
}

impl Intake {
    /// Keeps a line, if there is room for it.
    pub fn push(&self, text: &str) {
        let line = Line {
            at_ms: telemetry::unix_millis(),
            text: text.to_owned(),
        };
        if self.lines.try_send(line).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The parts of one engine's output.
struct Parts {
    store: Store,
    folder: Prefix,
    left_out: Arc<AtomicU64>,
    next: u64,
    kept: VecDeque<(Key, usize)>,
    kept_bytes: usize,
    _alive: mpsc::Sender<Infallible>,
}

impl Parts {
    async fn keep(mut self, mut queued: mpsc::Receiver<Line>) {
        while let Some(first) = queued.recv().await {
            let mut bytes = first.text.len();
            let mut lines = vec![first];
            let due = tokio::time::sleep(EVERY);
            tokio::pin!(due);
            while bytes < PART_BYTES {
                tokio::select! {
                    line = queued.recv() => {
                        let Some(line) = line else { break };
                        bytes += line.text.len();
                        lines.push(line);
                    }
                    () = &mut due => break,
                }
            }
            self.write(lines).await;
        }
    }

    async fn write(&mut self, mut lines: Vec<Line>) {
        let left_out = self.left_out.swap(0, Ordering::Relaxed);
        if left_out > 0 {
            let at_ms = lines.last().map_or(0, |line| line.at_ms);
            lines.push(Line {
                at_ms,
                text: format!("({left_out} lines were left out: the store took them too slowly)"),
            });
        }
        let body = logs::to_bytes(&lines);
        let key = layout::log_part(&self.folder, self.next);
        self.next += 1;
        let len = body.len();
        if let Err(error) = self.store.put(&key, body).await {
            // Told of with the next part that can be written.
            let lost = left_out + lines.len() as u64;
            self.left_out.fetch_add(lost, Ordering::Relaxed);
            tracing::warn!(%error, lost, "output of the engine could not be kept with the run");
            return;
        }
        self.kept.push_back((key, len));
        self.kept_bytes += len;
        self.drop_the_oldest().await;
    }

    async fn drop_the_oldest(&mut self) {
        while self.kept_bytes > KEPT_BYTES || self.kept.len() > KEPT_PARTS {
            let Some((key, len)) = self.kept.pop_front() else {
                return;
            };
            self.kept_bytes -= len;
            if let Err(error) = self.store.delete(&key).await {
                tracing::debug!(%error, "an old part of the engine's output could not be removed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use distillery_common::ids::Incarnation;

    fn folder() -> Prefix {
        layout::engine_log("w", Incarnation(1), 1)
    }

    async fn kept(store: &Store) -> Vec<String> {
        let mut texts = Vec::new();
        for entry in store.list(&layout::logs()).await.expect("listed") {
            let bytes = store.get(&entry.key).await.expect("there");
            texts.extend(logs::from_bytes(&bytes).into_iter().map(|line| line.text));
        }
        texts
    }

    #[tokio::test]
    async fn the_last_lines_are_kept_before_the_end() {
        let store = Store::in_memory();
        let (keeper, end) = Keeper::new();
        let intake = keeper.keep(store.clone(), folder());
        intake.push("one");
        intake.push("two");
        drop((intake, keeper));
        end.within(Duration::from_secs(60)).await;
        assert_eq!(kept(&store).await, ["one", "two"]);
    }

    #[tokio::test]
    async fn an_engine_never_waits_and_what_was_left_out_is_counted() {
        let store = Store::in_memory();
        let (keeper, end) = Keeper::new();
        let intake = keeper.keep(store.clone(), folder());
        // The task has not run yet, as if the store were slow.
        for n in 0..QUEUE + 10 {
            intake.push(&n.to_string());
        }
        drop((intake, keeper));
        end.within(Duration::from_secs(60)).await;
        let kept = kept(&store).await;
        assert_eq!(kept.len(), QUEUE + 1);
        assert!(
            kept.iter()
                .any(|line| line.starts_with("(10 lines were left out"))
        );
    }

    #[tokio::test]
    async fn the_oldest_parts_go_first() {
        let store = Store::in_memory();
        let (keeper, end) = Keeper::new();
        let intake = keeper.keep(store.clone(), folder());
        let line = "x".repeat(PART_BYTES);
        let parts = KEPT_BYTES / PART_BYTES + 20;
        for _ in 0..parts {
            while intake.lines.capacity() < QUEUE / 2 {
                tokio::task::yield_now().await;
            }
            intake.push(&line);
        }
        drop((intake, keeper));
        end.within(Duration::from_secs(60)).await;
        let entries = store.list(&layout::logs()).await.expect("listed");
        let bytes: u64 = entries.iter().map(|entry| entry.len).sum();
        assert!(bytes <= KEPT_BYTES as u64 && bytes > (KEPT_BYTES - 2 * PART_BYTES) as u64);
        let last = entries.last().and_then(|e| layout::parse_log_part(&e.key));
        assert_eq!(last.map(|(.., seq)| seq), Some(parts as u64 - 1));
    }
}
