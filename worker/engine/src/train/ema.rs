//! The exponential moving average of the masters.

use tch::Tensor;

/// `ema = decay ema + (1 - decay) masters` after every applied step.
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    /// The average `[len]`, f32.
    pub(super) average: Tensor,
}

impl Ema {
    /// Starts at `masters` `[len]`.
    pub fn new(decay: f64, masters: &Tensor) -> Self {
        Self {
            decay,
            average: masters.copy(),
        }
    }

    /// Takes in the masters after a step.
    pub fn update(&mut self, masters: &Tensor) {
        tch::no_grad(|| {
            let _ = self.average.lerp_(masters, 1.0 - self.decay);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From 0 towards a constant 1 the average is 1 - decay^k after k steps.
    #[test]
    fn an_average_approaches_a_constant_geometrically() {
        let mut ema = Ema::new(0.9, &Tensor::from_slice(&[0.0f32]));
        for _ in 0..7 {
            ema.update(&Tensor::from_slice(&[1.0f32]));
        }
        assert!((ema.average.double_value(&[0]) - (1.0 - 0.9f64.powi(7))).abs() < 1e-6);
    }
}
