//! Wire types and their converters.
//!
//! Messages that only say "this happened" are read where the stream is served; every noun inside them passes
//! through [`to_wire`] and [`from_wire`]. These modules must never decide anything.

pub mod engine_link;
pub mod framing;
pub mod from_wire;
pub mod to_wire;

/// The version of the protocol that both sides must speak.
pub const PROTOCOL_VERSION: u32 = 1;

/// Largest message that either side of the session accepts, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Generated from `proto/distill/v1`. Stops at the converters.
#[expect(
    missing_docs,
    clippy::all,
    clippy::allow_attributes,
    reason = "generated; documented in the .proto files"
)]
pub mod wire {
    tonic::include_proto!("distill.v1");
}
