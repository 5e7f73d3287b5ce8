//! Types of values, by NCCL's numbers, and their sums in rank order.

use half::{bf16, f16};

/// Bytes of a value of `kind`, if it is known here.
pub(crate) fn size(kind: i32) -> Option<usize> {
    match kind {
        1 => Some(1),
        6 | 9 => Some(2),
        7 => Some(4),
        _ => None,
    }
}

/// `sum += addend`, value by value; both hold values of `kind`. Half types are rounded after every addition.
pub(crate) fn add(kind: i32, sum: &mut [u8], addend: &[u8]) {
    match kind {
        6 => by(sum, addend, |a, b| {
            (f16::from_le_bytes(a) + f16::from_le_bytes(b)).to_le_bytes()
        }),
        7 => by(sum, addend, |a, b| {
            (f32::from_le_bytes(a) + f32::from_le_bytes(b)).to_le_bytes()
        }),
        9 => by(sum, addend, |a, b| {
            (bf16::from_le_bytes(a) + bf16::from_le_bytes(b)).to_le_bytes()
        }),
        _ => by(sum, addend, |[a]: [u8; 1], [b]| [a.wrapping_add(b)]),
    }
}

fn by<const N: usize>(sum: &mut [u8], addend: &[u8], add: impl Fn([u8; N], [u8; N]) -> [u8; N]) {
    let (sums, _) = sum.as_chunks_mut::<N>();
    let (addends, _) = addend.as_chunks::<N>();
    for (sum, addend) in sums.iter_mut().zip(addends) {
        *sum = add(*sum, *addend);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_every_kind_are_added() {
        let mut sum = [1.5f32.to_le_bytes(), 2.0f32.to_le_bytes()].concat();
        add(
            7,
            &mut sum,
            &[0.25f32.to_le_bytes(), 1.0f32.to_le_bytes()].concat(),
        );
        assert_eq!(sum, [1.75f32.to_le_bytes(), 3.0f32.to_le_bytes()].concat());
        let mut sum = f16::from_f32(1.5).to_le_bytes();
        add(6, &mut sum, &f16::from_f32(2.0).to_le_bytes());
        assert_eq!(sum, f16::from_f32(3.5).to_le_bytes());
        let mut sum = bf16::from_f32(256.0).to_le_bytes();
        // One is below the last digit of 256 in bf16.
        add(9, &mut sum, &bf16::from_f32(1.0).to_le_bytes());
        assert_eq!(sum, bf16::from_f32(256.0).to_le_bytes());
        let mut sum = [250];
        add(1, &mut sum, &[10]);
        assert_eq!(sum, [4]);
    }
}
