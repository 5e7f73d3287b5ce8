//! Trajectories and checkpoints come back as they were written, or not at all.

mod damage;
mod fixture;
mod sharded;
mod trajectories;
