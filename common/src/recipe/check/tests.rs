use std::path::Path;

use super::super::{Recipe, parse};

const SMALL: &str = "
version: 1
name: small
output: /runs/small
teacher: {model: teacher}
prompts: {train: train.txt}
stages:
  - {name: seg8, segments: 8, steps: 10}
";

fn read(text: &str) -> Recipe {
    match parse(text, "r.yaml", Path::new("/work"), &[]) {
        Ok(recipe) => recipe,
        Err(faults) => panic!("{faults}"),
    }
}

/// Also proves every default of the table.
#[test]
fn a_few_lines_are_a_recipe() {
    let recipe = read(SMALL);
    assert_eq!(recipe.teacher.model, Path::new("/work/teacher"));
    assert_eq!(recipe.output, "file:///runs/small");
    assert_eq!(recipe.stages[0].skip, 25);
    assert_eq!(recipe.stages[0].optimizer.warmup, 1);
    assert!(recipe.evaluate.is_none() && recipe.export.is_some());
}
