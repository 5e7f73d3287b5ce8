//! Wire types and their converters.

/// Generated from `proto/distill/v1`. Stops at the converters.
#[expect(
    missing_docs,
    clippy::all,
    reason = "generated; documented in the .proto files"
)]
pub mod wire {
    tonic::include_proto!("distill.v1");
}
