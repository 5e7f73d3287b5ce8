//! The worker: one per host, between the coordinator and the engines of the host's devices.
//!
//! Every device has an agent of its own: a registration, leases, and one engine process that the agent starts,
//! watches and, when it hangs, kills. The worker puts every COMMIT, because it alone knows whether a lease still
//! holds. It must never link a tensor library: a wedged device must not stop its beats.

pub mod agent;
pub mod app;
pub mod cli;
pub mod engine_process;
pub mod logs;
pub mod secrets;
