//! `report.html`: one static file that can be mailed. Curves, tables and grids; no script, no request.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use distillery_common::curves::{StepRecord, TIME_BINS};
use distillery_common::figures::{Figure, TEACHER};

use serde_json::Value;

use super::chart::{Chart, Series, escape};
use super::{Grid, Report, StageCurves};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;\
color:#1b1b1b}h1,h2{line-height:1.2}table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;\
text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}small{color:#666}\
figure{display:inline-block;width:560px;max-width:100%;margin:.5em 0;vertical-align:top}svg{width:100%}\
svg text{font-size:11px;fill:#444}.grid{stroke:#e3e3e3}figcaption{font-weight:600}.legend i{display:inline-block;\
width:1em;height:.3em;margin:0 .3em .15em 0}.legend span{margin-right:.8em}img{image-rendering:pixelated;\
max-width:100%}pre{background:#f5f5f5;padding:1em;overflow:auto}.best{font-weight:700}";

/// The whole page.
pub fn render(report: &Report) -> String {
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{0}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style><h1>{0}</h1>",
        escape(&report.title)
    );
    summary(report, &mut html);
    for grid in &report.grids {
        picture(grid, &mut html);
    }
    for metric in ["prompt_adherence", "latent_frechet", "teacher_distance"] {
        figures(metric, &report.figures, &mut html);
    }
    for stage in &report.curves {
        curves(stage, &mut html);
    }
    let _ = write!(
        html,
        "<h2>Recipe</h2><pre>{}</pre></html>",
        escape(&report.recipe)
    );
    html
}

fn summary(report: &Report, html: &mut String) {
    html.push_str("<h2>Summary</h2><table>");
    for (name, value) in report.summary.as_object().into_iter().flatten() {
        if !value.is_object() {
            let shown = shown(name, value);
            let _ = write!(html, "<tr><td>{}<td>{}", escape(name), escape(&shown));
        }
    }
    html.push_str("</table>");
    stages(&report.summary["stages"], html);
}

/// What each stage cost: a row each, and a column for every figure that one of them has.
fn stages(stages: &Value, html: &mut String) {
    const COLUMNS: [(&str, &str); 12] = [
        ("wall_seconds", "wall time, s"),
        ("tasks", "tasks"),
        ("steps", "steps"),
        ("steps_per_second", "steps/s"),
        ("rows", "rows"),
        ("rows_per_second", "rows/s"),
        ("engine_seconds", "engines' time, s"),
        ("engines", "engines"),
        ("engine_peak_bytes", "an engine's peak memory"),
        ("loader_wait_seconds", "waited for rows, s"),
        ("checkpoint_stall_seconds", "waited for checkpoints, s"),
        ("checkpoint_bytes", "checkpoint"),
    ];
    let Some(stages) = stages.as_object().filter(|stages| !stages.is_empty()) else {
        return;
    };
    let columns: Vec<_> = COLUMNS
        .into_iter()
        .filter(|(key, _)| stages.values().any(|stage| stage.get(key).is_some()))
        .collect();
    html.push_str("<h2>Stages</h2><table><tr><th>stage");
    for (_, heading) in &columns {
        let _ = write!(html, "<th>{heading}");
    }
    for (name, stage) in stages {
        let _ = write!(html, "<tr><td>{}", escape(name));
        for (key, _) in &columns {
            let shown = stage.get(key).map(|value| shown(key, value));
            let _ = write!(html, "<td>{}", escape(&shown.unwrap_or_default()));
        }
    }
    html.push_str(
        "</table><p><small>Wall time adds up the lives of a run that was resumed; a life that was killed counts to its \
         last entry in the journal. Memory is the host's, not a GPU's; in training it is that of the engine that saves, \
         and at its saves.</small></p>",
    );
}

/// A value for people: bytes in MiB, text without quotes.
fn shown(name: &str, value: &Value) -> String {
    match (value, value.as_f64()) {
        (Value::String(text), _) => text.clone(),
        (_, Some(bytes)) if name.contains("bytes") => {
            format!("{:.1} MiB", bytes / f64::from(1 << 20))
        }
        _ => value.to_string(),
    }
}

fn picture(grid: &Grid, html: &mut String) {
    let _ = write!(
        html,
        "<h2>Samples: {}</h2><p>Columns: {}. Rows: {}.</p><img alt=\"samples of {}\" \
         src=\"data:image/png;base64,{}\">",
        escape(&grid.model),
        escape(&grid.columns.join(" | ")),
        escape(&grid.rows.join("; ")),
        escape(&grid.model),
        base64(&grid.png)
    );
}

/// One table for one metric: a row for each (model, sampler), a column for each number of steps.
fn figures(metric: &str, all: &[Figure], html: &mut String) {
    let mut rows: BTreeMap<(bool, &str, &str), BTreeMap<u32, &Figure>> = BTreeMap::new();
    for figure in all.iter().filter(|figure| figure.metric == metric) {
        let key = (
            figure.model != TEACHER,
            figure.model.as_str(),
            figure.sampler.as_str(),
        );
        rows.entry(key).or_default().insert(figure.steps, figure);
    }
    if rows.is_empty() {
        return;
    }
    let mut columns: Vec<u32> = rows.values().flat_map(BTreeMap::keys).copied().collect();
    columns.sort_unstable();
    columns.dedup();
    let _ = write!(
        html,
        "<h2>{}</h2><table><tr><th>model<th>sampler",
        heading(metric)
    );
    for steps in &columns {
        let _ = write!(html, "<th>{steps} steps");
    }
    for ((_, model, sampler), cells) in &rows {
        let _ = write!(html, "<tr><td>{}<td>{}", escape(model), escape(sampler));
        for steps in &columns {
            html.push_str(
                &cells
                    .get(steps)
                    .map_or_else(|| "<td>".to_owned(), |f| cell(f)),
            );
        }
    }
    html.push_str("</table>");
}

fn cell(figure: &Figure) -> String {
    let interval = figure
        .interval
        .map(|(low, high)| format!(" <small>{low:.3}…{high:.3}</small>"))
        .unwrap_or_default();
    format!("<td>{:.3}{interval}", figure.value)
}

fn heading(metric: &str) -> &str {
    match metric {
        "prompt_adherence" => "Prompt adherence (share of right attributes; higher is better)",
        "latent_frechet" => "Fréchet distance to the teacher's latents (lower is better)",
        "teacher_distance" => {
            "Mean squared distance to the teacher's result from the same noise (lower is better)"
        }
        other => other,
    }
}

fn curves(stage: &StageCurves, html: &mut String) {
    let records = &stage.records;
    let _ = write!(html, "<h2>Training: {}</h2>", escape(&stage.stage));
    let line = |label: &str, y: &dyn Fn(&StepRecord) -> Option<f64>| Series {
        label: label.to_owned(),
        points: records
            .iter()
            .filter_map(|r| Some((r.step as f64, y(r)?)))
            .collect(),
    };
    let chart = |title: &str, series, log_y| Chart {
        title: title.to_owned(),
        x_label: "optimizer step".to_owned(),
        series,
        log_y,
    };
    let segments = records
        .iter()
        .map(|r| r.loss_by_segment.len())
        .max()
        .unwrap_or(0);
    let by_segment = (0..segments)
        .map(|s| {
            line(&format!("segment {s}"), &move |r| {
                *r.loss_by_segment.get(s)?
            })
        })
        .collect();
    let by_time = (0..TIME_BINS)
        .map(|b| line(&format!("t bin {b}"), &move |r| *r.loss_by_time.get(b)?))
        .collect();
    let rate = |r: &StepRecord| (r.step_ms > 0.0).then(|| 1000.0 / r.step_ms);
    let charts = [
        chart("Loss", vec![line("loss", &|r| r.loss)], true),
        chart("Loss by segment (0 = cleanest)", by_segment, true),
        chart("Loss by timestep bin (0 = cleanest)", by_time, true),
        chart("Gradient norm", vec![line("norm", &|r| r.grad_norm)], true),
        chart(
            "Throughput (steps per second)",
            vec![line("steps/s", &rate)],
            false,
        ),
        chart(
            "World size",
            vec![line("engines", &|r| Some(f64::from(r.world)))],
            false,
        ),
        chart(
            "Wait for rows (ms per step)",
            vec![line("wait", &|r| Some(r.wait_ms))],
            false,
        ),
    ];
    for chart in charts {
        html.push_str(&chart.to_svg());
    }
}

/// RFC 4648 base 64 with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |word, &b| word << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let sextet = (word >> (18 - 6 * i)) & 63;
            text.push(if i <= chunk.len() {
                char::from(ALPHABET[sextet as usize])
            } else {
                '='
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_gives_the_vectors_of_rfc_4648() {
        let vectors = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ];
        for (plain, coded) in vectors {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    fn figure(model: &str, steps: u32, value: f64) -> Figure {
        Figure {
            model: model.into(),
            steps,
            sampler: "tlcm9".into(),
            metric: "prompt_adherence".into(),
            value,
            interval: Some((value - 0.01, value + 0.01)),
            samples: 64,
        }
    }

    #[test]
    fn a_table_has_the_teacher_first_and_a_column_for_each_number_of_steps() {
        let report = Report {
            title: "a <run>".into(),
            summary: serde_json::json!({"rows": 9, "stored_bytes": 3 << 19, "stages": {
                "trajectories": {"wall_seconds": 1.5, "rows": 9},
                "<seg8>": {"wall_seconds": 2.0, "steps": 7, "engines": "2 to step 3, 1 to step 7"},
            }}),
            figures: vec![figure("seg2", 4, 0.9), figure("teacher", 25, 0.95)],
            curves: Vec::new(),
            grids: Vec::new(),
            recipe: "name: x".into(),
        };
        let html = render(&report);
        assert!(html.contains("<h1>a &lt;run&gt;</h1>"));
        assert!(html.contains("<th>4 steps<th>25 steps<tr><td>teacher"));
        assert!(html.contains("<td>0.900 <small>0.890…0.910</small><td>"));
        assert!(html.contains("<tr><td>rows<td>9<tr><td>stored_bytes<td>1.5 MiB</table>"));
        assert!(html.contains("<tr><th>stage<th>wall time, s<th>steps<th>rows<th>engines<tr>"));
        assert!(html.contains("<tr><td>trajectories<td>1.5<td><td>9<td><tr>"));
        assert!(html.contains("<td>&lt;seg8&gt;<td>2.0<td>7<td><td>2 to step 3, 1 to step 7<"));
        assert!(!html.contains("<script"));
    }
}
