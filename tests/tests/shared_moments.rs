//! Real engines that share the moments of AdamW out make the students of those that do not, and go on from what they save.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use distillery_common::curves::{StepRecord, from_jsonl};
use distillery_tests::harness::{EngineKind, Made, Run, Target, repository};

/// Minutes, where a quiet machine needs seconds.
const PATIENCE: Duration = Duration::from_secs(300);
/// Steps of the only stage.
const STEPS: u64 = 12;
/// Steps between checkpoints.
const EVERY: u64 = 4;

/// How the only stage of `elastic.yaml` is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Way {
    workers: u32,
    reproducible: bool,
    shared: bool,
}

impl Way {
    fn recipe(self, steps: u64) -> String {
        let Self {
            workers,
            reproducible,
            shared,
        } = self;
        let batch = match reproducible {
            true => "reproducible: true, virtual_ranks: 4",
            false => "reproducible: false",
        };
        let changes = [
            ("steps: 40", format!("steps: {steps}")),
            ("  - {name: seg4, segments: 4, steps: 30}\n", String::new()),
            ("reproducible: true, virtual_ranks: 4", batch.to_owned()),
            (
                "checkpoint: {every_steps: 10}",
                format!(
                    "checkpoint: {{every_steps: {EVERY}, sharded: {shared}}}\noptimizer: {{sharded: {shared}, grad_clip: 0.1}}"
                ),
            ),
            (
                "{launcher: external, workers: {min: 1, max: 4}}",
                format!("{{launcher: local, workers: {{min: {workers}, max: {workers}}}}}"),
            ),
        ];
        let recipe = include_str!("../recipes/elastic.yaml").to_owned();
        changes.iter().fold(recipe, |recipe, (from, to)| {
            assert_eq!(recipe.matches(from).count(), 1, "{from}");
            recipe.replace(from, to)
        })
    }

    fn run(self, folder: &Path, steps: u64) -> Run {
        Run::new(folder, &self.recipe(steps), EngineKind::Real).expect("the programs are built")
    }

    /// What comes of it in peace.
    fn made(self) -> Made {
        let folder = tempfile::tempdir().expect("a folder");
        let mut run = self.run(folder.path(), STEPS);
        run.finish(PATIENCE).expect("it finishes");
        run.made().expect("a student")
    }
}

/// What `workers` engines make that share nothing out.
fn whole(workers: u32, reproducible: bool) -> Way {
    Way {
        workers,
        reproducible,
        shared: false,
    }
}

fn shared(workers: u32, reproducible: bool) -> Way {
    Way {
        shared: true,
        ..whole(workers, reproducible)
    }
}

#[test]
fn students_are_those_of_engines_that_share_nothing_out() {
    let expected = whole(2, true).made();
    for workers in 1..=4 {
        assert_eq!(shared(workers, true).made(), expected, "{workers} engines");
    }
    let mut students = BTreeMap::new();
    for workers in 2..=4 {
        let expected = whole(workers, false).made();
        let found = shared(workers, false).made();
        assert_eq!(found, expected, "{workers} engines");
        students.insert(found.students["seg8"].to_string(), workers);
    }
    // Or the last ones might all be the same for want of learning.
    assert!(students.len() > 1, "{students:?}");
}

#[test]
fn what_four_engines_saved_is_gone_on_from_by_any_number() {
    // Long enough for the kill to come before the end.
    const STEPS: u64 = 40;
    let folder = tempfile::tempdir().expect("a folder");
    let mut peaceful = whole(1, true).run(folder.path(), STEPS);
    peaceful.finish(PATIENCE).expect("it finishes");
    let expected = peaceful.made().expect("a student");
    for workers in 1..=3 {
        let folder = tempfile::tempdir().expect("a folder");
        let mut run = shared(4, true).run(folder.path(), STEPS);
        run.start().expect("it starts");
        let checkpoint = run.output().join("checkpoints/seg8/0000000004-g1/COMMIT");
        run.await_path(&checkpoint, PATIENCE).expect("a checkpoint");
        run.kill(Target::All, 0).expect("it can be killed");
        run.wait(PATIENCE).expect("it is dead");
        run.no_orphans(PATIENCE).expect("all are");
        let repository = repository().display().to_string();
        let recipe = shared(workers, true).recipe(STEPS);
        let recipe = recipe.replace("{repository}", &repository);
        std::fs::write(folder.path().join("recipe.yaml"), recipe).expect("a recipe");
        run.start().expect("it starts again");
        run.finish(PATIENCE).expect("it finishes");
        assert_eq!(
            run.made().expect("a student"),
            expected,
            "{workers} engines"
        );
        let curve = curve(&run, STEPS);
        let mut worlds = curve.iter().map(|record| record.world);
        let first = worlds.next();
        let after = worlds.find(|&world| world != 4);
        assert_eq!((first, after), (Some(4), Some(workers)));
        assert_eq!(
            curve.last().map(|record| record.world),
            Some(workers),
            "others went on"
        );
    }
}

/// The curve of the stage's final checkpoint.
fn curve(run: &Run, steps: u64) -> Vec<StepRecord> {
    let stage = run.output().join("checkpoints/seg8");
    let last = format!("{steps:010}-g");
    let folders = std::fs::read_dir(stage).expect("checkpoints").flatten();
    let mut last = folders.filter(|folder| folder.file_name().to_string_lossy().starts_with(&last));
    let folder = last.next().expect("a final checkpoint").path();
    let curve = std::fs::read(folder.join("metrics.jsonl")).expect("a curve");
    from_jsonl(&curve).expect("records of steps")
}

#[test]
fn a_group_that_loses_an_engine_goes_on_from_a_checkpoint_to_the_same_student() {
    const LONG: u64 = 60;
    let folder = tempfile::tempdir().expect("a folder");
    let mut peaceful = whole(1, true).run(folder.path(), LONG);
    peaceful.finish(PATIENCE).expect("it finishes");
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = shared(3, true).run(folder.path(), LONG);
    run.start().expect("it starts");
    let checkpoint = run.output().join("checkpoints/seg8/0000000004-g1/COMMIT");
    run.await_path(&checkpoint, PATIENCE).expect("a checkpoint");
    assert_eq!(run.kill(Target::Engine, 1).expect("it can be killed"), 1);
    run.finish(PATIENCE).expect("it finishes");
    assert_eq!(
        run.made().expect("a student"),
        peaceful.made().expect("a student")
    );
    let curve = curve(&run, LONG);
    let began: Vec<u64> = curve
        .windows(2)
        .filter(|pair| pair[0].generation < pair[1].generation)
        .map(|pair| pair[0].step)
        .collect();
    assert!(!began.is_empty(), "another group took over");
    for step in began {
        assert_eq!(step % EVERY, 0, "it went on from a checkpoint");
    }
}
