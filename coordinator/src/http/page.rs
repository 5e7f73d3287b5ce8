//! The live page: the run at this moment, in the manner of the report. No script; it loads itself again.

use std::fmt::Write as _;
use std::time::Duration;

use super::history::History;
use crate::driver::{FailureSeen, Snapshot};
use crate::plan::{Kind, grouped};
use crate::report::chart::{Chart, Series, escape};
use crate::scheduler::{StageView, WorkerView};
use crate::service::Identity;

/// Seconds until the page loads itself again.
const AGAIN: u32 = 5;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;\
color:#1b1b1b}h1,h2{line-height:1.2}table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;\
text-align:left;border-bottom:1px solid #ddd}td.n,th.n{text-align:right}small{color:#666}progress{width:12em}\
figure{display:inline-block;width:560px;max-width:100%;margin:.5em 0;vertical-align:top}svg{width:100%}\
svg text{font-size:11px;fill:#444}.grid{stroke:#e3e3e3}figcaption{font-weight:600}.legend i{display:inline-block;\
width:1em;height:.3em;margin:0 .3em .15em 0}.legend span{margin-right:.8em}pre{background:#f5f5f5;padding:1em;\
overflow:auto}.note{background:#fff4d6;padding:.5em 1em}.state{font-weight:700}ol{padding-left:2.5em}";

/// The whole page.
pub(super) fn render(identity: &Identity, snapshot: &Snapshot, history: &History) -> String {
    let view = &snapshot.view;
    let name = escape(&identity.name);
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{name}: {state}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><meta http-equiv=\"refresh\" content=\"{AGAIN}\">\
         <style>{STYLE}</style><h1>{name}</h1><p><span class=\"state\">{state}</span> for {up} in life {term} · \
         <small>{uri} · {id}</small></p>",
        state = escape(&view.state),
        up = hms(snapshot.elapsed),
        term = view.term.0,
        uri = escape(&identity.run_uri),
        id = escape(&identity.run_id),
    );
    if let Some(note) = &view.note {
        let _ = write!(html, "<p class=\"note\">{}</p>", escape(note));
    }
    stages(&view.stages, &mut html);
    for (stage, curve) in history.losses() {
        html.push_str(&loss(stage, curve));
    }
    workers(&view.workers, &mut html);
    failures(snapshot, &mut html);
    decisions(&snapshot.decisions, &mut html);
    html.push_str("</html>");
    html
}

fn stages(stages: &[StageView], html: &mut String) {
    html.push_str(
        "<h2>Stages</h2><table><tr><th>stage<th>kind<th>state<th>progress<th class=\"n\">done\
         <th class=\"n\">of<th class=\"n\">loss<th class=\"n\">rows/s<th class=\"n\">ms/step<th class=\"n\">engines",
    );
    for stage in stages {
        let unit = if stage.kind == Kind::Distill {
            "steps"
        } else {
            "tasks"
        };
        let _ = write!(
            html,
            "<tr><td>{}<td>{}<td>{}<td><progress value=\"{}\" max=\"{}\"></progress><td class=\"n\">{}\
             <td class=\"n\">{} {unit}",
            escape(&stage.name),
            stage.kind.as_str(),
            stage.state,
            stage.done,
            stage.total.max(1),
            grouped(stage.done),
            grouped(stage.total),
        );
        match &stage.group {
            Some(group) => {
                let _ = write!(
                    html,
                    "<td class=\"n\">{:.4}<td class=\"n\">{:.0}<td class=\"n\">{:.0}<td class=\"n\">{}",
                    group.loss, group.samples_per_second, group.step_ms, stage.world
                );
            }
            None => html.push_str("<td><td><td><td>"),
        }
    }
    html.push_str("</table>");
}

fn loss(stage: &str, curve: &[(f64, f64)]) -> String {
    let series = Series {
        label: "loss".into(),
        points: curve.to_vec(),
    };
    let chart = Chart {
        title: format!("Loss of {stage}"),
        x_label: "optimizer step".into(),
        series: vec![series],
        log_y: true,
    };
    chart.to_svg()
}

fn workers(workers: &[WorkerView], html: &mut String) {
    html.push_str(
        "<h2>Workers</h2><table><tr><th>worker<th>host<th>device<th>state<th>doing<th>detail\
         <th class=\"n\">memory<th class=\"n\">here for<th class=\"n\">silent",
    );
    for worker in workers {
        let _ = write!(
            html,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td class=\"n\">{:.0} MiB<td class=\"n\">{}\
             <td class=\"n\">{:.1} s",
            escape(&worker.name),
            escape(&worker.host),
            escape(&worker.device),
            worker.state,
            escape(&worker.doing),
            escape(&worker.detail),
            worker.rss_bytes as f64 / f64::from(1 << 20),
            hms(worker.age),
            worker.silent.as_secs_f64(),
        );
    }
    html.push_str("</table>");
}

fn failures(snapshot: &Snapshot, html: &mut String) {
    if snapshot.failures.is_empty() {
        return;
    }
    html.push_str("<h2>Failures</h2>");
    for failure in snapshot.failures.iter().rev() {
        let FailureSeen {
            worker,
            what,
            message,
            output,
            at,
        } = failure;
        let _ = write!(
            html,
            "<details><summary>{} ago: {} by worker {}: {}</summary><pre>{}</pre></details>",
            hms(snapshot.elapsed.saturating_sub(*at)),
            escape(what),
            escape(worker),
            escape(message),
            escape(output)
        );
    }
}

fn decisions(decisions: &[String], html: &mut String) {
    html.push_str("<h2>Decisions</h2><p><small>Newest first.</small></p><ul>");
    for decision in decisions.iter().rev() {
        let _ = write!(html, "<li>{}", escape(decision));
    }
    html.push_str("</ul>");
}

fn hms(time: Duration) -> String {
    let s = time.as_secs();
    format!("{:02}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}
