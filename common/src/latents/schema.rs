//! What a row of a trajectory file is (data-plane.md §3).

/// Version of the row format; part of every dataset's digest.
pub const FORMAT_VERSION: u32 = 1;
