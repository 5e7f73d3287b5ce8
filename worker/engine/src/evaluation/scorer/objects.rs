//! Objects of a picture: bright regions with a colour, a shape and a centre (SPEC.md §2).

use std::f64::consts::PI;

use super::Rules;
use crate::evaluation::picture::Picture;

/// One bright region.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Object {
    pub(super) area: usize,
    pub(super) centre: (f64, f64),
    pub(super) colour: String,
    pub(super) shape: String,
}

/// Which pixels are bright, row by row.
pub(super) fn bright(rules: &Rules, picture: &Picture) -> Vec<bool> {
    picture
        .rgb
        .chunks_exact(3)
        .map(|rgb| rgb.iter().any(|&byte| byte >= rules.object.min_brightness))
        .collect()
}

/// The objects in the order of their first pixel.
pub(super) fn find(rules: &Rules, picture: &Picture, bright: &[bool]) -> Vec<Object> {
    let mut seen = vec![false; bright.len()];
    let mut objects = Vec::new();
    for start in 0..bright.len() {
        if bright[start] && !seen[start] {
            let region = flood(picture, bright, &mut seen, start);
            if region.len() >= rules.object.min_area {
                objects.push(describe(rules, picture, &region));
            }
        }
    }
    objects
}

/// The (x, y) of every pixel that is 4-connected to `start`.
fn flood(picture: &Picture, bright: &[bool], seen: &mut [bool], start: usize) -> Vec<(i64, i64)> {
    let (width, height) = (picture.width as i64, picture.height as i64);
    let mut open = vec![start];
    let mut region = Vec::new();
    seen[start] = true;
    while let Some(at) = open.pop() {
        let (x, y) = (at as i64 % width, at as i64 / width);
        region.push((x, y));
        for (nx, ny) in [(x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)] {
            if (0..width).contains(&nx) && (0..height).contains(&ny) {
                let next = (ny * width + nx) as usize;
                if bright[next] && !seen[next] {
                    seen[next] = true;
                    open.push(next);
                }
            }
        }
    }
    region
}

fn describe(rules: &Rules, picture: &Picture, region: &[(i64, i64)]) -> Object {
    let n = region.len() as i64;
    let sum = region.iter().fold((0, 0), |s, p| (s.0 + p.0, s.1 + p.1));
    Object {
        area: region.len(),
        centre: (sum.0 as f64 / n as f64, sum.1 as f64 / n as f64),
        colour: colour(rules, picture, region),
        shape: shape(rules, region, sum).to_owned(),
    }
}

fn colour(rules: &Rules, picture: &Picture, region: &[(i64, i64)]) -> String {
    let n = region.len() as i64;
    let mut sums = [0i64; 3];
    for &(x, y) in region {
        let at = (y as usize * picture.width + x as usize) * 3;
        for (sum, &byte) in sums.iter_mut().zip(&picture.rgb[at..at + 3]) {
            *sum += i64::from(byte);
        }
    }
    let distance = |rgb: &[i64; 3]| -> i64 {
        sums.iter()
            .zip(rgb)
            .map(|(sum, value)| (sum - n * value).pow(2))
            .sum()
    };
    let nearest = rules
        .object_colours
        .iter()
        .min_by_key(|(_, rgb)| distance(rgb));
    nearest.expect("a palette is never empty").0.clone()
}

fn shape(rules: &Rules, region: &[(i64, i64)], (sx, sy): (i64, i64)) -> &'static str {
    let n = region.len() as i64;
    let (cx, cy) = (
        (2 * sx + n).div_euclid(2 * n),
        (2 * sy + n).div_euclid(2 * n),
    );
    let near = region
        .iter()
        .filter(|(x, y)| (x - cx).abs() <= 1 && (y - cy).abs() <= 1)
        .count();
    if 9 - near >= rules.shape.ring_min_empty {
        return "ring";
    }
    let (mut mxx, mut myy, mut mxy, mut m3r, mut m3i) = (0i64, 0i64, 0i64, 0i64, 0i64);
    for &(x, y) in region {
        let (u, v) = (n * x - sx, n * y - sy);
        mxx += u * u;
        myy += v * v;
        mxy += u * v;
        m3r += u * u * u - 3 * u * v * v;
        m3i += 3 * u * u * v - v * v * v;
    }
    let (cube, fourth) = (n.pow(3) as f64, n.pow(4) as f64);
    let (xx, yy) = (
        mxx as f64 / cube + 1.0 / 12.0,
        myy as f64 / cube + 1.0 / 12.0,
    );
    let xy = mxy as f64 / cube;
    let root = ((xx - yy) * (xx - yy) + 4.0 * xy * xy).sqrt();
    if (xx + yy + root) / (xx + yy - root) >= rules.shape.bar_min_elongation {
        return "bar";
    }
    let (re, im) = (m3r as f64 / fourth, m3i as f64 / fourth);
    let n = n as f64;
    if (re * re + im * im).sqrt() / (n * n.sqrt()) >= rules.shape.triangle_min_asymmetry {
        return "triangle";
    }
    if 2.0 * PI * (xx + yy) / n >= rules.shape.cross_min_spread {
        return "cross";
    }
    "disc"
}
