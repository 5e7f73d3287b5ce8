//! The sum along the fixed tree: one definition, any number of ranks, over every way.

use tch::{Device, Kind, Tensor};

use super::{PATIENT, bits, on_ring};
use crate::collective::solo::Solo;
use crate::collective::tree::{Partial, Partials};
use crate::collective::{Collective, leaves_of};

/// The leaf's gradient: many magnitudes, so that every order of additions gives other bits.
pub(super) fn leaf(index: u32, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| {
            let mixed = (i as u32).wrapping_mul(2_654_435_761) ^ index.wrapping_mul(40_503);
            let scale = 10f32.powi((mixed % 7) as i32 - 3);
            (mixed >> 8) as f32 / (1 << 24) as f32 * scale - 0.4 * scale
        })
        .collect()
}

/// The definition, read off the module's words.
fn sum(start: u32, number: u32, len: usize) -> Vec<f32> {
    if number == 1 {
        return leaf(start, len);
    }
    let mut left = 1;
    while 2 * left < number {
        left *= 2;
    }
    let right = sum(start + left, number - left, len);
    let left = sum(start, left, len);
    std::iter::zip(left, right).map(|(a, b)| a + b).collect()
}

/// What a rank makes of its leaves.
pub(super) fn partials(leaves: u32, rank: u32, world: u32, len: usize) -> Vec<Partial> {
    let share = leaves_of(leaves, rank, world);
    let mut partials = Partials::new(share.clone());
    for index in share {
        let values = Tensor::from_slice(&leaf(index, len));
        let buffer = match partials.spare() {
            Some(mut spare) => {
                spare.copy_(&values);
                spare
            }
            None => values,
        };
        partials.push_leaf(index, buffer);
    }
    partials.finish()
}

pub(super) fn reduce(group: &mut dyn Collective, leaves: u32, len: usize) -> Vec<f32> {
    let mut out = Tensor::full([len as i64], 7.0, (Kind::Float, Device::Cpu));
    let own = partials(leaves, group.rank(), group.world(), len);
    group.all_reduce_fixed(own, leaves, &mut out).unwrap();
    Vec::<f32>::try_from(out).unwrap()
}

pub(super) const LEAVES: [u32; 7] = [1, 2, 3, 5, 6, 8, 16];

#[test]
fn the_sum_has_the_same_bits_for_every_number_of_ranks() {
    // None, one, fewer than ranks, uneven, and several pieces with an uneven end.
    let lengths = [0, 1, 5, 1021, 200_003];
    let expected = |leaves, len| bits(&sum(0, leaves, len));
    for world in 1..=6 {
        on_ring(world, PATIENT, |mut ring| {
            for leaves in LEAVES {
                for len in lengths {
                    let got = reduce(&mut ring, leaves, len);
                    let same = bits(&got) == expected(leaves, len);
                    assert!(same, "{leaves} leaves of {len} over {world} ranks");
                }
            }
        });
    }
    for leaves in LEAVES {
        let got = reduce(&mut Solo::default(), leaves, 1021);
        assert_eq!(bits(&got), expected(leaves, 1021), "{leaves} leaves alone");
    }
}

#[test]
fn the_sum_is_the_sum_and_another_order_would_give_other_bits() {
    let len = 1021;
    for leaves in LEAVES {
        let tree = sum(0, leaves, len);
        let addends: Vec<_> = (0..leaves).map(|index| leaf(index, len)).collect();
        let mut in_line = vec![0f32; len];
        for (i, &value) in tree.iter().enumerate() {
            let exact: f64 = addends.iter().map(|leaf| f64::from(leaf[i])).sum();
            let size: f64 = addends.iter().map(|leaf| f64::from(leaf[i].abs())).sum();
            assert!((f64::from(value) - exact).abs() <= 1e-6 * size);
            in_line[i] = addends.iter().map(|leaf| leaf[i]).sum();
        }
        if leaves > 3 {
            // Otherwise the bits would show nothing.
            assert_ne!(bits(&tree), bits(&in_line), "{leaves}");
        }
    }
}

#[test]
fn sums_of_several_kinds_follow_each_other_on_one_ring() {
    on_ring(4, PATIENT, |mut ring| {
        let whole = reduce(&mut ring, 8, 70_001);
        let mut flat = Tensor::from_slice(&leaf(ring.rank(), 999));
        ring.all_reduce_sum(&mut flat).unwrap();
        ring.agree(&[4; 32]).unwrap();
        assert_eq!(bits(&reduce(&mut ring, 8, 70_001)), bits(&whole));
    });
}

/// Longer than what the kernel holds between two ranks: every rank has to wait for the next one, in every state.
#[test]
fn a_fixed_sum_goes_on_when_the_links_are_full() {
    let len = 5_000_001;
    let expected = |i: i64| {
        (0..8)
            .map(|leaf| f64::from(leaf * 31 + i as i32 % 1000))
            .sum::<f64>()
    };
    on_ring(4, PATIENT, |mut ring| {
        let places = Tensor::arange(len, (Kind::Int64, Device::Cpu)).remainder(1000);
        let share = leaves_of(8, ring.rank(), 4);
        let mut partials = Partials::new(share.clone());
        for index in share {
            let leaf = (places.shallow_clone() + i64::from(index) * 31).to_kind(Kind::Float);
            partials.push_leaf(index, leaf);
        }
        let mut out = Tensor::zeros([len], (Kind::Float, Device::Cpu));
        ring.all_reduce_fixed(partials.finish(), 8, &mut out)
            .unwrap();
        for i in [0, 1, 999_999, 2_500_000, len - 1] {
            assert_eq!(out.double_value(&[i]), expected(i));
        }
        let whole = (places * 8 + 28 * 31).to_kind(Kind::Float);
        assert_eq!(out, whole);
    });
}

#[test]
fn ranks_that_count_other_leaves_find_out() {
    let errors = on_ring(2, PATIENT, |mut ring| {
        let leaves = 4 + 4 * ring.rank();
        let mut out = Tensor::zeros([9], (Kind::Float, Device::Cpu));
        let own = partials(leaves, ring.rank(), 2, 9);
        ring.all_reduce_fixed(own, leaves, &mut out)
            .unwrap_err()
            .to_string()
    });
    let told = |error: &String| error.contains("over 4 leaves") && error.contains("over 8 leaves");
    assert!(errors.iter().any(told), "{errors:?}");
}

#[test]
fn a_rank_that_dies_in_a_fixed_sum_is_noticed_by_all() {
    let errors = on_ring(4, PATIENT, |mut ring| {
        if ring.rank() == 2 {
            return None;
        }
        let mut out = Tensor::zeros([1_000_000], (Kind::Float, Device::Cpu));
        let own = partials(8, ring.rank(), 4, 1_000_000);
        Some(ring.all_reduce_fixed(own, 8, &mut out).unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        let lost = matches!(error, crate::collective::Error::PeerLost { .. });
        assert!(lost, "{error}");
    }
}
