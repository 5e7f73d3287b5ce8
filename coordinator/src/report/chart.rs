//! Line charts as SVG text. Knows numbers and labels, nothing of runs.

use std::fmt::Write as _;

/// One line of a chart.
#[derive(Debug, Clone)]
pub struct Series {
    /// Shown in the legend.
    pub label: String,
    /// (x, y); points whose y is not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// A chart of lines over a common x axis.
#[derive(Debug, Clone)]
pub struct Chart {
    /// Heading.
    pub title: String,
    /// What x counts.
    pub x_label: String,
    /// The lines, in legend order.
    pub series: Vec<Series>,
    /// Whether y is shown by its logarithm; points at or below zero are then left out.
    pub log_y: bool,
}

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 34.0;
/// Points drawn for one line; longer ones are averaged down to it.
const MAX_POINTS: usize = 280;
/// Okabe and Ito's palette, told apart by colour-blind readers too.
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
];

impl Chart {
    /// The chart as a `<figure>`; nothing when no line has a point.
    pub fn to_svg(&self) -> String {
        let lines: Vec<(usize, Vec<(f64, f64)>)> = self
            .series
            .iter()
            .enumerate()
            .map(|(i, series)| (i, self.visible(series)))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        let Some(frame) = Frame::around(lines.iter().flat_map(|(_, points)| points)) else {
            return String::new();
        };
        let mut svg = format!(
            "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">",
            escape(&self.title)
        );
        self.draw_axes(&frame, &mut svg);
        for (i, points) in &lines {
            let path: Vec<String> = points
                .iter()
                .map(|&(x, y)| format!("{:.1},{:.1}", frame.x(x), frame.y(y)))
                .collect();
            let _ = write!(
                svg,
                "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\" points=\"{}\"/>",
                COLOURS[i % COLOURS.len()],
                path.join(" ")
            );
        }
        svg.push_str("</svg>");
        self.draw_legend(&lines, &mut svg);
        svg.push_str("</figure>");
        svg
    }

    fn visible(&self, series: &Series) -> Vec<(f64, f64)> {
        let usable = |y: f64| y.is_finite() && (!self.log_y || y > 0.0);
        let points: Vec<(f64, f64)> = series
            .points
            .iter()
            .copied()
            .filter(|&(x, y)| x.is_finite() && usable(y))
            .collect();
        let run = points.len().div_ceil(MAX_POINTS).max(1);
        points
            .chunks(run)
            .map(|chunk| {
                let n = chunk.len() as f64;
                let (x, y) = chunk
                    .iter()
                    .fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
                (x / n, if self.log_y { (y / n).log10() } else { y / n })
            })
            .collect()
    }

    fn draw_axes(&self, frame: &Frame, svg: &mut String) {
        for i in 0..=4 {
            let share = f64::from(i) / 4.0;
            let (x, y) = (
                frame.low.0 + share * frame.span.0,
                frame.low.1 + share * frame.span.1,
            );
            let shown = if self.log_y { 10f64.powf(y) } else { y };
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
                 <text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                WIDTH - RIGHT,
                frame.y(y),
                frame.y(y),
                LEFT - 6.0,
                frame.y(y) + 4.0,
                short(shown),
                frame.x(x),
                HEIGHT - BOTTOM + 15.0,
                short(x),
            );
        }
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            (WIDTH + LEFT) / 2.0,
            HEIGHT - 3.0,
            escape(&self.x_label)
        );
    }

    fn draw_legend(&self, lines: &[(usize, Vec<(f64, f64)>)], svg: &mut String) {
        svg.push_str("<p class=\"legend\">");
        for (i, _) in lines {
            let _ = write!(
                svg,
                "<span><i style=\"background:{}\"></i>{}</span> ",
                COLOURS[i % COLOURS.len()],
                escape(&self.series[*i].label)
            );
        }
        svg.push_str("</p>");
    }
}

/// The rectangle of values that a chart shows.
struct Frame {
    low: (f64, f64),
    span: (f64, f64),
}

impl Frame {
    fn around<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> Option<Self> {
        let mut bounds: Option<((f64, f64), (f64, f64))> = None;
        for &(x, y) in points {
            let (low, high) = bounds.unwrap_or(((x, y), (x, y)));
            bounds = Some(((low.0.min(x), low.1.min(y)), (high.0.max(x), high.1.max(y))));
        }
        let (low, high) = bounds?;
        // A flat line still needs a height to lie in.
        let span = |low: f64, high: f64| {
            if high > low {
                high - low
            } else {
                low.abs().max(1.0)
            }
        };
        Some(Self {
            low,
            span: (span(low.0, high.0), span(low.1, high.1)),
        })
    }

    fn x(&self, x: f64) -> f64 {
        LEFT + (x - self.low.0) / self.span.0 * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, y: f64) -> f64 {
        HEIGHT - BOTTOM - (y - self.low.1) / self.span.1 * (HEIGHT - TOP - BOTTOM)
    }
}

/// A number in at most three digits or so.
fn short(value: f64) -> String {
    let size = value.abs();
    if size != 0.0 && !(1e-2..1e5).contains(&size) {
        format!("{value:.1e}")
    } else if size >= 100.0 || value == value.round() {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

/// Text made safe for HTML and SVG.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>, log_y: bool) -> String {
        Chart {
            title: "loss <b>".into(),
            x_label: "step".into(),
            series: vec![Series {
                label: "a".into(),
                points,
            }],
            log_y,
        }
        .to_svg()
    }

    #[test]
    fn the_corners_of_the_data_are_the_corners_of_the_frame() {
        let svg = chart(vec![(0.0, 1.0), (10.0, 3.0)], false);
        assert!(svg.contains("points=\"64.0,206.0 548.0,12.0\""), "{svg}");
        assert!(svg.contains("loss &lt;b&gt;"));
    }

    #[test]
    fn a_logarithmic_axis_leaves_out_what_has_no_logarithm() {
        let svg = chart(
            vec![(0.0, 0.0), (1.0, 1.0), (2.0, 100.0), (3.0, f64::NAN)],
            true,
        );
        assert!(svg.contains("points=\"64.0,206.0 548.0,12.0\""), "{svg}");
    }

    #[test]
    fn nothing_to_show_is_no_chart() {
        assert_eq!(chart(vec![(0.0, f64::NAN)], false), "");
    }

    #[test]
    fn long_lines_are_averaged_down() {
        let svg = chart((0..10_000).map(|i| (f64::from(i), 1.0)).collect(), false);
        assert!(svg.matches(',').count() <= MAX_POINTS + 10);
    }
}
