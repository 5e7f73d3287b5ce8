//! Ways to draw from a denoiser: lists of times, and the two loops that walk them.
//!
//! Noise comes in as an argument; nothing here draws any.

use std::fmt;

use tch::Tensor;

use super::boundary::{clean, landing, lcm_scales};
use super::prediction::Prediction;
use super::schedule::{LAST_TIME, Schedule, TRAIN_TIMES, times};
use super::segments::{self, Segments};

/// Why there is no such list of times.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    /// The official lists end at 8.
    Tlcm9Steps(u32),
    /// More steps than times.
    TooManySteps {
        /// Asked for.
        steps: u32,
        /// Possible.
        most: u32,
    },
    /// Nothing would be drawn.
    NoSteps,
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tlcm9Steps(value) => write!(
                f,
                "the tlcm9 sampler has lists for 1 to 8 steps, not for {value}"
            ),
            Self::TooManySteps { steps, most } => {
                write!(f, "{steps} sampler steps: {most} is the most")
            }
            Self::NoSteps => write!(f, "a sampler takes at least one step"),
        }
    }
}

/// The teacher's DDIM times: `t_i = round(999 (1 - i / n))`, i = 0..=n; the last is index 0.
pub fn ddim_times(steps: u32) -> Result<Vec<i64>, Error> {
    check_steps(steps, LAST_TIME as u32)?;
    let n = f64::from(steps);
    Ok((0..=steps)
        .map(|i| (LAST_TIME as f64 * (1.0 - f64::from(i) / n)).round() as i64)
        .collect())
}

/// The official few-step lists, from the grid {999, 874, …, 124}: not uniform for 3 to 7 steps.
pub fn tlcm9_times(steps: u32) -> Result<Vec<i64>, Error> {
    Ok(match steps {
        1 => vec![999],
        2 => vec![999, 499],
        3 => vec![999, 499, 124],
        4 => vec![999, 749, 499, 124],
        5 => vec![999, 749, 499, 249, 124],
        6 => vec![999, 749, 499, 374, 249, 124],
        7 => vec![999, 749, 624, 499, 374, 249, 124],
        8 => vec![999, 874, 749, 624, 499, 374, 249, 124],
        other => return Err(Error::Tlcm9Steps(other)),
    })
}

/// The times of diffusers' LCMScheduler: `floor(linspace(0, original, n, endpoint = false))` picks from the
/// falling grid `{999, …, k - 1}` with k = 1000 / original.
pub fn lcm_times(steps: u32, original_steps: u32) -> Result<Vec<i64>, Error> {
    check_steps(steps, original_steps)?;
    let spacing = TRAIN_TIMES / i64::from(original_steps);
    Ok((0..steps)
        .map(|i| f64::from(i) * (f64::from(original_steps) / f64::from(steps)))
        .map(|pick| (i64::from(original_steps) - pick.floor() as i64) * spacing - 1)
        .collect())
}

/// The milestones of `steps` equal segments from 999 down to 0 (arXiv 2403.06807, algorithm 2).
pub fn segments_times(steps: u32) -> Result<Vec<i64>, segments::Error> {
    let mut milestones = Segments::new(steps)?.milestones().to_vec();
    milestones.reverse();
    Ok(milestones)
}

fn check_steps(steps: u32, most: u32) -> Result<(), Error> {
    match steps {
        0 => Err(Error::NoSteps),
        _ if steps > most => Err(Error::TooManySteps { steps, most }),
        _ => Ok(()),
    }
}

/// What a sampler draws from: a network's reading of time.
#[derive(Debug, Clone, Copy)]
pub struct Reading<'a> {
    /// Of the network's training.
    pub schedule: &'a Schedule,
    /// What the network predicts.
    pub prediction: Prediction,
}

/// DDIM from `z` at `times[0]` through every time to the last: `times.len() - 1` predictions.
///
/// `predict(z, t)` is the (guided) prediction at times `t` `[B]`. Serves the teacher ([`ddim_times`]) and the
/// deterministic landings of students ([`segments_times`]).
pub fn deterministic(
    reading: Reading<'_>,
    times_down: &[i64],
    z: &Tensor,
    predict: &mut dyn FnMut(&Tensor, &Tensor) -> Tensor,
) -> Tensor {
    let Reading {
        schedule,
        prediction,
    } = reading;
    let rows = |t: i64| times(t, z.size()[0], z.device());
    times_down.windows(2).fold(z.shallow_clone(), |z, step| {
        let (t, u) = (rows(step[0]), rows(step[1]));
        let n = predict(&z, &t);
        landing(schedule, prediction, &z, &n, &t, &u)
    })
}

/// How a stochastic sampler reads a state's clean end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// The x0 head, as the official script.
    X0,
    /// `c_out x0 + c_skip z`, as diffusers' LCMScheduler.
    Lcm,
}

/// Predicts the clean end at each time and noises it again to the next: `z = alpha x + sigma noise(j)`.
///
/// Starts from `z` at `times[0]` and returns the last clean end: `times.len()` predictions. `noise(j)` has the
/// shape of z and follows prediction j = 0..times.len() - 1, the last excepted.
pub fn stochastic(
    reading: Reading<'_>,
    output: Output,
    times_down: &[i64],
    z: &Tensor,
    predict: &mut dyn FnMut(&Tensor, &Tensor) -> Tensor,
    noise: &mut dyn FnMut(usize) -> Tensor,
) -> Tensor {
    let Reading {
        schedule,
        prediction,
    } = reading;
    let mut z = z.shallow_clone();
    let mut end = z.shallow_clone();
    for (j, &time) in times_down.iter().enumerate() {
        let t = times(time, z.size()[0], z.device());
        let n = predict(&z, &t);
        end = clean(schedule, prediction, &z, &n, &t);
        if output == Output::Lcm {
            let (skip, out) = lcm_scales(time);
            end = out * end + skip * &z;
        }
        if let Some(&next) = times_down.get(j + 1) {
            z = schedule.alpha(next) * &end + schedule.sigma(next) * noise(j);
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test 10: the right column of the specification's table.
    #[test]
    fn lcm_times_are_those_of_the_scheduler() {
        let lists: [&[i64]; 8] = [
            &[999],
            &[999, 499],
            &[999, 679, 339],
            &[999, 759, 499, 259],
            &[999, 799, 599, 399, 199],
            &[999, 839, 679, 499, 339, 179],
            &[999, 859, 719, 579, 439, 299, 159],
            &[999, 879, 759, 639, 499, 379, 259, 139],
        ];
        for (steps, list) in (1..).zip(lists) {
            assert_eq!(lcm_times(steps, 50).unwrap(), list);
        }
    }

    #[test]
    fn tlcm9_lists_lie_on_the_nine_point_grid_and_have_their_length() {
        let grid = Segments::new(8).unwrap();
        for steps in 1..=8 {
            let list = tlcm9_times(steps).unwrap();
            assert_eq!(list.len(), steps as usize);
            assert_eq!(list[0], LAST_TIME);
            assert!(list.windows(2).all(|pair| pair[0] > pair[1]));
            assert!(list.iter().all(|t| grid.milestones().contains(t)));
        }
        assert_eq!(tlcm9_times(4).unwrap(), [999, 749, 499, 124]);
        assert_eq!(tlcm9_times(9), Err(Error::Tlcm9Steps(9)));
    }

    #[test]
    fn ddim_times_end_at_index_zero() {
        assert_eq!(ddim_times(1).unwrap(), [999, 0]);
        assert_eq!(ddim_times(4).unwrap(), [999, 749, 500, 250, 0]);
        assert_eq!(
            ddim_times(999).unwrap(),
            (0..=999).rev().collect::<Vec<i64>>()
        );
        assert_eq!(ddim_times(0), Err(Error::NoSteps));
        assert!(ddim_times(1000).is_err());
    }

    #[test]
    fn segment_times_are_milestones_from_the_top() {
        assert_eq!(segments_times(2).unwrap(), [999, 499, 0]);
        assert_eq!(segments_times(8).unwrap().len(), 9);
    }
}
