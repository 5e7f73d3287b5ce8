//! The coordinator's mind: what happens next, given what happened. See `README.md` for the drawing.
//!
//! Pure: must never know a clock, a network, storage, randomness or a log. Time comes in as the duration since the
//! coordinator started; effects go out as [`Action`]s.

mod action;
mod assign;
mod checkpoint;
mod decision;
mod durable;
mod event;
mod failed_task;
mod fleet;
mod grant;
mod group;
mod group_report;
mod invariants;
mod machine;
mod record;
mod request;
mod run;
mod stage;
mod task;
mod view;

pub use action::{Action, ToWorker};
pub use decision::{Decision, Weight, Why};
pub use durable::{Checkpoint, Durable, Formed, StageLog};
pub use event::{ConnectionId, Event, Finding, FromWorker, Hello, Trouble};
pub use invariants::Violation;
pub use machine::{Machine, Timings};
pub use record::Record;
pub use run::Outcome;
pub use view::{StageView, View, WorkerView};
