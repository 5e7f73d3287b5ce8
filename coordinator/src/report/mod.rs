//! What a finished run shows: figures, curves, grids and a summary, as JSON files and one page.
//!
//! Everything here is read from the run URI; it must never know how the run was scheduled.

pub mod chart;
pub mod page;

use distillery_common::curves::StepRecord;
use distillery_common::figures::Figure;

/// Everything the page shows.
#[derive(Debug)]
pub struct Report {
    /// Heading.
    pub title: String,
    /// Times, rows, bytes, rates and digests: a JSON object, shown in order.
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
