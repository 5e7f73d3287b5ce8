//! AdamW with its state in the open (arXiv 1711.05101, algorithm 2, decoupled decay).

use distillery_common::recipe;
use tch::{Device, Kind, Tensor};

/// Elements updated together on a CPU, so that state and temporaries stay in its cache from one operation to the next.
const CPU_CHUNK: i64 = 1 << 17;
/// The same on a GPU, so that temporaries stay small beside the state and launches few.
const GPU_CHUNK: i64 = 1 << 22;

/// First and second moments of a flat gradient, or of a part of one, and the steps they have seen.
///
/// What becomes of a value depends on its own gradient and moments alone, to the bit: so a rank may hold the moments of some
/// values only, whatever others do.
#[derive(Debug)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    /// First moments `[len]`, f32.
    pub(super) m: Tensor,
    /// Second moments `[len]`, f32.
    pub(super) v: Tensor,
    /// Updates applied so far: the exponent of the bias correction.
    pub(super) applied: u64,
}

impl AdamW {
    /// Fresh moments for `masters` `[len]`.
    pub fn new(settings: &recipe::Optimizer, masters: &Tensor) -> Self {
        Self {
            beta1: settings.betas.0,
            beta2: settings.betas.1,
            epsilon: settings.epsilon,
            weight_decay: settings.weight_decay,
            m: masters.zeros_like(),
            v: masters.zeros_like(),
            applied: 0,
        }
    }

    /// One update of `masters` `[len]` by `gradient` `[len]` at learning rate `rate`:
    ///
    /// `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g²`,
    /// `p = p - rate wd p - rate (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)` for the k-th update.
    pub fn update(&mut self, masters: &mut Tensor, gradient: &Tensor, rate: f64) {
        assert_eq!(
            masters.size(),
            self.m.size(),
            "moments belong to the masters"
        );
        assert_eq!(
            gradient.size(),
            self.m.size(),
            "one gradient for each value"
        );
        assert_eq!(gradient.kind(), Kind::Float, "gradients are f32");
        self.applied += 1;
        let k = self.applied as f64;
        let (correction1, correction2) = (1.0 - self.beta1.powf(k), 1.0 - self.beta2.powf(k));
        let len = gradient.numel() as i64;
        let chunk = match gradient.device() {
            Device::Cpu => CPU_CHUNK,
            Device::Cuda(_) | Device::Mps | Device::Vulkan => GPU_CHUNK,
        };
        tch::no_grad(|| {
            for start in (0..len).step_by(chunk as usize) {
                let part = |x: &Tensor| x.narrow(0, start, chunk.min(len - start));
                let g = part(gradient);
                let (mut p, mut m, mut v) = (part(masters), part(&self.m), part(&self.v));
                let _ = m.lerp_(&g, 1.0 - self.beta1);
                v *= self.beta2;
                v += g.square() * (1.0 - self.beta2);
                p *= 1.0 - rate * self.weight_decay;
                let root = v.sqrt() / correction2.sqrt() + self.epsilon;
                p -= &m / root * (rate / correction1);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn settings(weight_decay: f64) -> recipe::Optimizer {
        recipe::Optimizer {
            lr: 0.1,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay,
            grad_clip: None,
            schedule: recipe::RateSchedule::Constant,
            warmup: 0,
            max_skipped: 1,
            sharded: false,
        }
    }

    /// After one step m / (1 - b1) = g and v / (1 - b2) = g², so every value moves by `rate sign(g)`.
    #[test]
    fn the_first_update_moves_every_value_by_the_rate() {
        let mut p = Tensor::from_slice(&[1.0f32, -2.0, 0.5]);
        let g = Tensor::from_slice(&[0.3f32, -40.0, 1e-3]);
        AdamW::new(&settings(0.0), &p).update(&mut p, &g, 0.1);
        let expected = Tensor::from_slice(&[0.9f32, -1.9, 0.4]);
        assert!((p - expected).abs().max().double_value(&[]) < 2e-6);
    }

    /// Under a constant gradient m and v stay bias-corrected to g and g²: p_k = (1 - rate wd)^k p_0 - …
    #[test]
    fn decay_is_decoupled_from_the_gradient() {
        let mut p = Tensor::from_slice(&[2.0f32]);
        let g = Tensor::from_slice(&[5.0f32]);
        let mut adam = AdamW::new(&settings(0.5), &p);
        let mut expected = 2.0;
        for _ in 0..20 {
            adam.update(&mut p, &g, 0.1);
            expected = expected * (1.0 - 0.1 * 0.5) - 0.1;
        }
        assert!((p.double_value(&[0]) - expected).abs() < 1e-5);
    }

    /// Values of torch.optim.AdamW, made by fixtures/make_adamw.py.
    #[test]
    fn updates_are_those_of_torch() {
        let fixture: Value =
            serde_json::from_str(include_str!("../../tests/fixtures/adamw.json")).unwrap();
        let list = |value: &Value| -> Vec<f32> {
            let items = value.as_array().unwrap().iter();
            items.map(|x| x.as_f64().unwrap() as f32).collect()
        };
        for case in fixture["cases"].as_array().unwrap() {
            let number = |key: &str| case[key].as_f64().unwrap();
            let settings = recipe::Optimizer {
                betas: (number("beta1"), number("beta2")),
                epsilon: number("epsilon"),
                ..settings(number("weight_decay"))
            };
            let mut p = Tensor::from_slice(&list(&case["start"]));
            let mut adam = AdamW::new(&settings, &p);
            for (gradient, after) in std::iter::zip(
                case["gradients"].as_array().unwrap(),
                case["after"].as_array().unwrap(),
            ) {
                let gradient = Tensor::from_slice(&list(gradient));
                adam.update(&mut p, &gradient, number("rate"));
                let after = Tensor::from_slice(&list(after));
                assert!((&p - after).abs().max().double_value(&[]) < 2e-6);
            }
        }
    }

    /// Whoever holds which values, and however a buffer is cut: libtorch's loops, which take many values at a time, must
    /// not make the last ones of a range any other than those before them.
    #[test]
    fn an_update_is_the_same_in_parts() {
        let len = 150_007;
        let values = |seed: f32| -> Tensor {
            let values: Vec<f32> = (0..len).map(|i| ((i as f32) * 0.37 + seed).sin()).collect();
            Tensor::from_slice(&values)
        };
        let (mut whole, parts) = (values(0.0), values(0.0));
        let mut adam = AdamW::new(&settings(0.1), &whole);
        let cuts = [0, 1, 6, 15, 4_099, 4_099, 9_998, 140_011, len];
        let mut each: Vec<AdamW> = cuts
            .windows(2)
            .map(|cut| AdamW::new(&settings(0.1), &parts.narrow(0, cut[0], cut[1] - cut[0])))
            .collect();
        for step in 1..=3 {
            let g = values(step as f32);
            adam.update(&mut whole, &g, 0.1);
            for (cut, adam) in cuts.windows(2).zip(&mut each) {
                let part = |x: &Tensor| x.narrow(0, cut[0], cut[1] - cut[0]);
                adam.update(&mut part(&parts), &part(&g), 0.1);
            }
        }
        assert_eq!(whole, parts);
        assert_ne!(whole, values(0.0));
    }
}
