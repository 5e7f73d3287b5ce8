//! Who starts workers: this coordinator on its own host, or somebody else.
//!
//! Must never know what workers do.

pub mod local;
