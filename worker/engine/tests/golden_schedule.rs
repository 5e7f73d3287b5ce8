//! Schedules and steps as diffusers computes them (fixtures/make.py writes schedules.safetensors).

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail as the test itself would"
)]

use std::collections::BTreeMap;

use distillery_engine::diffusion::boundary::landing;
use distillery_engine::diffusion::prediction::Prediction;
use distillery_engine::diffusion::sampler::{Output, Reading, lcm_times, stochastic};
use distillery_engine::diffusion::schedule::{Betas, Schedule, times};
use tch::{Device, Kind, Tensor};

fn fixtures() -> BTreeMap<String, Tensor> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/schedules.safetensors"
    );
    Tensor::read_safetensors(path)
        .unwrap()
        .into_iter()
        .collect()
}

fn numbers(x: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(x.to_kind(Kind::Double).view([-1])).unwrap()
}

/// Largest difference, in units of the largest value.
fn difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    let scale = theirs.abs().max().double_value(&[]).max(1e-30);
    (ours - theirs).abs().max().double_value(&[]) / scale
}

fn schedules(fixtures: &BTreeMap<String, Tensor>) -> Vec<(&'static str, Schedule, Prediction)> {
    let trained = Betas::Trained(numbers(&fixtures["trained_betas"]));
    let linear = Betas::Linear {
        start: 1e-4,
        end: 0.02,
    };
    let plain = |betas: &Betas| Schedule::new(betas, false).unwrap();
    vec![
        (
            "scaled_linear",
            plain(&Betas::STABLE_DIFFUSION),
            Prediction::Epsilon,
        ),
        ("linear", plain(&linear), Prediction::Epsilon),
        (
            "squaredcos_cap_v2",
            plain(&Betas::SquaredCosine),
            Prediction::Epsilon,
        ),
        (
            "zero_snr",
            Schedule::new(&Betas::STABLE_DIFFUSION, true).unwrap(),
            Prediction::V,
        ),
        ("trained_betas", plain(&trained), Prediction::Sample),
    ]
}

/// The tables differ by what f32 loses over a product of a thousand factors.
#[test]
fn tables_are_those_of_diffusers() {
    let fixtures = fixtures();
    for (name, schedule, _) in schedules(&fixtures) {
        let theirs = numbers(&fixtures[&format!("{name}.alphas_cumprod")]);
        for (t, theirs) in theirs.into_iter().enumerate() {
            let ours = schedule.alpha_bar(t as i64);
            assert!(
                (ours - theirs).abs() <= 1e-5 * theirs + 1e-7,
                "{name} at {t}: {ours} and {theirs}"
            );
        }
    }
}

#[test]
fn ddim_steps_are_those_of_diffusers() {
    let fixtures = fixtures();
    let mut cases = schedules(&fixtures);
    let plain = Schedule::stable_diffusion;
    cases.push(("plain_v", plain(), Prediction::V));
    cases.push(("plain_sample", plain(), Prediction::Sample));
    let mut steps = 0;
    for (name, schedule, prediction) in cases {
        let prefix = format!("{name}.ddim25.step");
        for (key, theirs) in &fixtures {
            let Some(t) = key.strip_prefix(&prefix) else {
                continue;
            };
            let t: i64 = t.parse().unwrap();
            let at = |t: i64| times(t, 2, Device::Cpu);
            let ours = landing(
                &schedule,
                prediction,
                &fixtures["z"],
                &fixtures["prediction"],
                &at(t),
                &at((t - 40).max(0)),
            );
            let difference = difference(&ours, theirs);
            assert!(difference < 1e-5, "{key}: {difference}");
            steps += 1;
        }
    }
    assert_eq!(steps, 28);
    // The one time where a schedule with zero terminal SNR divides by nothing it has.
    assert!(fixtures.contains_key("zero_snr.ddim25.step999"));
}

#[test]
fn lcm_times_and_steps_are_those_of_diffusers() {
    let fixtures = fixtures();
    let schedule = Schedule::stable_diffusion();
    let reading = Reading {
        schedule: &schedule,
        prediction: Prediction::Epsilon,
    };
    for original in [50, 40] {
        for steps in [1, 2, 4, 8] {
            let name = format!("lcm{original}.{steps}");
            let times = lcm_times(steps, original).unwrap();
            let theirs = numbers(&fixtures[&format!("{name}.timesteps")]);
            let ours: Vec<f64> = times.iter().map(|&t| t as f64).collect();
            assert_eq!(ours, theirs, "{name}");
            let end = stochastic(
                reading,
                Output::Lcm,
                &times,
                &fixtures["z"],
                &mut |_, _| fixtures["prediction"].shallow_clone(),
                &mut |j| fixtures[&format!("lcm.noise{j}")].shallow_clone(),
            );
            let last = &fixtures[&format!("{name}.step{}", steps - 1)];
            let difference = difference(&end, last);
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
}
