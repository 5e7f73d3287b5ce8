//! What a set of samples is worth: distances, adherence, intervals and pictures. Knows no recipe, storage or wire.

pub mod frechet;
pub mod interval;
pub mod picture;
pub mod scorer;
pub mod tally;
