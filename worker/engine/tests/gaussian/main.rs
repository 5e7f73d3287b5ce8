//! Closed forms on Gaussian data: goldens T1 to T10 of the method's specification, and what follows from them.
//!
//! Literals are the specification's, computed in f64 from the formulas alone. mu = 0.7, s = 0.5, z = 1.3,
//! Stable Diffusion's schedule.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail as the test itself would"
)]

mod analytic;
mod learning;
mod losses;

use distillery_engine::diffusion::denoiser::Denoiser;
use distillery_engine::diffusion::guidance::{Guided, guided};
use distillery_engine::diffusion::prediction::{Heads, Prediction, heads};
use distillery_engine::diffusion::sampler::{
    Output, Reading, ddim_times, deterministic, segments_times, stochastic, tlcm9_times,
};
use distillery_engine::diffusion::schedule::Schedule;
use distillery_engine::diffusion::segments::{Segments, TimeGrid};
use distillery_engine::diffusion::solver::{ddim, inverse_ddim};
use tch::{Kind, Tensor};

use analytic::{
    Gaussian, Goal, MU, Perfect, Z, at, batch, chain, condition, scalar, unconditional, value,
};

/// Agreement with a literal of ten or more digits.
const F64: f64 = 1e-9;
/// Agreement of single precision.
const F32: f64 = 1e-4;

#[track_caller]
fn check(got: f64, expected: f64, tolerance: f64) {
    assert!(
        (got - expected).abs() <= tolerance,
        "{got} is not {expected} within {tolerance}"
    );
}

#[test]
fn t1_one_ddim_step() {
    let teacher = Gaussian::new();
    for (t, u, step, exact, ratio) in [
        (999, 874, 1.340015667363, 1.340744628868, 0.999414821346),
        (499, 374, 1.313978428045, 1.321872567218, 0.0),
        (124, 0, 1.147511493833, 1.247472524285, 0.817512798293),
    ] {
        let landed = value(&teacher.ddim(&scalar(Z), &[t, u]));
        check(landed, step, F64);
        check(teacher.flow(Z, t, u), exact, F64);
        if ratio > 0.0 {
            let centre = teacher.schedule.alpha(u) * MU;
            check((landed - centre) / (exact - centre), ratio, F64);
        }
        let single = scalar(Z).to_kind(Kind::Float);
        check(value(&teacher.ddim(&single, &[t, u])), step, F32);
    }
}

#[test]
fn t2_ddim_approaches_the_flow_with_its_steps() {
    let teacher = Gaussian::new();
    for (steps, end) in [
        (1, 0.7576894506),
        (4, 1.0674154440),
        (8, 1.1752119645),
        (25, 1.2694572994),
        (50, 1.2964838522),
        (999, 1.3259874611),
    ] {
        let times = ddim_times(steps).unwrap();
        check(value(&teacher.ddim(&scalar(Z), &times)), end, F64);
        let single = scalar(Z).to_kind(Kind::Float);
        check(value(&teacher.ddim(&single, &times)), end, F32);
    }
    check(teacher.flow(Z, 999, 0), 1.327705915184, F64);
}

#[test]
fn t3_ddim_is_exact_on_a_point() {
    let teacher = Gaussian {
        s: 0.0,
        ..Gaussian::new()
    };
    for steps in [1, 3, 8] {
        let times = ddim_times(steps).unwrap();
        check(
            value(&teacher.ddim(&scalar(Z), &times)),
            0.736295815003703,
            1e-12,
        );
    }
}

#[test]
fn t4_guidance_moves_the_mean() {
    let teacher = Gaussian::new();
    let (z, t) = (scalar(Z), at(624, &scalar(Z)));
    let null = condition(-0.2, 1);
    let steered = Guided {
        denoiser: &teacher,
        null: &null,
        scale: 8.0,
    };
    let eps = value(&steered.predict(&z, &t, &condition(0.7, 1)));
    check(eps, -1.353214980340, F64);
    // mu_w = mu_null + w (mu_c - mu_null) = 7.
    check(
        value(&teacher.predict(&z, &t, &condition(7.0, 1))),
        eps,
        1e-12,
    );
    // LCM writes cond + w' (cond - null) with w' = 7.
    let (c, n) = (
        teacher.predict(&z, &t, &condition(0.7, 1)),
        teacher.predict(&z, &t, &null),
    );
    check(value(&(&c + 7.0 * (&c - &n))), eps, 1e-12);
    check(value(&guided(&n, &c, 1.0)), value(&c), 1e-15);
    // Guiding eps and then reading x0 is guiding x0: both are affine.
    let read = |n: &Tensor| heads(&teacher.schedule, Prediction::Epsilon, &z, n, &t).x0;
    let on_x0 = guided(&read(&n), &read(&c), 8.0);
    check(value(&on_x0), value(&read(&guided(&n, &c, 8.0))), 1e-12);
}

#[test]
fn guidance_of_a_batch_is_guidance_of_its_rows() {
    let teacher = Gaussian::new();
    let null = condition(-0.2, 1);
    let steered = Guided {
        denoiser: &teacher,
        null: &null,
        scale: 3.0,
    };
    let z = batch(&[1.3, -0.4, 0.2]);
    let t = Tensor::from_slice(&[999i64, 624, 1]);
    let both = steered.predict(&z, &t, &condition(0.7, 3));
    for row in 0..3 {
        let one = steered.predict(
            &z.narrow(0, row, 1),
            &t.narrow(0, row, 1),
            &condition(0.7, 1),
        );
        check(both.double_value(&[row, 0, 0, 0]), value(&one), 1e-14);
    }
}

#[test]
fn t5_the_fixed_point_of_a_segment_is_the_teachers_chain() {
    let eight = Segments::new(8).unwrap();
    let teacher = Gaussian::new();
    for (t, skip, landed) in [
        (999, 20, 1.340631040901),
        (999, 25, 1.340595835456),
        (999, 125, 1.340015667363),
        (124, 20, 1.230741315827),
        (124, 25, 1.222444760673),
    ] {
        let times = chain(&eight, t, skip);
        assert_eq!(*times.last().unwrap(), eight.target(t));
        check(value(&teacher.ddim(&scalar(Z), &times)), landed, F64);
    }
}

#[test]
fn t6_the_student_of_a_landing_by_inverse_ddim() {
    let teacher = Gaussian::new();
    let (z, t, u) = (scalar(Z), at(999, &scalar(Z)), at(874, &scalar(Z)));
    let landed = teacher.ddim(&z, &chain(&Segments::new(8).unwrap(), 999, 25));
    let x0 = inverse_ddim(&teacher.schedule, &landed, &z, &t, &u);
    check(value(&x0), 0.729980406165, F64);
    let student = Perfect::new(Goal::Landing {
        segments: Segments::new(8).unwrap(),
        skip: 25,
    });
    let eps = student.predict(&z, &t, &unconditional(1));
    check(value(&eps), 1.253091123780, F64);
    let own = teacher.predict(&z, &t, &unconditional(1));
    check(value(&own), 1.253675118449, F64);
    // And back: one DDIM step with these heads lands there again.
    let again = ddim(&teacher.schedule, &Heads { x0, eps }, &u);
    check(value(&again), value(&landed), 1e-12);
}

#[test]
fn inverse_ddim_finds_the_x0_of_a_step_in_single_precision() {
    let schedule = Schedule::stable_diffusion();
    let z = batch(&[1.3, -0.4, 0.9]).to_kind(Kind::Float);
    let x0 = batch(&[0.2, 0.5, -1.1]).to_kind(Kind::Float);
    let t = Tensor::from_slice(&[999i64, 499, 124]);
    let u = Tensor::from_slice(&[874i64, 374, 0]);
    let eps = (&z - schedule.alpha_at(&t, &z) * &x0) / schedule.sigma_at(&t, &z);
    let landed = ddim(
        &schedule,
        &Heads {
            x0: x0.shallow_clone(),
            eps,
        },
        &u,
    );
    let found = inverse_ddim(&schedule, &landed, &z, &t, &u);
    assert!((found - x0).abs().max().double_value(&[]) < 3e-6);
}

fn landing_student(m: u32) -> Perfect {
    Perfect::new(Goal::Landing {
        segments: Segments::new(m).unwrap(),
        skip: 25,
    })
}

fn sample_deterministic(student: &Perfect, steps: u32) -> f64 {
    let times = segments_times(steps).unwrap();
    let end = deterministic(
        student.teacher.reading(),
        &times,
        &scalar(Z),
        &mut |z, t| student.predict(z, t, &unconditional(z.size()[0])),
    );
    value(&end)
}

#[test]
fn t7_eight_landings_are_the_teachers_forty_steps() {
    let mut times = TimeGrid::new(40).unwrap().times().to_vec();
    times.reverse();
    times.push(0);
    let forty = value(&Gaussian::new().ddim(&scalar(Z), &times));
    check(forty, 1.290028124673, F64);
    check(sample_deterministic(&landing_student(8), 8), forty, F64);
}

/// The table of §6.2: each student is exact at its own number of steps.
#[test]
fn deterministic_sampling_is_exact_on_the_diagonal() {
    for (m, two, four, eight) in [
        (8, 0.944450, 1.128275, 1.290028),
        (4, 0.998798, 1.290028, 1.348930),
        (2, 1.290028, 1.386818, 1.456223),
        (1, 1.402950, 1.520321, 1.604733),
    ] {
        let student = landing_student(m);
        for (steps, end) in [(2, two), (4, four), (8, eight)] {
            check(sample_deterministic(&student, steps), end, 1e-6);
        }
    }
}

#[test]
fn t8_the_fixed_point_over_milestones() {
    let milestones = [124, 249, 499, 999];
    let three = [1.207809999, 1.172760734, 1.175205833, 1.267751478];
    let one = [1.147511494, 1.106207373, 1.101017330, 1.175889699];
    for (p, ends) in [(3, three), (1, one)] {
        let student = Perfect::new(Goal::Milestones { p });
        for (t, end) in milestones.into_iter().zip(ends) {
            let (z, t) = (scalar(Z), at(t, &scalar(Z)));
            let n = student.predict(&z, &t, &unconditional(1));
            let x0 = heads(&student.teacher.schedule, Prediction::Epsilon, &z, &n, &t).x0;
            check(value(&x0), end, 2e-9);
        }
    }
    // More teacher steps come closer to the flow.
    let exact = Gaussian::new().flow(Z, 999, 0);
    assert!(exact > three[3] && three[3] > one[3]);
}

/// Mean and variance of a stochastic sampler's output from N(0, 1), for a denoiser that is affine in z.
///
/// The output is then affine in the start and in each noise: one row without any gives the mean, one row for
/// each unit impulse gives its share of the variance.
fn moments(student: &Perfect, steps: u32) -> (f64, f64) {
    let times = tlcm9_times(steps).unwrap();
    let rows = times.len() + 1;
    let impulse = |row: usize| {
        let mut values = vec![0.0; rows];
        values[row] = 1.0;
        batch(&values)
    };
    let out = stochastic(
        student.teacher.reading(),
        Output::X0,
        &times,
        &impulse(1),
        &mut |z, t| student.predict(z, t, &unconditional(z.size()[0])),
        &mut |j| impulse(j + 2),
    );
    let out = Vec::<f64>::try_from(out.view([-1])).unwrap();
    let variance = out[1..].iter().map(|x| (x - out[0]).powi(2)).sum();
    (out[0], variance)
}

#[test]
fn t9_stochastic_sampling_with_the_exact_student() {
    let student = Perfect::new(Goal::Exact);
    for (steps, mean, variance) in [
        (1, 0.6760654168, 0.2508768331),
        (2, 0.6929129311, 0.2500768774),
        (4, 0.6993256414, 0.2500006961),
        (8, 0.6999977528, 0.2500000000),
    ] {
        let (m, v) = moments(&student, steps);
        check(m, mean, F64);
        check(v, variance, F64);
    }
}

#[test]
fn t10_what_stochastic_sampling_keeps_of_the_variance() {
    let table = [
        (Goal::Raw, [0.0003, 0.0200, 0.0669, 0.0821]),
        (landing_student(8).goal, [0.0006, 0.0277, 0.0986, 0.1277]),
        (landing_student(4).goal, [0.0014, 0.0434, 0.1070, 0.1647]),
        (landing_student(2).goal, [0.0064, 0.1847, 0.1819, 0.1866]),
        (landing_student(1).goal, [0.1965, 0.1981, 0.1890, 0.1869]),
        (Goal::Milestones { p: 1 }, [0.1446, 0.1416, 0.1230, 0.1189]),
        (Goal::Milestones { p: 3 }, [0.2058, 0.2033, 0.1909, 0.1872]),
    ];
    for (goal, variances) in table {
        let student = Perfect::new(goal);
        for (steps, variance) in [1, 2, 4, 8].into_iter().zip(variances) {
            // The literals have four digits.
            check(moments(&student, steps).1, variance, 0.5001e-4);
        }
    }
}

/// Test 17.
#[test]
fn under_a_flow_schedule_ddim_is_eulers_step() {
    let schedule = Schedule::flow(3.0).unwrap();
    let (z, v) = (batch(&[1.3, -0.4]), batch(&[0.3, 2.0]));
    let t = Tensor::from_slice(&[999i64, 400]);
    let u = Tensor::from_slice(&[750i64, 0]);
    let landed = ddim(
        &schedule,
        &heads(&schedule, Prediction::Flow, &z, &v, &t),
        &u,
    );
    let euler = &z + (schedule.sigma_at(&u, &z) - schedule.sigma_at(&t, &z)) * &v;
    assert!((landed - euler).abs().max().double_value(&[]) < 1e-14);
}

/// The x0 head and LCMScheduler's output differ by c_skip alone, which is nothing at these times.
#[test]
fn both_stochastic_outputs_agree() {
    let teacher = Gaussian::new();
    let times = tlcm9_times(4).unwrap();
    let run = |output| {
        let reading: Reading<'_> = teacher.reading();
        let end = stochastic(
            reading,
            output,
            &times,
            &scalar(Z),
            &mut |z, t| teacher.predict(z, t, &unconditional(1)),
            &mut |j| scalar(0.1 * j as f64),
        );
        value(&end)
    };
    check(run(Output::Lcm), run(Output::X0), 1e-6);
}
