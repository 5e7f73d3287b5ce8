//! The engine's side of the socket to its worker; shared with the stand-in of the control plane's tests.

pub use distillery_common::proto::engine_link::{
    Command, CommitOutcome, CommitRequest, Committed, Error, Event, Link, Setup,
};
