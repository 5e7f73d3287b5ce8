//! The sum along the fixed tree: nodes travel up the chain of ranks, the finished sum travels round the ring.
//!
//! ```text
//! nodes   0 ─▶ 1 ─▶ … ─▶ W-1            each rank merges its own nodes with those that come, in the order of the tree
//! sum     W-1 ─▶ 0 ─▶ 1 ─▶ … ─▶ W-2
//! ```
//!
//! Both go piece by piece and at the same time; a byte before each piece says which it is. A cut between two ranks is
//! crossed by one node for each binary digit 1 of the number of leaves before it. Where that number is a power of two
//! for half of the ranks and the sum of two for the rest, as for W = 4, no link carries more than 2N, as in any ring.
//!
//! No rank can be stuck: a piece of the sum lands in the result and needs no room, so that the last rank is always heard
//! and always goes on taking nodes, and with it every rank before it.

use std::ops::Range;

use super::pump::{PIECE, Traffic};
use super::rounds::add;
use super::tree::{Merge, Merging, Node, cover};
use super::{Error, bytes_of, bytes_of_mut, leaves_of};

/// First byte of a piece of nodes.
const NODES: u8 = b'n';
/// First byte of a piece of the sum.
const SUM: u8 = b's';

/// One operation, as a rank sees it.
#[derive(Debug)]
pub(super) struct Chain<'a> {
    plan: Plan,
    /// Values of one piece.
    piece: usize,
    own: Vec<&'a mut [f32]>,
    out: &'a mut [f32],
    /// The nodes of a piece that came, one after the other.
    came: &'a mut [f32],
    /// Pieces of nodes that were taken, merged and given.
    nodes: Progress,
    /// Pieces of the sum.
    sum: Progress,
    reading: Reading,
    writing: Writing,
}

/// What a rank does with every piece; the same for all of them.
#[derive(Debug)]
struct Plan {
    /// Nodes that come from the previous rank.
    incoming: usize,
    /// Additions; operands are numbered through those that come and this rank's own.
    merges: Vec<Merge>,
    /// Operands that go to the next rank; none on the last.
    outgoing: Vec<usize>,
    /// Operand that is the whole sum; on the last rank only.
    whole: Option<usize>,
    /// Whether the next rank hears the sum from here.
    gives_sum: bool,
}

/// Pieces that are here, and that went on.
#[derive(Debug, Default)]
struct Progress {
    here: usize,
    gone: usize,
}

/// What the next byte of the previous rank belongs to.
#[derive(Debug)]
enum Reading {
    /// The byte that says what follows.
    Kind([u8; 1]),
    /// Nodes, with so many bytes of them here.
    Nodes(usize),
    /// The sum.
    Sum(usize),
}

/// What the next byte to the next rank belongs to.
#[derive(Debug)]
enum Writing {
    /// Nothing is begun.
    Idle,
    /// The byte that says what follows.
    Kind([u8; 1]),
    /// An operand of the nodes, with so many bytes of it gone.
    Node { index: usize, bytes: usize },
    /// The sum.
    Sum(usize),
}

impl Plan {
    fn new(rank: u32, world: u32, leaves: u32, own: &[Node]) -> Self {
        let before = leaves_of(leaves, rank, world).start;
        let came = cover(0..before);
        let mut merging = Merging::default();
        for (place, &node) in came.iter().chain(own).enumerate() {
            merging.push(node, place);
        }
        let is_last = rank + 1 == world;
        let whole = is_last.then(|| merging.fold(leaves));
        let outgoing = if is_last {
            Vec::new()
        } else {
            merging.pending().collect()
        };
        Self {
            incoming: came.len(),
            merges: merging.merges,
            outgoing,
            whole,
            gives_sum: rank + 2 != world,
        }
    }
}

impl<'a> Chain<'a> {
    pub(super) fn new(
        rank: u32,
        world: u32,
        leaves: u32,
        own: Vec<(Node, &'a mut [f32])>,
        out: &'a mut [f32],
        scratch: &'a mut Vec<f32>,
    ) -> Self {
        let (named, own): (Vec<Node>, Vec<_>) = own.into_iter().unzip();
        let plan = Plan::new(rank, world, leaves, &named);
        let piece = PIECE / 4;
        let room = piece * plan.incoming;
        scratch.resize(scratch.len().max(room), 0.0);
        Self {
            plan,
            piece,
            own,
            out,
            came: &mut scratch[..room],
            nodes: Progress::default(),
            sum: Progress::default(),
            reading: Reading::Kind([0]),
            writing: Writing::Idle,
        }
    }

    fn pieces(&self) -> usize {
        self.out.len().div_ceil(self.piece)
    }

    fn range(&self, piece: usize) -> Range<usize> {
        let start = piece * self.piece;
        start..(start + self.piece).min(self.out.len())
    }

    fn takes_nodes(&self) -> bool {
        self.plan.incoming > 0
    }

    fn takes_sum(&self) -> bool {
        self.plan.whole.is_none()
    }

    /// Merges the nodes of the piece that is here.
    fn merge(&mut self) {
        let range = self.range(self.nodes.here);
        let (len, incoming) = (range.len(), self.plan.incoming);
        for &Merge { left, right } in &self.plan.merges {
            if right < incoming {
                let (before, after) = self.came.split_at_mut(right * len);
                add(&mut before[left * len..][..len], &after[..len]);
            } else if left < incoming {
                let right = &self.own[right - incoming][range.clone()];
                add(&mut self.came[left * len..][..len], right);
            } else {
                let (before, after) = self.own.split_at_mut(right - incoming);
                add(
                    &mut before[left - incoming][range.clone()],
                    &after[0][range.clone()],
                );
            }
        }
        self.nodes.here += 1;
        if let Some(whole) = self.plan.whole {
            let sum = operand(&self.own, self.came, incoming, whole, &range);
            self.out[range].copy_from_slice(sum);
            self.nodes.gone += 1;
            self.sum.here += 1;
        }
    }

    /// Where nothing comes, the rank itself begins every piece.
    fn begin(&mut self) {
        let has_room = self.nodes.here == self.nodes.gone;
        let has_own = !self.own.is_empty() && !self.takes_nodes();
        if has_own && has_room && self.nodes.here < self.pieces() {
            self.merge();
        }
    }

    /// What to send next, the sum first: others wait for it.
    fn choose(&mut self) {
        if !matches!(self.writing, Writing::Idle) {
            return;
        }
        self.begin();
        if self.plan.gives_sum && self.sum.gone < self.sum.here {
            self.writing = Writing::Kind([SUM]);
        } else if self.nodes.gone < self.nodes.here {
            self.writing = Writing::Kind([NODES]);
        }
    }
}

/// Operand `at` of a piece.
fn operand<'b>(
    own: &'b [&mut [f32]],
    came: &'b [f32],
    incoming: usize,
    at: usize,
    range: &Range<usize>,
) -> &'b [f32] {
    if at < incoming {
        &came[at * range.len()..][..range.len()]
    } else {
        &own[at - incoming][range.clone()]
    }
}

impl Traffic for Chain<'_> {
    fn outgoing(&mut self) -> &[u8] {
        self.choose();
        match &self.writing {
            Writing::Idle => &[],
            Writing::Kind(kind) => kind,
            Writing::Node { index, bytes } => {
                let range = self.range(self.nodes.gone);
                let at = self.plan.outgoing[*index];
                let node = operand(&self.own, self.came, self.plan.incoming, at, &range);
                &bytes_of(node)[*bytes..]
            }
            Writing::Sum(bytes) => &bytes_of(&self.out[self.range(self.sum.gone)])[*bytes..],
        }
    }

    fn sent(&mut self, sent: usize) {
        self.writing = match self.writing {
            Writing::Idle => Writing::Idle,
            Writing::Kind([SUM]) => Writing::Sum(0),
            Writing::Kind(_) => Writing::Node { index: 0, bytes: 0 },
            Writing::Node { index, bytes } => {
                let len = 4 * self.range(self.nodes.gone).len();
                if bytes + sent < len {
                    let bytes = bytes + sent;
                    Writing::Node { index, bytes }
                } else if index + 1 < self.plan.outgoing.len() {
                    let index = index + 1;
                    Writing::Node { index, bytes: 0 }
                } else {
                    self.nodes.gone += 1;
                    Writing::Idle
                }
            }
            Writing::Sum(bytes) => {
                if bytes + sent < 4 * self.range(self.sum.gone).len() {
                    Writing::Sum(bytes + sent)
                } else {
                    self.sum.gone += 1;
                    Writing::Idle
                }
            }
        };
    }

    fn incoming(&mut self) -> &mut [u8] {
        let pieces = self.pieces();
        let awaits_nodes = self.takes_nodes() && self.nodes.here < pieces;
        let awaits_sum = self.takes_sum() && self.sum.here < pieces;
        let (node, sum) = (self.range(self.nodes.here), self.range(self.sum.here));
        match &mut self.reading {
            Reading::Kind(kind) if awaits_nodes || awaits_sum => kind,
            Reading::Kind(_) => &mut [],
            // The nodes before them still wait to be sent.
            Reading::Nodes(_) if self.nodes.gone < self.nodes.here => &mut [],
            Reading::Nodes(bytes) => {
                let len = node.len() * self.plan.incoming;
                &mut bytes_of_mut(&mut self.came[..len])[*bytes..]
            }
            Reading::Sum(bytes) => &mut bytes_of_mut(&mut self.out[sum])[*bytes..],
        }
    }

    fn received(&mut self, came: usize) -> Result<(), Error> {
        let pieces = self.pieces();
        self.reading = match self.reading {
            Reading::Kind([NODES]) if self.takes_nodes() && self.nodes.here < pieces => {
                Reading::Nodes(0)
            }
            Reading::Kind([SUM]) if self.takes_sum() && self.sum.here < pieces => Reading::Sum(0),
            Reading::Kind([kind]) => {
                return Err(Error::Setup {
                    reason: format!(
                        "the previous rank sent a piece of kind {kind} that nobody awaits"
                    ),
                });
            }
            Reading::Nodes(bytes) => {
                let len = 4 * self.range(self.nodes.here).len() * self.plan.incoming;
                if bytes + came < len {
                    Reading::Nodes(bytes + came)
                } else {
                    self.merge();
                    Reading::Kind([0])
                }
            }
            Reading::Sum(bytes) => {
                if bytes + came < 4 * self.range(self.sum.here).len() {
                    Reading::Sum(bytes + came)
                } else {
                    self.sum.here += 1;
                    Reading::Kind([0])
                }
            }
        };
        Ok(())
    }
}
