//! What coordinator, worker and engine share.
//!
//! Reading order: the nouns first, then what is read from the user (`recipe`, `prompts`), what is stored
//! (`storage`, `latents`, `checkpoint`), and last the wire. This crate must never know libtorch, a scheduler
//! decision or a command line.

pub mod backoff;
pub mod checkpoint;
pub mod commit;
pub mod cryptography;
pub mod curves;
pub mod figures;
pub mod footprint;
pub mod group;
pub mod ids;
pub mod latents;
pub mod ledger;
pub mod logs;
pub mod once;
pub mod order;
pub mod prompts;
pub mod proto;
pub mod recipe;
pub mod run;
pub mod security;
pub mod seed;
pub mod storage;
pub mod task;
pub mod teacher;
pub mod telemetry;
