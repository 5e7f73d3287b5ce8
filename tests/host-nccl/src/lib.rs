//! NCCL's C interface on the memory of the host.
//!
//! The functions of nccl.h that the engine uses, with the same contract: ids that rank 0 makes, a non-blocking start,
//! operations that are in progress until `ncclCommGetAsyncError` says otherwise, peers that vanish, aborts from another
//! thread. Buffers are pointers to memory of the process instead of a device, streams are ignored, and an operation is
//! done when it is no longer in progress; the symbol `distilleryWorksOnHostMemory` says so to whoever asks.
//!
//! Ranks are threads or processes of one host. Making an id starts a hub in that process ([`hub`]); every communicator has a
//! thread that sends its operations there ([`communicator`]).

#[expect(
    unsafe_code,
    reason = "law L9: a C interface reads and writes its caller's memory"
)]
mod abi;
mod communicator;
mod hub;
mod message;
mod values;
