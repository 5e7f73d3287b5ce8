//! Teacher trajectories in Parquet: written once, verified, and read at the speed of the disk.
//!
//! `schema` says what a row is, `writer` makes a shard, `manifest` seals a dataset, `reader` reads rows out of
//! it, `loader` reads ahead of the trainer. This module must never know tensors, recipes or the network.

pub mod schema;
