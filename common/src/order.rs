//! Keyed orders: a permutation of `0..n` that anyone can ask for one position of.
//!
//! Training order and the assignment of prompts are pure functions of (key, position), so nothing about them
//! is stored but the position. This module must never know what is being ordered.

/// The element at `position` of the permutation of `0..n` that `key` names.
///
/// A Feistel network over the smallest even number of bits that holds `n`, walked until the result is below
/// `n` (cycle walking, Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). A network over
/// at most `4 n` values makes the walk four rounds long on average. It is a bijection for every `n` and `key`;
/// it spreads, it does not encrypt.
///
/// # Panics
///
/// When `position` is not below `n`.
pub fn permute(n: u64, key: u64, position: u64) -> u64 {
    assert!(
        position < n,
        "position {position} is outside an order of {n}"
    );
    let bits = (u64::BITS - (n - 1).leading_zeros()).max(2);
    let half_bits = bits.div_ceil(2);
    let mut value = position;
    loop {
        value = feistel(half_bits, key, value);
        if value < n {
            return value;
        }
    }
}

/// The key of pass `pass` over a list, from the key of the list: neighbouring passes share nothing.
pub fn pass_key(key: u64, pass: u64) -> u64 {
    mix(mix(key).wrapping_add(pass))
}

/// Rounds of the network; four already pass for a random permutation, the rest is margin for tiny halves.
const ROUNDS: u64 = 8;

/// One pass of a balanced Feistel network over `2 * half_bits` bits: a bijection whatever the round function.
fn feistel(half_bits: u32, key: u64, value: u64) -> u64 {
    let mask = (1u64 << half_bits) - 1;
    let (mut left, mut right) = (value >> half_bits, value & mask);
    for round in 0..ROUNDS {
        let scrambled = mix(mix(key ^ round).wrapping_add(right));
        (left, right) = (right, left ^ (scrambled & mask));
    }
    left << half_bits | right
}

/// The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), with its increment.
pub(crate) fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_element_comes_exactly_once() {
        for n in (1..=130).chain([255, 256, 257, 999, 1000, 4095, 4097]) {
            for key in [0, 1, 42, u64::MAX] {
                let seen: BTreeSet<u64> = (0..n).map(|p| permute(n, key, p)).collect();
                assert_eq!(seen.len() as u64, n, "n {n} key {key}");
                assert_eq!(seen.last(), Some(&(n - 1)));
            }
        }
    }

    #[test]
    fn the_largest_orders_answer_too() {
        for n in [u64::MAX, u64::MAX - 1, 1 << 63, (1 << 63) + 1] {
            assert!(permute(n, 7, n - 1) < n);
        }
    }

    /// Fixed points of a random permutation are Poisson with mean 1, and each position is uniform over keys.
    #[test]
    fn orders_of_different_keys_look_unrelated() {
        let keys = 2_000;
        let n = 60;
        let fixed: u64 = (0..keys)
            .map(|key| (0..n).filter(|&p| permute(n, key, p) == p).count() as u64)
            .sum();
        let mean = fixed as f64 / keys as f64;
        assert!((mean - 1.0).abs() < 5.0 / (keys as f64).sqrt(), "{mean}");

        let mut hits = vec![0u32; n as usize];
        (0..keys * 3).for_each(|key| hits[permute(n, key, 17) as usize] += 1);
        assert!(hits.iter().all(|&h| (50..=150).contains(&h)), "{hits:?}");
    }

    #[test]
    fn passes_over_a_list_differ() {
        let order = |pass| {
            (0..40)
                .map(|p| permute(40, pass_key(9, pass), p))
                .collect::<Vec<_>>()
        };
        assert_ne!(order(0), order(1));
        assert_eq!(order(3), order(3));
    }

    /// Stored rows depend on these values: they may never change.
    #[test]
    fn the_order_is_pinned() {
        let first: Vec<u64> = (0..10).map(|p| permute(10, 42, p)).collect();
        assert_eq!(first, PINNED);
    }

    /// From a second implementation, written in Python.
    const PINNED: [u64; 10] = [8, 5, 0, 2, 9, 4, 3, 6, 7, 1];
}
