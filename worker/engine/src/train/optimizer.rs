//! AdamW with its state in the open (arXiv 1711.05101, algorithm 2, decoupled decay).

use distillery_common::recipe;
use tch::{Device, Kind, Tensor};

/// Elements updated together on a CPU, so that state and temporaries stay in its cache from one operation to the next.
const CPU_CHUNK: i64 = 1 << 17;
/// The same on a GPU, so that temporaries stay small beside the state and launches few.
const GPU_CHUNK: i64 = 1 << 22;

/// First and second moments of a flat gradient, and the steps they have seen.
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

/// Scales `gradient` in place so that its Euclidean norm is at most `limit`; returns the norm it had.
///
/// A norm that is not finite leaves the gradient alone.
pub fn clip_norm(gradient: &mut Tensor, limit: Option<f64>) -> f64 {
    tch::no_grad(|| {
        let norm = norm(gradient);
        match limit {
            Some(limit) if norm.is_finite() && norm > limit => *gradient *= limit / norm,
            Some(_) | None => {}
        }
        norm
    })
}

/// The Euclidean norm of `gradient` `[len]`, summed in f64. In parts, since libtorch makes an f64 copy of what it takes the
/// norm of: of the adapters of SDXL that would be 1.5 GiB.
fn norm(gradient: &Tensor) -> f64 {
    let len = gradient.numel() as i64;
    let part = |start| {
        let part = gradient.narrow(0, start, GPU_CHUNK.min(len - start));
        part.norm_scalaropt_dtype(2.0, Kind::Double)
            .double_value(&[])
    };
    let parts: Vec<f64> = (0..len).step_by(GPU_CHUNK as usize).map(part).collect();
    match parts[..] {
        // The root of a square is not always the number.
        [only] => only,
        _ => parts.iter().map(|norm| norm * norm).sum::<f64>().sqrt(),
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

    /// Of 2^22 + 4 ones and threes.
    #[test]
    fn the_norm_of_a_long_gradient_is_that_of_its_parts() {
        let ones = Tensor::ones([GPU_CHUNK], (Kind::Float, Device::Cpu));
        let threes = Tensor::full([4], 3.0, (Kind::Float, Device::Cpu));
        let gradient = Tensor::cat(&[ones, threes], 0);
        let expected = (GPU_CHUNK as f64 + 36.0).sqrt();
        assert!((norm(&gradient) - expected).abs() < 1e-9 * expected);
    }

    #[test]
    fn clipping_keeps_the_direction_and_reports_the_norm_before() {
        let mut g = Tensor::from_slice(&[3.0f32, 4.0]);
        assert!((clip_norm(&mut g, Some(1.0)) - 5.0).abs() < 1e-6);
        assert!((g.double_value(&[0]) - 0.6).abs() < 1e-6);
        assert!((clip_norm(&mut g, Some(2.0)) - 1.0).abs() < 1e-6);
        assert!((g.double_value(&[1]) - 0.8).abs() < 1e-6);
        let mut bad = Tensor::from_slice(&[f32::NAN, 1.0]);
        assert!(clip_norm(&mut bad, Some(1.0)).is_nan());
    }
}
