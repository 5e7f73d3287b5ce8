//! From a recipe and a few measured facts to the stages of a run.

use distillery_common::recipe::{self, Recipe};

use super::{EVALUATE, EXPORT, Kind, Plan, REFERENCE, Stage, TRAJECTORIES, Tasks, Training, Work};

/// What the recipe alone does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Numbers in one latent, C x H x W.
    pub latent_elements: u64,
    /// Trained parameters of a full student; an upper bound for adapters.
    pub teacher_parameters: u64,
}

/// Makes the plan.
pub fn build(recipe: &Recipe, facts: &Facts) -> Plan {
    let mut stages = vec![trajectories(recipe, facts)];
    let first_student = stages.len();
    for stage in &recipe.stages {
        let parent = stage.from.map(|at| first_student + at);
        stages.push(distill(recipe, stage, parent));
    }
    let last_student = stages.len() - 1;
    if let Some(evaluate) = &recipe.evaluate {
        let reference = stages.len();
        stages.push(reference_stage(evaluate, facts));
        let after = (first_student..=last_student).chain([reference]).collect();
        stages.push(evaluation(recipe, evaluate, after));
    }
    if recipe.export.is_some() {
        stages.push(export(facts, last_student));
    }
    Plan { stages }
}

fn trajectories(recipe: &Recipe, facts: &Facts) -> Stage {
    let wanted = &recipe.trajectories;
    let count = wanted.count.div_ceil(wanted.shard_trajectories).max(1);
    // One kept state for each segment, and the clean end (algorithm.md §3).
    let rows = wanted.count * (u64::from(wanted.segments) + 1);
    // A row holds the state and the guided prediction, two bytes a number.
    let row_bytes = 2 * 2 * facts.latent_elements;
    Stage {
        name: TRAJECTORIES.into(),
        kind: Kind::Trajectories,
        after: vec![],
        work: Work::Tasks(Tasks {
            count,
            rows,
            bytes: rows * row_bytes,
            quarantine_limit: (count as f64 * wanted.quarantine) as u64,
        }),
    }
}

fn distill(recipe: &Recipe, stage: &recipe::Stage, parent: Option<usize>) -> Stage {
    let most = u32::try_from(stage.batch.global).unwrap_or(u32::MAX).max(1);
    let max_world = recipe.cluster.max_workers.clamp(1, most);
    Stage {
        name: stage.name.clone(),
        kind: Kind::Distill,
        after: [0].into_iter().chain(parent).collect(),
        work: Work::Training(Training {
            steps: stage.steps,
            checkpoint_every: recipe.checkpoint.every_steps,
            keep_last: recipe.checkpoint.keep_last.max(1),
            global_batch: stage.batch.global,
            reproducible: stage.batch.virtual_ranks.is_some(),
            min_world: recipe.cluster.min_workers.clamp(1, max_world),
            max_world,
            parent,
        }),
    }
}

fn reference_stage(evaluate: &recipe::Evaluate, facts: &Facts) -> Stage {
    let columns = evaluate.teacher_steps.len() as u64;
    let rows = evaluate.samples * columns;
    Stage {
        name: REFERENCE.into(),
        kind: Kind::Reference,
        after: vec![],
        work: Work::Tasks(Tasks {
            count: evaluate.samples.div_ceil(evaluate.reference_block()).max(1),
            rows,
            bytes: rows * 4 * facts.latent_elements,
            quarantine_limit: 0,
        }),
    }
}

fn evaluation(recipe: &Recipe, evaluate: &recipe::Evaluate, after: Vec<usize>) -> Stage {
    let students = recipe.stages.len() as u64;
    let columns = (evaluate.steps.len() * evaluate.samplers.len()) as u64;
    Stage {
        name: EVALUATE.into(),
        kind: Kind::Evaluate,
        after,
        work: Work::Tasks(Tasks {
            // The teacher, the undistilled teacher under the student's samplers, and each student.
            count: students + 2,
            rows: evaluate.samples * columns * (students + 1),
            bytes: 0,
            quarantine_limit: 0,
        }),
    }
}

fn export(facts: &Facts, student: usize) -> Stage {
    Stage {
        name: EXPORT.into(),
        kind: Kind::Export,
        after: vec![student],
        work: Work::Tasks(Tasks {
            count: 1,
            rows: 1,
            bytes: 2 * facts.teacher_parameters,
            quarantine_limit: 0,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A plan with these stages, an evaluation and an export.
    fn plan(stages: &str) -> Plan {
        let text = format!(
            "version: 1\nname: x\noutput: runs/x\nteacher: {{model: t}}\nprompts: {{train: p.txt}}\n\
             evaluate: true\nstages: [{stages}]\n"
        );
        let recipe = recipe::parse(&text, "x.yaml", Path::new("/"), &[]).expect("a recipe");
        let facts = Facts {
            latent_elements: 4,
            teacher_parameters: 10,
        };
        build(&recipe, &facts)
    }

    /// What the stage called `name` comes after, and what it starts from.
    fn lineage<'p>(plan: &'p Plan, name: &str) -> (Vec<&'p str>, Option<&'p str>) {
        let name_of = |at: usize| plan.stages[at].name.as_str();
        let stage = &plan.stages[plan.position(name).expect("a stage")];
        let parent = match &stage.work {
            Work::Tasks(_) => None,
            Work::Training(training) => training.parent.map(name_of),
        };
        (stage.after.iter().copied().map(name_of).collect(), parent)
    }

    #[test]
    fn stages_follow_each_other_unless_said_otherwise() {
        let plan = plan("{name: a, segments: 8, steps: 1}, {name: b, segments: 4, steps: 1}");
        assert_eq!(lineage(&plan, "a"), (vec!["trajectories"], None));
        assert_eq!(lineage(&plan, "b"), (vec!["trajectories", "a"], Some("a")));
    }

    #[test]
    fn a_stage_waits_for_what_it_starts_from_and_for_nothing_else() {
        let plan = plan(
            "{name: a, segments: 8, steps: 1}, {name: b, segments: 4, steps: 1}, \
             {name: c, method: lcm, from: teacher, steps: 1}, {name: d, segments: 2, steps: 1, from: a}",
        );
        assert_eq!(lineage(&plan, "c"), (vec!["trajectories"], None));
        assert_eq!(lineage(&plan, "d"), (vec!["trajectories", "a"], Some("a")));
        let everybody = vec!["a", "b", "c", "d", "reference"];
        assert_eq!(lineage(&plan, "evaluate"), (everybody, None));
        assert_eq!(lineage(&plan, "export"), (vec!["d"], None), "the last one");
    }
}
