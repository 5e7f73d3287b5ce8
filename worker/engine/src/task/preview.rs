//! Sample grids: a row for each prompt and seed, the teacher on the left, the student with more and more steps.

use bytes::Bytes;
use distillery_common::recipe::Sampler;
use distillery_common::storage::FileEntry;
use distillery_common::storage::layout::{self, PromptList};
use distillery_common::task::{FailureClass, Lease};
use serde_json::{Value, json};

use super::samples::{Way, name_of, pictures};
use super::studio::{Studio, read_prompts};
use super::{Fault, OrFault as _};
use crate::diffusion::denoiser::Denoiser;
use crate::evaluation::picture::Picture;
use crate::workbench::Workbench;

/// Most rows of a grid.
const MAX_ROWS: usize = 16;
/// A teacher's column shows the largest of its step counts up to this one: what people would wait for.
const TEACHER_STEPS: u32 = 25;
/// Side of a cell below which pixels are enlarged.
const CELL: i64 = 96;

/// A grid in the store.
#[derive(Debug)]
pub struct Grid {
    /// Its file.
    pub file: FileEntry,
    /// What it shows: model, file, headings of columns, rows.
    pub described: Value,
}

/// Draws and stores the grid of the student `unet` of `stage`; none when the worker took `lease` back in between.
pub fn grid(
    bench: &mut Workbench,
    lease: &Lease,
    studio: &mut Studio,
    unet: &dyn Denoiser,
    stage: &str,
) -> Result<Option<Grid>, Fault> {
    let preview = bench.recipe.preview.clone();
    let texts: Vec<String> = match read_prompts(bench, PromptList::Preview)? {
        Some(prompts) if !prompts.is_empty() => {
            prompts.iter().map(|p| p.text().to_owned()).collect()
        }
        Some(_) | None => studio.holdout.iter().map(|p| p.text().to_owned()).collect(),
    };
    let rows = rows_of(&texts, &preview.seeds);
    let teacher_steps = teacher_steps(bench);
    let mut pixels = Vec::with_capacity(rows.len());
    for (text, seed) in &rows {
        if bench.inbox.cancelled(lease) {
            return Ok(None);
        }
        pixels.push(row(
            studio,
            unet,
            teacher_steps,
            &preview.steps,
            preview.sampler,
            text,
            *seed,
        )?);
    }
    let scale = (CELL / studio.teacher.parts.image_side().max(1)).max(1) as usize;
    let png = Picture::grid(&pixels, scale)
        .to_png()
        .or_fault(FailureClass::Unknown)?;
    let key = layout::task_file(
        &layout::task(&lease.task.stage, lease.task.index),
        lease,
        "grid.png",
    );
    let file = FileEntry::of(&key, &png);
    bench.io.wait(bench.store.put(&key, Bytes::from(png)))?;
    let mut columns = vec![format!("teacher, {teacher_steps} steps")];
    let sampler = name_of(preview.sampler);
    columns.extend(
        preview
            .steps
            .iter()
            .map(|steps| format!("{stage}, {steps} ({sampler})")),
    );
    let rows: Vec<String> = rows
        .iter()
        .map(|(text, seed)| format!("{text} (seed {seed})"))
        .collect();
    let described = json!({"model": stage, "file": key.as_str(), "columns": columns, "rows": rows});
    Ok(Some(Grid { file, described }))
}

/// Prompts by seeds, at most [`MAX_ROWS`]: every seed of the first prompts.
fn rows_of<'a>(texts: &'a [String], seeds: &[u64]) -> Vec<(&'a str, u64)> {
    let pairs = texts
        .iter()
        .flat_map(|text| seeds.iter().map(move |&seed| (text.as_str(), seed)));
    pairs.take(MAX_ROWS).collect()
}

fn teacher_steps(bench: &Workbench) -> u32 {
    let steps = bench
        .recipe
        .evaluate
        .as_ref()
        .map_or(&[][..], |e| &e.teacher_steps);
    let within = steps.iter().filter(|&&n| n <= TEACHER_STEPS).max();
    within
        .or(steps.iter().max())
        .copied()
        .unwrap_or(TEACHER_STEPS)
}

fn row(
    studio: &mut Studio,
    unet: &dyn Denoiser,
    teacher_steps: u32,
    steps: &[u32],
    sampler: Sampler,
    text: &str,
    seed: u64,
) -> Result<Vec<Picture>, Fault> {
    let teacher = std::rc::Rc::clone(&studio.teacher);
    let own = Way {
        sampler: Sampler::Ddim,
        steps: teacher_steps,
    };
    let guidance = studio.guidance;
    let mut cells = pictures(
        &teacher,
        &studio.draw_one(&teacher.parts.unet, guidance, own, text, seed)?,
    );
    for &steps in steps {
        let latents = studio.draw_one(unet, 1.0, Way { sampler, steps }, text, seed)?;
        cells.extend(pictures(&teacher, &latents));
    }
    Ok(cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_bounded_and_keep_prompts_together() {
        let texts: Vec<String> = (0..9).map(|i| format!("prompt {i}")).collect();
        let rows = rows_of(&texts, &[4, 7]);
        assert_eq!(rows.len(), 16);
        assert_eq!(
            rows[..3],
            [("prompt 0", 4), ("prompt 0", 7), ("prompt 1", 4)]
        );
        assert!(rows_of(&texts, &[]).is_empty());
    }
}
