//! What the coordinator's commands ask of an engine that is started for one answer: a request in JSON on its
//! standard input, lines of JSON on its standard output, the last of them a result or an error.
//!
//! This module must never know tensors, nor who starts whom.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The largest request that is read.
pub const MAX_REQUEST_BYTES: u64 = 16 << 20;
/// The longest answer that is read, all lines together.
pub const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// One request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Draw pictures.
    Sample(Sample),
    /// Write a finished student in other forms.
    Export(Export),
}

/// Where to compute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// CPU threads of one operation; none = libtorch's own choice.
    pub threads: Option<u32>,
}

/// What pictures are drawn from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Model {
    /// A pipeline folder: a teacher's, or an export.
    Folder(PathBuf),
    /// The student of a stage of a run, at a step or at its newest checkpoint.
    Checkpoint {
        /// The run URI.
        run: String,
        /// The stage; the last one when none.
        stage: Option<String>,
        /// Its step; the newest when none.
        step: Option<u64>,
    },
}

/// Draw pictures: one PNG for each prompt, seed and number of steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// From what.
    pub model: Model,
    /// Of what.
    pub prompts: Vec<String>,
    /// With how many steps.
    pub steps: Vec<u32>,
    /// `ddim`, `tlcm9`, `lcm` or `segments`; what suits the model when none.
    pub sampler: Option<String>,
    /// Seeds of the noise.
    pub seeds: Vec<u64>,
    /// Guidance scale w; none for students, which have it in their weights.
    pub guidance: Option<f64>,
    /// Folder of the pictures.
    pub out: Option<PathBuf>,
    /// One picture of all: a row for each prompt and seed, a column for each number of steps.
    pub grid: Option<PathBuf>,
    /// `f32`, `f16` or `bf16`.
    pub dtype: String,
    /// Where to compute.
    pub host: Host,
}

/// Write a finished student in other forms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// The run URI.
    pub run: String,
    /// The stage; the last one when none.
    pub stage: Option<String>,
    /// `diffusers`, `lora_universal`.
    pub formats: Vec<String>,
    /// `f32`, `f16` or `bf16`.
    pub dtype: String,
    /// Folder of the export.
    pub out: PathBuf,
    /// Where to compute.
    pub host: Host,
}

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Line {
    /// So far.
    Progress {
        /// Pictures or files.
        done: u64,
        /// Of so many.
        total: u64,
    },
    /// A file is whole.
    Written(PathBuf),
    /// The end, well.
    Result(Value),
    /// The end, not well: one sentence with its causes.
    Error(String),
}

impl Line {
    /// The line, without its end.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("paths, text and numbers become JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_requests_are_read_as_they_were_written() {
        let lines = [
            Line::Progress { done: 1, total: 4 },
            Line::Written("out/a.png".into()),
            Line::Result(serde_json::json!({"files": 4})),
            Line::Error("no such stage".into()),
        ];
        for line in lines {
            let text = line.to_json();
            assert!(!text.contains('\n'));
            assert_eq!(serde_json::from_str::<Line>(&text).expect("our own"), line);
        }
        let request = Request::Export(Export {
            run: "file:///runs/one".into(),
            stage: None,
            formats: vec!["diffusers".into()],
            dtype: "f16".into(),
            out: "there".into(),
            host: Host {
                device: "cpu".into(),
                threads: Some(1),
            },
        });
        let text = serde_json::to_string(&request).expect("JSON");
        assert!(text.starts_with("{\"request\":\"export\""), "{text}");
        assert_eq!(
            serde_json::from_str::<Request>(&text).expect("our own"),
            request
        );
        let more = text.replacen('{', "{\"surprise\":1,", 1);
        assert!(
            serde_json::from_str::<Request>(&more).is_err(),
            "unknown keys are refused"
        );
    }
}
