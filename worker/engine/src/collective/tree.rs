//! A sum whose bits depend on the number of addends alone, however they are spread.
//!
//! V leaves, numbered from 0, are added up along one fixed binary tree:
//!
//! ```text
//! sum(a, 1) = leaf a
//! sum(a, n) = sum(a, p) + sum(a + p, n - p),   p the largest power of two below n
//! ```
//!
//! For a power of two this is the balanced tree. Any other V falls into complete trees of falling size, V = 7 into
//! `0..4`, `4..6` and `6..7`, which are folded from the right: `T4 + (T2 + T1)`.
//!
//! A [`Node`] is the sum of a complete, aligned piece of the tree. Whoever holds consecutive leaves can reduce them to
//! the few nodes that [`cover`] names, and nodes of neighbours merge on: no rank needs another's leaves. Must never
//! know where values lie or how they travel.

use std::ops::Range;

use tch::Tensor;

/// A complete piece of the tree: the leaves `start..start + 2^level`, with `start` a multiple of `2^level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Node {
    /// Its first leaf.
    pub start: u32,
    /// How often leaves were paired.
    pub level: u32,
}

impl Node {
    /// The first leaf after it.
    pub fn end(self) -> u32 {
        self.start + (1 << self.level)
    }

    /// The parent, where `self` is its left child and `right` its right one.
    fn with_right(self, right: Self) -> Option<Self> {
        let pairs = self.level == right.level
            && self.end() == right.start
            && self.start.trailing_zeros() > self.level;
        pairs.then_some(Self {
            start: self.start,
            level: self.level + 1,
        })
    }
}

/// The largest complete pieces that `leaves` consist of, from left to right: at most 2 log2 of their number.
pub fn cover(leaves: Range<u32>) -> Vec<Node> {
    let mut nodes = Vec::new();
    let mut start = leaves.start;
    while start < leaves.end {
        let fits = (leaves.end - start).ilog2();
        let level = fits.min(start.trailing_zeros());
        nodes.push(Node { start, level });
        start += 1 << level;
    }
    nodes
}

/// A node with its values.
#[derive(Debug)]
pub struct Partial {
    /// Its first leaf.
    pub start: u32,
    /// How often leaves were paired.
    pub level: u32,
    /// The sum of its leaves: f32, contiguous, of one length everywhere.
    pub values: Tensor,
}

impl Partial {
    /// Which piece of the tree it is.
    pub fn node(&self) -> Node {
        Node {
            start: self.start,
            level: self.level,
        }
    }
}

/// Reduces consecutive leaves as they come, like a counter in binary: where leaves start at 0, no more than
/// log2 of their number and one are held.
#[derive(Debug)]
pub struct Partials {
    next: u32,
    end: u32,
    held: Vec<Partial>,
    spare: Vec<Tensor>,
}

impl Partials {
    /// For the leaves of one rank.
    pub fn new(leaves: Range<u32>) -> Self {
        Self {
            next: leaves.start,
            end: leaves.end,
            held: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// A buffer that a merge has freed, with old values in it, for the next leaf.
    pub fn spare(&mut self) -> Option<Tensor> {
        self.spare.pop()
    }

    /// Takes leaf `index`; `values` is `[len]` f32, contiguous, and belongs to the sum from now on.
    ///
    /// # Panics
    ///
    /// When the leaves do not come in order.
    pub fn push_leaf(&mut self, index: u32, values: Tensor) {
        assert_eq!(index, self.next, "leaves come in order");
        assert!(index < self.end, "leaf {index} belongs to another rank");
        self.next += 1;
        self.held.push(Partial {
            start: index,
            level: 0,
            values,
        });
        while let [.., left, right] = &mut self.held[..]
            && let Some(parent) = left.node().with_right(right.node())
        {
            add(&mut left.values, &right.values);
            left.level = parent.level;
            self.spare.extend(self.held.pop().map(|right| right.values));
        }
    }

    /// The nodes of all leaves, from left to right, as [`cover`] names them.
    ///
    /// # Panics
    ///
    /// When leaves are missing.
    pub fn finish(self) -> Vec<Partial> {
        assert_eq!(self.next, self.end, "every leaf was pushed");
        self.held
    }
}

/// Adds up all leaves from the nodes of one rank that holds them all.
///
/// # Panics
///
/// When `nodes` are not those of the leaves `0..leaves`.
pub fn fold(nodes: Vec<Partial>, leaves: u32) -> Tensor {
    let mut plan = Merging::default();
    for (index, partial) in nodes.iter().enumerate() {
        plan.push(partial.node(), index);
    }
    let result = plan.fold(leaves);
    let mut values: Vec<Tensor> = nodes.into_iter().map(|partial| partial.values).collect();
    for Merge { left, right } in plan.merges {
        let (before, after) = values.split_at_mut(right);
        add(&mut before[left], &after[0]);
    }
    values.swap_remove(result)
}

fn add(left: &mut Tensor, right: &Tensor) {
    let _ = tch::no_grad(|| left.g_add_(right));
}

/// Adds the operand at `right` to the one at `left`, which holds the sum after it; `left < right` always.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Merge {
    pub(super) left: usize,
    pub(super) right: usize,
}

/// Which operands are added in which order; operands are named by their place in some list, in the order of their
/// leaves.
#[derive(Debug, Default)]
pub(super) struct Merging {
    pending: Vec<(Node, usize)>,
    pub(super) merges: Vec<Merge>,
}

impl Merging {
    /// The node that follows all earlier ones, found at `place`.
    pub(super) fn push(&mut self, node: Node, place: usize) {
        let after = self
            .pending
            .last()
            .map_or(node.start, |(last, _)| last.end());
        assert_eq!(node.start, after, "nodes are neighbours");
        self.pending.push((node, place));
        while let [.., (left, into), (right, from)] = self.pending[..]
            && let Some(parent) = left.with_right(right)
        {
            self.merge(into, from);
            self.pending.pop();
            self.pending.pop();
            self.pending.push((parent, into));
        }
    }

    /// Folds what is left of a tree of so many leaves from the right; returns where the sum lies.
    pub(super) fn fold(&mut self, leaves: u32) -> usize {
        let first = self.pending.first().expect("a tree has a leaf").0.start;
        let end = self.pending.last().expect("a tree has a leaf").0.end();
        assert_eq!((first, end), (0, leaves), "the nodes are the whole tree");
        while let [.., (_, into), (_, from)] = self.pending[..] {
            self.merge(into, from);
            self.pending.pop();
        }
        self.pending[0].1
    }

    /// The nodes that wait for what comes after them, with their places.
    pub(super) fn pending(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.pending.iter().map(|&(_, place)| place)
    }

    fn merge(&mut self, left: usize, right: usize) {
        self.merges.push(Merge { left, right });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_falls_into_the_largest_aligned_pieces() {
        let of = |range| {
            let nodes = cover(range);
            nodes
                .into_iter()
                .map(|n| (n.start, n.level))
                .collect::<Vec<_>>()
        };
        assert_eq!(of(0..8), [(0, 3)]);
        assert_eq!(of(0..7), [(0, 2), (4, 1), (6, 0)]);
        assert_eq!(of(1..7), [(1, 0), (2, 1), (4, 1), (6, 0)]);
        assert_eq!(of(3..4), [(3, 0)]);
        assert_eq!(of(5..5), []);
        for start in 0..40 {
            for end in start..40 {
                let nodes = cover(start..end);
                let ends = nodes.iter().map(|n| n.end());
                let starts = nodes.iter().map(|n| n.start).chain([end]);
                assert!(std::iter::once(start).chain(ends).eq(starts));
                assert!(nodes.iter().all(|n| n.start % (1 << n.level) == 0));
                let merged = |pair: &[Node]| pair[0].with_right(pair[1]).is_some();
                assert!(!nodes.windows(2).any(merged), "{start}..{end}");
            }
        }
    }

    #[test]
    fn leaves_that_are_pushed_end_as_the_cover_of_their_range() {
        for (start, end) in [(0, 1), (0, 16), (3, 11), (5, 6), (4, 13)] {
            let mut partials = Partials::new(start..end);
            let mut most = 0;
            for index in start..end {
                partials.push_leaf(index, Tensor::from_slice(&[index as f32]));
                most = most.max(partials.held.len());
            }
            assert_eq!(
                partials.spare.len() + partials.held.len(),
                (end - start) as usize
            );
            let nodes = partials.finish();
            let named: Vec<Node> = nodes.iter().map(Partial::node).collect();
            assert_eq!(named, cover(start..end));
            for node in nodes {
                let sum: u32 = (node.start..node.node().end()).sum();
                assert_eq!(node.values.double_value(&[0]), f64::from(sum));
            }
            if start == 0 {
                assert!(most <= 1 + end.ilog2() as usize + 1, "{most} of {end}");
            }
        }
    }

    #[test]
    fn a_fold_adds_in_the_order_of_the_definition() {
        // Addends that make every order of additions another number.
        let leaf = |a: u32| 0.1f32.powi(a as i32 % 5) + a as f32;
        fn sum(a: u32, n: u32, leaf: &impl Fn(u32) -> f32) -> f32 {
            if n == 1 {
                return leaf(a);
            }
            let p = n.next_power_of_two() / 2;
            sum(a, p, leaf) + sum(a + p, n - p, leaf)
        }
        for leaves in 1..40 {
            let mut partials = Partials::new(0..leaves);
            for index in 0..leaves {
                partials.push_leaf(index, Tensor::from_slice(&[leaf(index)]));
            }
            let folded = fold(partials.finish(), leaves);
            let expected = sum(0, leaves, &leaf);
            assert_eq!(
                f32::try_from(folded.get(0)).unwrap().to_bits(),
                expected.to_bits()
            );
        }
    }

    #[test]
    #[should_panic(expected = "leaves come in order")]
    fn a_leaf_out_of_order_is_refused() {
        Partials::new(0..4).push_leaf(1, Tensor::from_slice(&[0f32]));
    }
}
