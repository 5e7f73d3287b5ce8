//! How the engines of a group add up their gradients.
//!
//! One trait, three ways: [`solo`] for a group of one, [`tcp`] for hosts without NCCL, [`nccl`] for NVIDIA
//! devices. Must never know what is being summed, nor who formed the group.

pub mod nccl;
#[expect(
    unsafe_code,
    reason = "law L9: the one place of the group's code that calls foreign functions"
)]
mod nccl_sys;
pub mod solo;
pub mod tcp;

use std::sync::Arc;

use tch::Tensor;

/// How a group breaks. After any of these the group is of no more use: a new generation forms.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A neighbour went away.
    #[error("rank {rank} lost its connection to rank {peer}")]
    PeerLost {
        /// Who noticed.
        rank: u32,
        /// Who is gone.
        peer: u32,
        /// What the connection said.
        #[source]
        source: std::io::Error,
    },
    /// A neighbour said nothing for too long.
    #[error("rank {rank} heard nothing from rank {peer} within the deadline")]
    Timeout {
        /// Who noticed.
        rank: u32,
        /// Who is silent.
        peer: u32,
    },
    /// Somebody here called for an end.
    #[error("the group was aborted")]
    Aborted,
    /// The ranks are not doing the same.
    #[error("rank {rank} is in {ours}, rank {peer} in {theirs}")]
    OutOfStep {
        /// Who noticed.
        rank: u32,
        /// Whose message it was.
        peer: u32,
        /// What is done here.
        ours: String,
        /// What is done there.
        theirs: String,
    },
    /// Compared values differ.
    #[error("rank {rank} and rank {peer} hold different state")]
    Disagree {
        /// Who noticed.
        rank: u32,
        /// Who differs.
        peer: u32,
    },
    /// The group could not form.
    #[error("the group could not form: {reason}")]
    Setup {
        /// Who is missing or who came instead.
        reason: String,
    },
    /// NCCL is not on this machine.
    #[error(
        "no usable NCCL library: tried {tried}; install NCCL 2, or name the file in DISTILLERY_NCCL"
    )]
    NcclNotFound {
        /// Names and what the loader said of them.
        tried: String,
    },
    /// NCCL refused.
    #[error("NCCL {call} failed: {message}")]
    Nccl {
        /// Which call.
        call: &'static str,
        /// In NCCL's words.
        message: String,
    },
}

/// The engines that train one stage together, as one of them sees it.
pub trait Collective {
    /// This engine's position, `0..world`.
    fn rank(&self) -> u32;

    /// Number of engines.
    fn world(&self) -> u32;

    /// Replaces `flat` (contiguous f32, of one length everywhere) by its sum over the ranks: the same bits on
    /// all of them, and the same bits again for the same inputs and world size.
    fn all_reduce_sum(&mut self, flat: &mut Tensor) -> Result<(), Error>;

    /// Replaces `flat` (contiguous f32, of one length everywhere) by that of rank `root`.
    fn broadcast(&mut self, flat: &mut Tensor, root: u32) -> Result<(), Error>;

    /// A short text of every rank, in rank order; all of one length.
    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        // Everybody adds zeros to everybody else's: sums of one byte and zeros are exact.
        let (at, len) = (self.rank() as usize * own.len(), own.len());
        let mut all = vec![0f32; len * self.world() as usize];
        for (to, &byte) in all[at..at + len].iter_mut().zip(own) {
            *to = f32::from(byte);
        }
        let mut flat = Tensor::from_slice(&all);
        self.all_reduce_sum(&mut flat)?;
        let all = Vec::<f32>::try_from(flat).unwrap_or_default();
        let rows = all.chunks(len.max(1));
        Ok(rows
            .map(|row| row.iter().map(|&x| x as u8).collect())
            .collect())
    }

    /// Waits for every rank and fails unless all of them brought the same digest.
    fn agree(&mut self, digest: &[u8; 32]) -> Result<(), Error>;

    /// What another thread ends the group with.
    fn aborter(&self) -> Arc<dyn Abort>;
}

/// Ends a group from another thread.
pub trait Abort: Send + Sync {
    /// Makes the call in progress and every later one fail. May be called again.
    fn abort(&self);
}

#[cfg(test)]
mod tests;
