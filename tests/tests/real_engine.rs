//! A whole recipe through the real coordinator, workers and engines: everything that it promises is there, and kills
//! change none of it.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use distillery_common::figures::{Figure, TEACHER, UNDISTILLED, UNDISTILLED_GUIDED};
use distillery_common::run::RunRecord;
use distillery_tests::harness::{EngineKind, Made, Run, Target, repository, signal};
use serde_json::Value;

/// Minutes, where a quiet machine needs seconds.
const PATIENCE: Duration = Duration::from_secs(300);

fn tiny(folder: &tempfile::TempDir) -> Run {
    let recipe = repository().join("configs/tiny.yaml");
    Run::of_file(folder.path(), &recipe, EngineKind::Real).expect("the programs are built")
}

fn json(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The recipe as the run holds it, with all defaults.
fn recipe(run: &Run) -> Value {
    let bytes = std::fs::read(run.output().join("run.json")).expect("a run record");
    RunRecord::from_bytes(&bytes).expect("sound").recipe
}

/// The entries of a list of the recipe, as text.
fn words(list: &Value) -> Vec<String> {
    let list = list.as_array().expect("a list").iter();
    list.map(|entry| {
        entry
            .as_str()
            .map_or_else(|| entry.to_string(), str::to_owned)
    })
    .collect()
}

/// `model sampler steps metric` of everything that the recipe asks to be measured.
fn asked(recipe: &Value) -> BTreeSet<String> {
    let evaluate = &recipe["evaluate"];
    let [samplers, steps, teacher_steps, metrics] =
        ["samplers", "steps", "teacher_steps", "metrics"].map(|key| words(&evaluate[key]));
    assert!(
        metrics.len() >= 3,
        "tiny.yaml measures everything: {metrics:?}"
    );
    let stages = recipe["stages"].as_array().expect("stages").iter();
    let students = stages.map(|stage| stage["name"].as_str().expect("a name"));
    let mut rows = vec![(TEACHER, "ddim", &teacher_steps)];
    for model in [UNDISTILLED, UNDISTILLED_GUIDED]
        .into_iter()
        .chain(students)
    {
        rows.extend(
            samplers
                .iter()
                .map(|sampler| (model, sampler.as_str(), &steps)),
        );
    }
    let mut asked = BTreeSet::new();
    for (model, sampler, steps) in rows {
        for step in steps {
            asked.extend(
                metrics
                    .iter()
                    .map(|m| format!("{model} {sampler} {step} {m}")),
            );
        }
    }
    asked
}

fn has_every_figure(run: &Run) {
    let metrics = json(&run.output().join("report/metrics.json"));
    let figures: Vec<Figure> = serde_json::from_value(metrics).expect("figures");
    let name = |f: &Figure| format!("{} {} {} {}", f.model, f.sampler, f.steps, f.metric);
    let found: BTreeSet<String> = figures.iter().map(name).collect();
    assert_eq!(found, asked(&recipe(run)));
    assert_eq!(found.len(), figures.len(), "no figure is there twice");
    for figure in &figures {
        assert!(figure.value.is_finite(), "{figure:?}");
        if let Some((low, high)) = figure.interval {
            assert!(
                low.is_finite() && high.is_finite() && low <= high,
                "{figure:?}"
            );
        }
    }
}

fn has_its_report(run: &Run) {
    let report = run.output().join("report");
    let page = std::fs::read_to_string(report.join("report.html")).expect("a page");
    let is_whole = page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>");
    assert!(is_whole, "{page:.60}");
    for stage in ["seg8", "seg4", "seg2"] {
        assert!(page.contains(stage), "the page shows {stage}");
        let grid = report.join(format!("grid-{stage}.png"));
        let png = std::fs::read(&grid).unwrap_or_else(|e| panic!("{}: {e}", grid.display()));
        assert!(
            png.starts_with(b"\x89PNG\r\n"),
            "{} is a picture",
            grid.display()
        );
    }
}

/// Every file of a pipeline folder that other programs load, and the adapters.
fn has_its_export(run: &Run) {
    let export = run.output().join("export/seg2");
    for file in [
        "diffusers/README.md",
        "diffusers/model_index.json",
        "diffusers/scheduler/scheduler_config.json",
        "diffusers/text_encoder/config.json",
        "diffusers/text_encoder/model.safetensors",
        "diffusers/tokenizer/merges.txt",
        "diffusers/tokenizer/vocab.json",
        "diffusers/unet/config.json",
        "diffusers/unet/diffusion_pytorch_model.safetensors",
        "diffusers/vae/config.json",
        "diffusers/vae/diffusion_pytorch_model.safetensors",
        "seg2-lora.safetensors",
    ] {
        let path = export.join(file);
        let length = std::fs::metadata(&path).map(|meta| meta.len());
        let length = length.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(length > 0, "{} is empty", path.display());
    }
    let index = json(&export.join("diffusers/model_index.json"));
    assert_eq!(index["scheduler"][1], "LCMScheduler");
}

/// Runs the recipe in peace, checks all it leaves behind, and gives its bits.
fn undisturbed() -> Made {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = tiny(&folder).with_json();
    run.finish(PATIENCE).expect("it finishes");
    run.no_orphans(PATIENCE).expect("all processes end");
    has_every_figure(&run);
    has_its_report(&run);
    has_its_export(&run);
    let summary = json(&run.output().join("report/summary.json"));
    assert_eq!(run.result().expect("one JSON value"), summary);
    assert_eq!(summary["name"], "tiny");
    assert_eq!(summary["trajectory_rows"], 576);
    run.made().expect("readable")
}

#[test]
fn a_recipe_keeps_its_promises_and_kills_change_no_bit() {
    let expected = undisturbed();
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = tiny(&folder);
    run.start().expect("starts");
    // Each kill waits for something that the run writes long before its end, so that it meets work.
    for (written, target) in [
        ("trajectories", Target::Worker),
        ("checkpoints/seg8", Target::Engine),
        ("checkpoints/seg4", Target::Coordinator),
        ("checkpoints/seg2", Target::All),
    ] {
        let path = run.output().join(written);
        run.await_path(&path, PATIENCE).expect("the run gets there");
        run.await_process(target, PATIENCE).expect("a process");
        let killed = run.kill(target, 0).expect("killed");
        assert!(killed > 0, "{target:?} lives after {written}");
        if matches!(target, Target::Coordinator | Target::All) {
            let status = run.wait(PATIENCE).expect("it is gone");
            assert_eq!(status.code(), None, "it was killed: {}", run.log_tail());
            run.no_orphans(PATIENCE).expect("it takes all along");
            run.start().expect("the same command again");
        }
    }
    run.finish(PATIENCE).expect("it finishes");
    assert_eq!(run.made().expect("readable"), expected);
    has_every_figure(&run);
    has_its_report(&run);
    has_its_export(&run);
}

/// A short run: one stage, no evaluation, no export.
fn short(folder: &tempfile::TempDir) -> Run {
    let text = std::fs::read_to_string(repository().join("configs/tiny.yaml")).expect("a recipe");
    let left_out = [
        "evaluate:",
        "preview:",
        "  - {name: seg8",
        "  - {name: seg4",
    ];
    let mut recipe: String = text
        .lines()
        .filter(|line| !left_out.iter().any(|start| line.starts_with(start)))
        .map(|line| format!("{line}\n"))
        .collect();
    recipe.push_str("evaluate: false\nexport: false\n");
    let recipe = recipe
        .replace("teachers/", "{repository}/configs/teachers/")
        .replace("prompts/", "{repository}/configs/prompts/")
        .replace(
            "teacher: {model: {repository}/configs/teachers/scenes",
            "teacher: {model: \"{repository}/configs/teachers/scenes\"",
        )
        .replace("count: 64", "count: 16");
    Run::new(folder.path(), &recipe, EngineKind::Real).expect("the programs are built")
}

#[test]
fn a_broken_checkpoint_is_refused_on_one_screen_and_nothing_is_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = short(&folder);
    run.finish(PATIENCE).expect("it finishes");
    // A damaged checkpoint is passed over for an older one, so that all of them are damaged.
    let stage = run.output().join("checkpoints/seg2");
    for checkpoint in std::fs::read_dir(&stage).expect("checkpoints").flatten() {
        let tensors = checkpoint.path().join("s0000.safetensors");
        let mut bytes = std::fs::read(&tensors).expect("tensors");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&tensors, bytes).expect("writable");
    }
    let out = folder.path().join("out");
    for arguments in [&["export"][..], &["sample", "--prompt", "a red disc"]] {
        let mut command = run.command("coordinator");
        command
            .args(arguments)
            .arg(run.output())
            .arg("--out")
            .arg(&out);
        let output = command.output().expect("starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "{arguments:?} shows no result");
        assert!(said.contains("s0000.safetensors"), "{arguments:?}: {said}");
        assert!(
            said.lines().count() <= 24 && !said.contains("panicked"),
            "{said}"
        );
        assert!(!out.exists(), "{arguments:?} left {}", out.display());
    }
}

#[test]
fn a_teacher_is_sampled_with_guidance_and_one_picture_is_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = short(&folder);
    let out = folder.path().join("out");
    let asked = |more: &[&str]| {
        let mut command = run.command("coordinator");
        command
            .args(["sample", "--prompt", "a red disc", "--steps", "1", "--out"])
            .arg(&out)
            .args(more)
            .arg(repository().join("configs/teachers/scenes"));
        command.output().expect("starts")
    };
    let refused = asked(&[]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success(), "{said}");
    assert!(said.contains("by --guidance"), "{said}");
    let drawn = asked(&["--guidance", "1"]);
    let said = String::from_utf8_lossy(&drawn.stdout).into_owned()
        + &String::from_utf8_lossy(&drawn.stderr);
    assert!(drawn.status.success(), "{said}");
    assert!(said.contains("1 picture by ddim: "), "{said}");
}

/// A run of `elastic.yaml`'s first stage, of `steps` steps with a checkpoint every `every`, on `workers` engines.
fn first_stage(workers: u32, steps: u32, every: u32, sharded: bool) -> String {
    include_str!("../recipes/elastic.yaml")
        .replace("steps: 40", &format!("steps: {steps}"))
        .replace("  - {name: seg4, segments: 4, steps: 30}\n", "")
        .replace(
            "checkpoint: {every_steps: 10}",
            &format!("checkpoint: {{every_steps: {every}, sharded: {sharded}}}"),
        )
        .replace(
            "{launcher: external, workers: {min: 1, max: 4}}",
            &format!("{{launcher: local, workers: {{min: {workers}, max: {workers}}}}}"),
        )
}

/// Every engine of a group writes its share when the run is stopped, and all shares are of one step.
#[test]
fn a_stopped_run_that_saves_in_shares_goes_on_where_it_stood() {
    let start = |folder: &tempfile::TempDir, sharded| {
        let recipe = first_stage(2, 120, 1000, sharded);
        let mut run = Run::new(folder.path(), &recipe, EngineKind::Real).expect("the programs");
        run.start().expect("it starts");
        run
    };
    let folder = tempfile::tempdir().expect("a folder");
    let mut whole = start(&folder, false);
    whole.finish(PATIENCE).expect("it finishes");
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = start(&folder, true);
    let trains = || run.log().contains("seg8: training ").then_some(());
    run.await_some(trains, "step", PATIENCE).expect("it trains");
    let coordinator = run.processes_of(Target::Coordinator)[0];
    signal(coordinator, "INT").expect("it lives");
    let ended = run.wait(PATIENCE).expect("it stops");
    assert_eq!(ended.code(), Some(75), "{}", run.log_tail());
    let stage = run.output().join("checkpoints/seg8");
    let saved: Vec<_> = std::fs::read_dir(&stage)
        .expect("a checkpoint")
        .flatten()
        .filter(|folder| folder.path().join("COMMIT").exists())
        .collect();
    assert_eq!(saved.len(), 1, "{}", run.log_tail());
    run.start().expect("it starts again");
    run.finish(PATIENCE).expect("it finishes");
    assert_eq!(
        run.made().expect("a student"),
        whole.made().expect("a student")
    );
}

/// The worker that asks for a COMMIT stands still for a while. Whoever left before it is there would end the group, and with it
/// the right to commit.
#[test]
fn whoever_leaves_waits_for_the_commit_of_the_slowest() {
    for sharded in [true, false] {
        let folder = tempfile::tempdir().expect("a folder");
        let recipe = first_stage(3, 400, 1000, sharded).replace("min: 3", "min: 1");
        let mut run = Run::new(folder.path(), &recipe, EngineKind::Real).expect("built");
        run.start().expect("it starts");
        let trains = || run.log_tail().contains("seg8: training ").then_some(());
        run.await_some(trains, "step", PATIENCE).expect("it trains");
        let log = |name: &str| {
            let path = run.output().join(format!("logs/{name}.log"));
            std::fs::read_to_string(path).unwrap_or_default()
        };
        let names = ["local-0", "local-1", "local-2"];
        let (first, others): (Vec<_>, Vec<_>) = names
            .into_iter()
            .partition(|name| log(name).contains("generation 1 rank=0 "));
        let commanded = |name: &str| {
            let is_of = |pid: &u32| {
                let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
                line.is_ok_and(|line| line.split('\0').any(|word| word == name))
            };
            run.processes_of(Target::Worker).into_iter().find(is_of)
        };
        let stopped = commanded(first[0]).expect("the worker of rank 0");
        signal(stopped, "STOP").expect("it lives");
        let mut drain = run.command("coordinator");
        drain.arg("drain").arg(run.output()).arg(others[0]);
        let drained = drain.output().expect("it starts");
        assert!(drained.status.success(), "{drained:?}");
        let stage = run.output().join("checkpoints/seg8");
        let folders = || {
            std::fs::read_dir(&stage)
                .ok()
                .into_iter()
                .flatten()
                .flatten()
        };
        let written = || folders().any(|f| f.path().join("metrics.jsonl").exists());
        run.await_some(|| written().then_some(()), "state", PATIENCE)
            .expect("rank 0 writes");
        // Time enough for those who do not wait.
        std::thread::sleep(Duration::from_secs(2));
        signal(stopped, "CONT").expect("it lives");
        let committed = || folders().any(|f| f.path().join("COMMIT").exists());
        run.await_some(|| committed().then_some(()), "COMMIT", PATIENCE)
            .expect("rank 0 commits");
        let log = log(first[0]);
        assert!(!log.contains("killing the engine"), "{log}");
        let saved: Vec<_> = folders().map(|folder| folder.file_name()).collect();
        assert!(
            saved
                .iter()
                .all(|name| name.to_string_lossy().ends_with("-g1")),
            "{saved:?}"
        );
    }
}

/// Where a member leaves, all stop after the same step and write their shares: what the others need is in the checkpoint.
#[test]
fn one_that_is_drained_leaves_a_checkpoint_in_shares_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let recipe = |workers, sharded| {
        let recipe = first_stage(workers, 120, 1000, sharded);
        recipe.replace(&format!("min: {workers}"), "min: 1")
    };
    let mut whole = Run::new(folder.path(), &recipe(1, false), EngineKind::Real).expect("built");
    whole.finish(PATIENCE).expect("it finishes");
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = Run::new(folder.path(), &recipe(3, true), EngineKind::Real).expect("built");
    run.start().expect("it starts");
    let trains = || run.log().contains("seg8: training ").then_some(());
    run.await_some(trains, "step", PATIENCE).expect("it trains");
    let mut drain = run.command("coordinator");
    drain.arg("drain").arg(run.output()).arg("local-1");
    let drained = drain.output().expect("it starts");
    assert!(drained.status.success(), "{drained:?}");
    let stage = run.output().join("checkpoints/seg8");
    let is_saved = || {
        let folders = std::fs::read_dir(&stage).ok()?.flatten();
        let mut names = folders.filter(|folder| folder.path().join("COMMIT").exists());
        names.find_map(|folder| folder.file_name().into_string().ok())
    };
    let saved = run.await_some(is_saved, "checkpoint", PATIENCE);
    let saved = saved.expect("the members save their shares");
    assert!(
        !saved.starts_with("0000000120"),
        "{saved} is the last one: {}",
        run.log_tail()
    );
    run.finish(PATIENCE).expect("it finishes");
    assert_eq!(
        run.made().expect("a student"),
        whole.made().expect("a student")
    );
}

/// Four engines write a checkpoint in shares; one, two and three go on from it, to the student of those that never shared.
#[test]
fn a_checkpoint_in_shares_is_read_by_any_number_of_engines() {
    let recipe = |workers, sharded| first_stage(workers, 12, 4, sharded);
    let start = |folder: &tempfile::TempDir, workers, sharded| {
        let run = Run::new(folder.path(), &recipe(workers, sharded), EngineKind::Real);
        run.expect("the programs are built")
    };
    let folder = tempfile::tempdir().expect("a folder");
    let mut whole = start(&folder, 2, false);
    whole.finish(PATIENCE).expect("it finishes");
    let expected = whole.made().expect("a student");
    for workers in 1..=3 {
        let folder = tempfile::tempdir().expect("a folder");
        let mut run = start(&folder, 4, true);
        run.start().expect("it starts");
        let checkpoint = run.output().join("checkpoints/seg8/0000000004-g1");
        run.await_path(&checkpoint.join("COMMIT"), PATIENCE)
            .expect("a checkpoint");
        run.kill(Target::All, 0).expect("it can be killed");
        run.wait(PATIENCE).expect("it is dead");
        run.no_orphans(PATIENCE).expect("all are");
        let wrote = |rank: u32| {
            let name = format!("r{rank:04}-s");
            let files = std::fs::read_dir(&checkpoint).expect("a folder").flatten();
            files
                .filter(|file| file.file_name().to_string_lossy().starts_with(&name))
                .count()
        };
        assert!(
            (0..4).all(|rank| wrote(rank) > 0),
            "each rank wrote its share"
        );
        let repository = repository().display().to_string();
        let text = recipe(workers, true).replace("{repository}", &repository);
        std::fs::write(folder.path().join("recipe.yaml"), text).expect("a recipe");
        run.start().expect("it starts again");
        run.finish(PATIENCE).expect("it finishes");
        assert_eq!(
            run.made().expect("a student"),
            expected,
            "{workers} engines"
        );
    }
}
