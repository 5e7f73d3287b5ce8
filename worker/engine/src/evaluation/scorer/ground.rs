//! The background of a picture: its family of tones and its pattern (SPEC.md §3).

use super::Rules;
use crate::evaluation::picture::Picture;

/// What the background is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ground {
    pub(super) family: String,
    pub(super) pattern: &'static str,
}

/// Reads the background; none when too little of it can be seen.
pub(super) fn read(rules: &Rules, picture: &Picture, bright: &[bool]) -> Option<Ground> {
    let clear = clear(picture, bright);
    let pixels = clear.iter().filter(|&&c| c).count();
    if pixels < rules.background.min_pixels {
        return None;
    }
    let winner = family(rules, picture, &clear);
    let family = &rules.families[winner];
    let light: Vec<bool> = (0..clear.len())
        .map(|at| distance(picture, at, &family.light) < distance(picture, at, &family.dark))
        .collect();
    let pattern = pattern(rules, picture, &clear, &light, pixels);
    Some(Ground {
        family: family.name.clone(),
        pattern,
    })
}

/// Pixels with nothing bright in the nine around them.
fn clear(picture: &Picture, bright: &[bool]) -> Vec<bool> {
    let (width, height) = (picture.width as i64, picture.height as i64);
    let is_bright = |x: i64, y: i64| {
        (0..width).contains(&x) && (0..height).contains(&y) && bright[(y * width + x) as usize]
    };
    (0..width * height)
        .map(|at| {
            let (x, y) = (at % width, at / width);
            !(-1..=1).any(|dy| (-1..=1).any(|dx| is_bright(x + dx, y + dy)))
        })
        .collect()
}

/// The family with most votes of clear pixels, each for its nearest tone; the first of equals.
fn family(rules: &Rules, picture: &Picture, clear: &[bool]) -> usize {
    let mut votes = vec![0u32; rules.families.len()];
    for at in (0..clear.len()).filter(|&at| clear[at]) {
        let tones = rules.families.iter().enumerate().flat_map(|(i, family)| {
            [
                (i, distance(picture, at, &family.dark)),
                (i, distance(picture, at, &family.light)),
            ]
        });
        // `min_by_key` keeps the first of equals.
        let (nearest, _) = tones
            .min_by_key(|&(_, d)| d)
            .expect("a palette is never empty");
        votes[nearest] += 1;
    }
    // `max_by_key` keeps the last of equals, so it runs backwards.
    (0..votes.len())
        .rev()
        .max_by_key(|&i| votes[i])
        .expect("a palette is never empty")
}

fn distance(picture: &Picture, at: usize, tone: &[i64; 3]) -> i64 {
    let rgb = &picture.rgb[at * 3..at * 3 + 3];
    rgb.iter()
        .zip(tone)
        .map(|(&byte, value)| (i64::from(byte) - value).pow(2))
        .sum()
}

fn pattern(
    rules: &Rules,
    picture: &Picture,
    clear: &[bool],
    light: &[bool],
    pixels: usize,
) -> &'static str {
    let n = pixels as f64;
    let lit = (0..clear.len())
        .filter(|&at| clear[at] && light[at])
        .count() as f64;
    if lit < rules.pattern.plain_max_light * n {
        return "plain";
    }
    let width = picture.width;
    let across = (0..clear.len())
        .filter(|at| at % width + 1 < width)
        .map(|at| (at, at + 1));
    let down = (0..clear.len() - width).map(|at| (at, at + width));
    let (x, y) = (rate(clear, light, across), rate(clear, light, down));
    if x.min(y) < rules.pattern.striped_max_ratio * x.max(y) {
        return "striped";
    }
    if lit >= rules.pattern.checkered_min_light * n {
        "checkered"
    } else {
        "spotted"
    }
}

/// The share of clear neighbours of which exactly one is light.
fn rate(clear: &[bool], light: &[bool], pairs: impl Iterator<Item = (usize, usize)>) -> f64 {
    let (mut all, mut changes) = (0u32, 0u32);
    for (a, b) in pairs.filter(|&(a, b)| clear[a] && clear[b]) {
        all += 1;
        changes += u32::from(light[a] != light[b]);
    }
    f64::from(changes) / f64::from(all.max(1))
}
