//! What a finished run shows: figures, curves, grids and a summary, as JSON files and one page.
//!
//! Everything here is read from the run URI; it must never know how the run was scheduled, and asks the journal for
//! nothing but what was spent.

pub mod chart;
mod costs;
pub mod gather;
pub mod page;

use bytes::Bytes;
use distillery_common::curves::StepRecord;
use distillery_common::figures::Figure;
use distillery_common::storage::{self, Store, layout};

pub use gather::gather;
pub use page::render;

/// Everything the page shows.
#[derive(Debug)]
pub struct Report {
    /// Heading.
    pub title: String,
    /// Times, rows, bytes, rates and digests: a JSON object, shown in order; its `stages` are one for each.
    pub summary: serde_json::Value,
    /// All measured figures.
    pub figures: Vec<Figure>,
    /// Training curves, a stage each, in order.
    pub curves: Vec<StageCurves>,
    /// Sample grids.
    pub grids: Vec<Grid>,
    /// The recipe as it ran.
    pub recipe: String,
}

/// The curves of one training stage.
#[derive(Debug)]
pub struct StageCurves {
    /// Name of the stage.
    pub stage: String,
    /// Its steps in order.
    pub records: Vec<StepRecord>,
}

/// A picture of samples.
#[derive(Debug)]
pub struct Grid {
    /// Whose samples.
    pub model: String,
    /// Headings from left to right.
    pub columns: Vec<String>,
    /// Prompts from top to bottom.
    pub rows: Vec<String>,
    /// The picture.
    pub png: Vec<u8>,
}

impl Report {
    /// Writes `report/metrics.json`, `report/summary.json`, `report/report.html` and a PNG for each grid.
    pub async fn publish(&self, store: &Store) -> Result<(), storage::Error> {
        for grid in &self.grids {
            let key = layout::report(&format!("grid-{}.png", grid.model));
            store.put(&key, Bytes::from(grid.png.clone())).await?;
        }
        let metrics: Vec<_> = self.figures.iter().map(figure_json).collect();
        let files = [
            (
                "metrics.json",
                format!("{:#}\n", serde_json::Value::from(metrics)),
            ),
            ("summary.json", format!("{:#}\n", self.summary)),
            ("report.html", render(self)),
        ];
        for (name, text) in files {
            store.put(&layout::report(name), Bytes::from(text)).await?;
        }
        Ok(())
    }

    /// The figures as lines for a terminal: a row for each (metric, model, sampler), a column for each number of
    /// steps.
    pub fn table(&self) -> String {
        let mut steps: Vec<u32> = self.figures.iter().map(|f| f.steps).collect();
        steps.sort_unstable();
        steps.dedup();
        let mut rows: Vec<(&str, &str, &str)> = Vec::new();
        for figure in &self.figures {
            let row = (
                figure.metric.as_str(),
                figure.model.as_str(),
                figure.sampler.as_str(),
            );
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        rows.sort_by_key(|row| row.0);
        let mut text = format!("{:<17} {:<19} {:<9}", "metric", "model", "sampler");
        text.extend(steps.iter().map(|n| format!("{n:>9}")));
        for (metric, model, sampler) in rows {
            text.push_str(&format!("\n{metric:<17} {model:<19} {sampler:<9}"));
            for &n in &steps {
                let found = self.figures.iter().find(|f| {
                    f.steps == n && f.metric == metric && f.model == model && f.sampler == sampler
                });
                let shown = found.map_or_else(String::new, |f| format!("{:.3}", f.value));
                text.push_str(&format!("{shown:>9}"));
            }
        }
        text
    }
}

fn figure_json(figure: &Figure) -> serde_json::Value {
    serde_json::to_value(figure).expect("text and finite numbers become JSON")
}
