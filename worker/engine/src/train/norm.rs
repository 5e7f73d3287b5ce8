//! The norm of a gradient, and clipping by it: the same bits however the gradient is spread over ranks.
//!
//! The squares of each tensor are added up by themselves, in f64 and in an order that the tensor alone decides; then the
//! sums of all tensors, one after the other. So each rank can do its own tensors, and all add up the same numbers.

use tch::{Device, Kind, Tensor};

use super::flat::Place;
use crate::raw_tensor::f32_ref;

/// Sums that a tensor's squares fall to in turn, so that a processor can add to several at once.
const LANES: usize = 8;
/// Elements whose norm a device takes at a time, since libtorch makes an f64 copy of them: of the adapters of SDXL that
/// would be 1.5 GiB.
const DEVICE_PIECE: usize = 1 << 22;

/// The sum of squares of each of `places`, which lie in `gradient` from its first value on.
pub(super) fn squares(gradient: &Tensor, places: &[Place]) -> Vec<f64> {
    let first = places.first().map_or(0, |place| place.offset);
    let within = |place: &Place| place.offset - first..place.offset - first + place.len;
    match gradient.device() {
        Device::Cpu => {
            let values = f32_ref(gradient);
            let sum = |place: &Place| square_sum(&values[within(place)]);
            places.iter().map(sum).collect()
        }
        Device::Cuda(_) | Device::Mps | Device::Vulkan => {
            on_device(gradient, places.iter().map(within))
        }
    }
}

/// The Euclidean norm of a gradient with these sums of squares, in the order of its tensors.
pub(super) fn norm(squares: &[f64]) -> f64 {
    squares.iter().sum::<f64>().sqrt()
}

/// Scales `gradient`, or a part of one, in place so that the Euclidean norm of the whole, which is `norm`, becomes at most
/// `limit`.
///
/// A norm that is not finite leaves the gradient alone.
pub(super) fn clip(gradient: &mut Tensor, norm: f64, limit: Option<f64>) {
    match limit {
        Some(limit) if norm.is_finite() && norm > limit => {
            tch::no_grad(|| *gradient *= limit / norm);
        }
        Some(_) | None => {}
    }
}

fn square_sum(values: &[f32]) -> f64 {
    let mut sums = [0f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut add = |values: &[f32]| {
        for (sum, &value) in std::iter::zip(&mut sums, values) {
            let value = f64::from(value);
            *sum += value * value;
        }
    };
    chunks.iter().for_each(|chunk| add(chunk));
    add(rest);
    sums.iter().sum()
}

/// Asks the device for all sums at once: it is waited for a single time.
fn on_device(
    gradient: &Tensor,
    places: impl ExactSizeIterator<Item = std::ops::Range<usize>>,
) -> Vec<f64> {
    let mut sums = vec![0.0; places.len()];
    let (mut owners, mut norms) = (Vec::new(), Vec::new());
    for (owner, place) in places.enumerate() {
        for start in place.clone().step_by(DEVICE_PIECE) {
            let len = DEVICE_PIECE.min(place.end - start);
            let piece = gradient.narrow(0, start as i64, len as i64);
            owners.push(owner);
            norms.push(piece.norm_scalaropt_dtype(2.0, Kind::Double));
        }
    }
    if norms.is_empty() {
        return sums;
    }
    let norms = Tensor::stack(&norms, 0).to_device(Device::Cpu);
    let norms = Vec::<f64>::try_from(norms).expect("norms in f64");
    for (owner, norm) in std::iter::zip(owners, norms) {
        sums[owner] += norm * norm;
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::flat::Layout;

    fn layout(sizes: &[i64]) -> Layout {
        let tensors: Vec<(String, Tensor)> = sizes
            .iter()
            .enumerate()
            .map(|(at, &len)| {
                (
                    format!("{at}"),
                    Tensor::zeros([len], (Kind::Float, Device::Cpu)),
                )
            })
            .collect();
        Layout::of(&tensors)
    }

    /// Of 2^22 + 4 ones and threes; 9 * 4 + 2^22 in all.
    #[test]
    fn the_norm_is_that_of_its_tensors() {
        let long = DEVICE_PIECE as i64;
        let ones = Tensor::ones([long], (Kind::Float, Device::Cpu));
        let threes = Tensor::full([4], 3.0, (Kind::Float, Device::Cpu));
        let gradient = Tensor::cat(&[ones, threes], 0);
        let layout = layout(&[3, 0, long - 3, 4]);
        let found = squares(&gradient, layout.places());
        assert_eq!(found, [3.0, 0.0, long as f64 - 3.0, 36.0]);
        assert_eq!(norm(&found), (long as f64 + 36.0).sqrt());
        let within = layout.places().iter().map(Place::range);
        for (a, b) in std::iter::zip(found, on_device(&gradient, within)) {
            assert!((a - b).abs() <= 1e-9 * a, "{a} {b}");
        }
    }

    /// The squares of 1, …, n come to n (n + 1) (2 n + 1) / 6, whole numbers that f64 holds.
    #[test]
    fn squares_of_some_tensors_are_those_of_all() {
        let gradient = Tensor::arange(1001, (Kind::Float, Device::Cpu));
        let layout = layout(&[7, 13, 800, 181]);
        let all = squares(&gradient, layout.places());
        assert_eq!(all.iter().sum::<f64>(), 1000.0 * 1001.0 * 2001.0 / 6.0);
        let uneven = gradient * 0.3;
        let all = squares(&uneven, layout.places());
        let some = squares(&uneven.narrow(0, 7, 813), &layout.places()[1..3]);
        assert_eq!(some, all[1..3]);
        assert_eq!(squares(&uneven, &[]), [0.0; 0]);
    }

    #[test]
    fn clipping_keeps_the_direction() {
        let mut g = Tensor::from_slice(&[3.0f32, 4.0]);
        let norm_of = |g: &Tensor| norm(&squares(g, layout(&[1, 1]).places()));
        assert_eq!(norm_of(&g), 5.0);
        clip(&mut g, 5.0, Some(1.0));
        assert!((g.double_value(&[0]) - 0.6).abs() < 1e-6);
        let norm = norm_of(&g);
        clip(&mut g, norm, Some(2.0));
        assert!((g.double_value(&[1]) - 0.8).abs() < 1e-6);
        let mut bad = Tensor::from_slice(&[f32::NAN, 1.0]);
        assert!(norm_of(&bad).is_nan());
        clip(&mut bad, f64::NAN, Some(1.0));
        assert_eq!(bad.double_value(&[1]), 1.0);
    }
}
