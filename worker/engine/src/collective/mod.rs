//! How the engines of a group add up their gradients.
//!
//! One trait, three ways: [`solo`] for a group of one, [`tcp`] for hosts without NCCL, [`nccl`] for NVIDIA
//! devices; [`seat`] chooses between them. [`tree`] is the order of sums that have the same bits for every world
//! size. Must never know what is being summed, nor who formed the group.

pub mod nccl;
#[expect(
    unsafe_code,
    reason = "law L9: the one place of the group's code that calls foreign functions"
)]
mod nccl_sys;
pub mod seat;
pub mod solo;
pub mod tcp;
pub mod tree;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use distillery_common::group::GroupId;
pub use distillery_common::group::leaves_of;
use tch::{Kind, Tensor};

use self::tree::{Partial, cover};

/// Longest text of [`Collective::gather`], in bytes.
pub const LONGEST_TEXT: usize = 64 * 1024;

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
        "no usable NCCL library: tried {tried}; install NCCL 2.14 or newer, or name the file in DISTILLERY_NCCL"
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
        /// What that means for the group.
        fault: NcclFault,
        /// In NCCL's words.
        message: String,
    },
}

/// Why NCCL gave up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NcclFault {
    /// A peer, or the way to it, is gone.
    PeerLost,
    /// Nothing came of it within the deadline.
    Timeout,
    /// Anything else: its words say what.
    Refused,
}

/// Who is to form a group, as one member is told.
#[derive(Debug, Clone)]
pub struct Invitation<'a> {
    /// Which group and generation.
    pub group: &'a GroupId,
    /// This member's position.
    pub rank: u32,
    /// What each rank said of itself ([`seat::Seat::open`]), in rank order; for a ring alone, where each listens
    /// (`host:port`).
    pub peers: &'a [String],
    /// A secret of the run that every member knows; strangers do not.
    pub token: [u8; 32],
    /// How long to wait for a neighbour, now and in every later operation.
    pub deadline: std::time::Duration,
    /// Ends the wait for the others early: there is nothing yet that [`Abort`] could end.
    pub ended: Ended,
}

/// Whether a group was ended from outside, as every thread sees it at once.
#[derive(Debug, Clone, Default)]
pub struct Ended(Arc<AtomicBool>);

impl Ended {
    /// Marks it.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it is marked.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// The engines that train one stage together, as one of them sees it.
///
/// All ranks call the same operations in the same order. After an error the group is of no more use, and what the
/// operation was to write holds no meaning.
pub trait Collective {
    /// This engine's position, `0..world`.
    fn rank(&self) -> u32;

    /// Number of engines.
    fn world(&self) -> u32;

    /// Replaces `flat` (contiguous f32, of one length everywhere) by its sum over the ranks: the same bits on
    /// all of them, and the same bits again for the same inputs and `parts`. NCCL also sums bf16 and f16.
    ///
    /// # Panics
    ///
    /// When `parts` are not those of a buffer of this length and a group of this size; so in the operations below.
    fn all_reduce_sum_in(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error>;

    /// The same in parts of one size.
    fn all_reduce_sum(&mut self, flat: &mut Tensor) -> Result<(), Error> {
        let parts = Parts::even(flat.numel(), self.world());
        self.all_reduce_sum_in(flat, &parts)
    }

    /// Replaces `out` (contiguous f32, `[len]`) by the sum over `virtual_ranks` leaves along the tree of [`tree`]: the
    /// same bits for every world size. `partial` are the nodes of this rank's leaves, which are those of
    /// [`leaves_of`]; a rank without leaves brings none.
    ///
    /// # Panics
    ///
    /// When `partial` is not what [`tree::Partials`] makes of this rank's leaves, or of another length than `out`.
    fn all_reduce_fixed(
        &mut self,
        partial: Vec<Partial>,
        virtual_ranks: u32,
        out: &mut Tensor,
    ) -> Result<(), Error>;

    /// Sums as [`Self::all_reduce_sum_in`], but only this rank's part of `flat` is finished; the rest holds no meaning.
    /// Over TCP the bits are those of `all_reduce_sum_in` in the same parts; NCCL chooses how it sums by the operation.
    fn reduce_scatter_sum(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error>;

    /// Replaces every rank's part of `flat` by what that rank holds there.
    fn all_gather(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error>;

    /// Replaces `flat` (contiguous f32, of one length everywhere) by that of rank `root`.
    fn broadcast(&mut self, flat: &mut Tensor, root: u32) -> Result<(), Error>;

    /// A short text of every rank, in rank order: all of one length, at most [`LONGEST_TEXT`] bytes.
    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error>;

    /// Waits for every rank and fails unless all of them brought the same digest.
    fn agree(&mut self, digest: &[u8; 32]) -> Result<(), Error> {
        let digests = self.gather(digest)?;
        match (0..).zip(digests).find(|(_, theirs)| theirs != digest) {
            Some((peer, _)) => Err(Error::Disagree {
                rank: self.rank(),
                peer,
            }),
            None => Ok(()),
        }
    }

    /// What another thread ends the group with.
    fn aborter(&self) -> Arc<dyn Abort>;
}

/// The part of a buffer that each rank finishes and gives out: in rank order, without gaps, any of them empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// Where each rank's part ends.
    ends: Vec<usize>,
}

impl Parts {
    /// Of one size for all, the last rank's with the remainder.
    pub fn even(len: usize, world: u32) -> Self {
        let size = len / world as usize;
        let end = |rank| {
            if rank == world {
                len
            } else {
                size * rank as usize
            }
        };
        Self::ending_at((1..=world).map(end).collect())
    }

    /// One part for each of `ends`, in rank order.
    ///
    /// # Panics
    ///
    /// When there is none, or one ends before it begins.
    pub fn ending_at(ends: Vec<usize>) -> Self {
        assert!(!ends.is_empty(), "a group has a rank");
        assert!(ends.is_sorted(), "parts follow each other");
        Self { ends }
    }

    /// The part of `rank`.
    pub fn of(&self, rank: u32) -> Range<usize> {
        let rank = rank as usize;
        let start = rank.checked_sub(1).map_or(0, |before| self.ends[before]);
        start..self.ends[rank]
    }

    /// The same parts of a buffer with `more` values behind it, which are the last rank's.
    pub fn with_tail(&self, more: usize) -> Self {
        let mut ends = self.ends.clone();
        if let Some(last) = ends.last_mut() {
            *last += more;
        }
        Self { ends }
    }

    /// Ranks of the group.
    pub fn world(&self) -> u32 {
        self.ends.len() as u32
    }

    /// Values of the longest part.
    fn longest(&self) -> usize {
        let lengths = (0..self.world()).map(|rank| self.of(rank).len());
        lengths.max().unwrap_or(0)
    }

    /// Whether all have one size.
    fn is_even(&self) -> bool {
        self.longest() * self.ends.len() == self.ends[self.ends.len() - 1]
    }

    /// A number that other parts hardly have: ranks that cut differently find out before a value moves.
    fn name(&self) -> u32 {
        let bytes: Vec<u8> = (self.ends.iter())
            .flat_map(|end| end.to_le_bytes())
            .collect();
        xxhash_rust::xxh3::xxh3_64(&bytes) as u32
    }

    fn check(&self, flat: &Tensor, world: u32) {
        assert_eq!(self.world(), world, "every rank has a part");
        assert_eq!(
            self.of(world - 1).end,
            flat.numel(),
            "parts cover the buffer"
        );
    }
}

/// Checks both sides of [`Collective::all_reduce_fixed`]: what a rank brings is what the others count on.
fn check_partials(partial: &[Partial], leaves: Range<u32>, out: &Tensor) {
    assert!(
        partial.iter().map(Partial::node).eq(cover(leaves)),
        "a rank brings the nodes of its leaves"
    );
    let mut kinds = partial.iter().map(|p| p.values.kind()).chain([out.kind()]);
    assert!(
        kinds.all(|kind| kind == Kind::Float),
        "nodes and their sum are f32"
    );
    let len = out.numel();
    assert!(
        partial.iter().all(|p| p.values.numel() == len),
        "nodes are as long as their sum"
    );
}

fn check_text(own: &[u8]) -> Result<(), Error> {
    if own.len() > LONGEST_TEXT {
        return Err(Error::Setup {
            reason: format!(
                "a text of {} bytes is longer than {LONGEST_TEXT}",
                own.len()
            ),
        });
    }
    Ok(())
}

/// Ends a group from another thread.
pub trait Abort: Send + Sync {
    /// Makes the call in progress and every later one fail. May be called again.
    fn abort(&self);
}

#[cfg(test)]
pub(crate) mod tests;
