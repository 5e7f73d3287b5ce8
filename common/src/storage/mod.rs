//! Objects of a run in any supported store.

pub mod layout;
