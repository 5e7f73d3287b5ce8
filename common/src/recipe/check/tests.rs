use std::path::Path;

use serde_json::json;

use super::super::table::{Kind, RECIPE, Section};
use super::super::{
    Code, Faults, Holdout, Launcher, Method, Recipe, StudentKind, TeacherStep, Tls, parse,
};
use super::LCM_TARGETS;
use crate::ids::Digest;

const SMALL: &str = "
version: 1
name: small
output: /runs/small
teacher: {model: teacher}
prompts: {train: train.txt}
stages:
  - {name: seg8, segments: 8, steps: 10}
";

fn try_read(text: &str, sets: &[&str]) -> Result<Recipe, Faults> {
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    parse(text, "r.yaml", Path::new("/work"), &sets)
}

fn read(text: &str, sets: &[&str]) -> Recipe {
    match try_read(text, sets) {
        Ok(recipe) => recipe,
        Err(faults) => panic!("{faults}"),
    }
}

/// The codes and paths of what is wrong with `SMALL` after `sets`.
fn faults_of(sets: &[&str]) -> Vec<(Code, String)> {
    match try_read(SMALL, sets) {
        Ok(_) => Vec::new(),
        Err(faults) => faults
            .list()
            .iter()
            .map(|f| (f.code, f.path.clone()))
            .collect(),
    }
}

fn check_one(sets: &[&str], code: Code, path: &str) {
    assert_eq!(faults_of(sets), [(code, path.to_owned())], "{sets:?}");
}

/// Also proves every default of the table.
#[test]
fn a_few_lines_are_a_recipe() {
    let recipe = read(SMALL, &[]);
    assert_eq!(recipe.teacher.model, Path::new("/work/teacher"));
    assert_eq!(recipe.prompts.holdout, Holdout::Share(0.01));
    assert_eq!(recipe.output, "file:///runs/small");
    assert_eq!(recipe.stages[0].skip, 25);
    assert_eq!(recipe.stages[0].optimizer.warmup, 1);
    assert_eq!(recipe.cluster.tls, Tls::On);
    assert!(recipe.evaluate.is_none() && recipe.export.is_some());
    let StudentKind::Lora { targets, .. } = &recipe.stages[0].student.kind else {
        panic!("adapters are the default");
    };
    assert_eq!(targets, &LCM_TARGETS);
}

#[test]
fn switches_take_false_true_and_sections() {
    for (set, samples) in [
        ("evaluate=false", None),
        ("evaluate=true", Some(2000)),
        ("evaluate={samples: 4}", Some(4)),
    ] {
        let evaluate = read(SMALL, &[set]).evaluate;
        assert_eq!(evaluate.map(|e| e.samples), samples, "{set}");
    }
    assert!(read(SMALL, &["export=false"]).export.is_none());
}

#[test]
fn a_stage_overrides_single_keys_of_what_it_inherits() {
    let recipe = read(
        SMALL,
        &[
            "optimizer={lr: 0.5, betas: [0.1, 0.2], schedule: {kind: cosine}}",
            "stages.seg8.optimizer={lr: 0.25, schedule: {warmup: 3}}",
        ],
    );
    let optimizer = &recipe.stages[0].optimizer;
    assert_eq!(
        (optimizer.lr, optimizer.betas, optimizer.warmup),
        (0.25, (0.1, 0.2), 3)
    );
    assert_eq!(optimizer.schedule, super::super::RateSchedule::Cosine);
}

#[test]
fn an_inherited_key_of_another_kind_is_dropped_and_a_given_one_refused() {
    let sets = ["loss={kind: huber, c: 0.5}", "stages.0.loss={kind: l2}"];
    assert_eq!(read(SMALL, &sets).stages[0].loss, super::super::Loss::L2);
    check_one(&["loss={kind: l2, c: 0.5}"], Code::NotApplicable, "loss.c");
    check_one(
        &["student={kind: full, lora_rank: 4}"],
        Code::NotApplicable,
        "student.lora_rank",
    );
}

#[test]
fn one_mistake_is_told_once() {
    check_one(
        &["trajectories.segments=eight"],
        Code::WrongType,
        "trajectories.segments",
    );
    check_one(
        &["stages.0.segments=0"],
        Code::OutOfRange,
        "stages.0.segments",
    );
    check_one(&["optimizer.lr=fast"], Code::WrongType, "optimizer.lr");
    check_one(&["stages=3"], Code::WrongType, "stages");
    check_one(&["teacher=3"], Code::WrongType, "teacher");
    check_one(&["cluster=[1]"], Code::WrongType, "cluster");
    check_one(
        &["optimizer.betas=[0.9, 2]"],
        Code::OutOfRange,
        "optimizer.betas.1",
    );
}

#[test]
fn all_mistakes_are_told_at_once() {
    let found = faults_of(&[
        "seed=-1",
        "teacher.modle=x",
        "stages.0.steps=1.5",
        "loss.kind=l3",
        "seed2=1",
    ]);
    let codes: Vec<Code> = found.into_iter().map(|(code, _)| code).collect();
    let expected = [
        Code::OutOfRange,
        Code::UnknownKey,
        Code::WrongType,
        Code::UnknownWord,
        Code::UnknownKey,
    ];
    assert_eq!(codes, expected);
}

/// Milestones 125 k - 1 lie on grids of 8, 40, 200 and 1000 times, not on the 50 of the paper's skip.
#[test]
fn grids_hold_the_milestones_and_skips_stay_on_them() {
    for (grid, skip) in [
        ("40", "25"),
        ("40", "50"),
        ("200", "5"),
        ("1000", "20"),
        ("none", "20"),
        ("8", "125"),
    ] {
        read(
            SMALL,
            &[
                &format!("trajectories.time_grid={grid}"),
                &format!("stages.0.skip={skip}"),
            ],
        );
    }
    check_one(
        &["trajectories.time_grid=50"],
        Code::Grid,
        "trajectories.time_grid",
    );
    check_one(
        &["trajectories.time_grid=48"],
        Code::Grid,
        "trajectories.time_grid",
    );
    check_one(&["stages.0.skip=20"], Code::Skip, "stages.0.skip");
    let five = [
        "trajectories.segments=5",
        "trajectories.time_grid=50",
        "stages.0.segments=5",
    ];
    assert_eq!(read(SMALL, &five).stages[0].skip, 20);
}

#[test]
fn segments_divide_each_other_and_what_is_stored() {
    check_one(
        &["stages.0.segments=16"],
        Code::Segments,
        "stages.0.segments",
    );
    check_one(
        &["stages.0.segments=3"],
        Code::Segments,
        "stages.0.segments",
    );
    let second = "stages=[{name: a, segments: 4, steps: 1}, {name: b, segments: 8, steps: 1}]";
    check_one(&[second], Code::Segments, "stages.1.segments");
    let mixed =
        "stages=[{name: a, segments: 2, steps: 1}, {name: b, method: mcd, segments: 8, steps: 1}]";
    assert_eq!(read(SMALL, &[mixed]).stages[1].method, Method::Mcd);
}

#[test]
fn sharded_moments_need_sharded_checkpoints() {
    check_one(
        &["optimizer.sharded=true"],
        Code::Moments,
        "stages.0.optimizer.sharded",
    );
    let one = "stages.0.optimizer={sharded: true}";
    check_one(&[one], Code::Moments, "stages.0.optimizer.sharded");
    let both = read(SMALL, &["checkpoint.sharded=true", one]);
    assert!(both.stages[0].optimizer.sharded && both.checkpoint.sharded);
}

#[test]
fn methods_know_their_segments() {
    let lcm = read(
        SMALL,
        &["stages=[{name: x, method: lcm, steps: 1, teacher_step: online}]"],
    );
    assert_eq!(lcm.stages[0].segments, 1);
    assert_eq!(lcm.stages[0].teacher_step, TeacherStep::Online);
    check_one(&["stages.0.method=lcm"], Code::Method, "stages.0.segments");
    check_one(
        &["stages=[{name: x, method: mcd, steps: 1}]"],
        Code::Missing,
        "stages.0.segments",
    );
}

#[test]
fn batches_are_shared_out_evenly() {
    check_one(
        &["cluster.workers={min: 1, max: 32}"],
        Code::Batch,
        "stages.0.batch.global",
    );
    check_one(
        &[
            "batch={global: 32, reproducible: true, virtual_ranks: 3}",
            "cluster.workers={min: 1, max: 4}",
        ],
        Code::Batch,
        "stages.0.batch.virtual_ranks",
    );
    check_one(
        &["batch={global: 6, reproducible: true, virtual_ranks: 8}"],
        Code::Batch,
        "stages.0.batch.virtual_ranks",
    );
    // Shares need not be even, nor filled by whole forward passes: the mean is over the batch, whoever has how many.
    let uneven = &[
        "cluster.workers={min: 1, max: 3}",
        "batch={global: 16, micro: 5}",
    ];
    assert_eq!(read(SMALL, uneven).stages[0].batch.virtual_ranks, None);
    let reproducible = read(SMALL, &["batch.reproducible=true"]);
    assert_eq!(reproducible.stages[0].batch.virtual_ranks, Some(8));
    let stored = Recipe::from_stored(&reproducible.to_stored()).expect("its own form");
    assert_eq!(stored.stages[0].batch, reproducible.stages[0].batch);
    check_one(
        &["cluster.workers={min: 4, max: 2}"],
        Code::OutOfRange,
        "cluster.workers.max",
    );
    read(
        SMALL,
        &[
            "cluster.workers={min: 2, max: 4}",
            "batch={global: 24, micro: 2}",
        ],
    );
}

#[test]
fn students_keep_their_shape() {
    let stages = |a: &str, b: &str| {
        format!(
            "stages=[{{name: a, segments: 8, steps: 1, student: {a}}}, {{name: b, segments: 4, steps: 1, student: {b}}}]"
        )
    };
    let path = "stages.1.student";
    check_one(
        &[&stages("{kind: full}", "{}")],
        Code::Student,
        &format!("{path}.kind"),
    );
    check_one(
        &[&stages("{}", "{kind: full}")],
        Code::Student,
        &format!("{path}.kind"),
    );
    check_one(
        &[&stages("{}", "{lora_rank: 4}")],
        Code::Student,
        &format!("{path}.lora_rank"),
    );
    check_one(
        &[&stages("{}", "{lora_alpha: 4}")],
        Code::Student,
        &format!("{path}.lora_alpha"),
    );
    check_one(
        &[&stages("{}", "{targets: [to_q]}")],
        Code::Student,
        &format!("{path}.targets"),
    );
    read(
        SMALL,
        &[&stages("{kind: full}", "{kind: full, ema: {decay: 0.9}}")],
    );
}

/// Five stages: b follows a, c starts afresh, d follows c, e branches off from a.
const BRANCHES: &str = "stages=[{name: a, segments: 8, steps: 1}, {name: b, segments: 4, steps: 1}, \
    {name: c, method: lcm, from: teacher, steps: 1}, {name: d, method: mcd, segments: 4, steps: 1}, \
    {name: e, from: a, segments: 2, steps: 1}]";

#[test]
fn a_stage_starts_from_the_one_before_or_from_what_it_says() {
    let recipe = read(SMALL, &[BRANCHES]);
    let from: Vec<Option<usize>> = recipe.stages.iter().map(|s| s.from).collect();
    assert_eq!(from, [None, Some(0), None, Some(2), Some(0)]);
    let names: Vec<&str> = recipe.stages.iter().map(|s| recipe.origin_of(s)).collect();
    assert_eq!(names, ["teacher", "a", "teacher", "c", "a"]);
}

#[test]
fn a_stage_starts_from_what_is_there_by_then() {
    for bad in ["f", "c", "d", "A"] {
        check_branches(&[&format!("stages.c.from={bad}")], "stages.2.from");
    }
    check_branches(&["stages.a.from=a"], "stages.0.from");
    check_branches(&["stages.a.from=b"], "stages.0.from");
}

fn check_branches(sets: &[&str], path: &str) {
    let sets = [&[BRANCHES], sets].concat();
    check_one(&sets, Code::Lineage, path);
}

#[test]
fn segments_and_students_are_compared_along_the_lineage() {
    // 8 cannot follow the 4 of b, but the 8 of a.
    let sets = [BRANCHES, "stages.e.from=b", "stages.e.segments=8"];
    check_one(&sets, Code::Segments, "stages.4.segments");
    read(SMALL, &[BRANCHES, "stages.e.segments=8"]);
    // A full student between adapters disturbs nobody that does not start from it.
    let full = ["stages.c.student={kind: full}", "stages.d.from=a"];
    read(SMALL, &[&[BRANCHES], &full[..]].concat());
    let sets = [BRANCHES, full[0]];
    check_one(&sets, Code::Student, "stages.3.student.kind");
    let rank = ["stages.e.student={lora_rank: 4}"];
    check_one(
        &[&[BRANCHES], &rank[..]].concat(),
        Code::Student,
        "stages.4.student.lora_rank",
    );
    read(SMALL, &[BRANCHES, rank[0], "stages.e.from=teacher"]);
}

#[test]
fn run_uris_are_absolute_and_hold_no_credentials() {
    assert_eq!(
        read(SMALL, &["output=runs/a b"]).output,
        "file:///work/runs/a%20b"
    );
    assert_eq!(read(SMALL, &["output='s3://b/x/'"]).output, "s3://b/x");
    for bad in [
        "memory:///x",
        "s3://k:s@b/x",
        "ftp://b/x",
        "s3://b/x?y",
        "file://x",
    ] {
        check_one(&[&format!("output='{bad}'")], Code::Address, "output");
    }
}

#[test]
fn a_stored_recipe_is_the_same_recipe() {
    for sets in [
        &[][..],
        &[
            "student.kind=full",
            "student.ema={decay: 0.9}",
            "loss.kind=huber",
            "export=false",
        ],
        &[
            "evaluate=true",
            "trajectories.time_grid=none",
            "prompts.holdout=h.txt",
            "prompts.preview=p.txt",
        ],
        &[
            BRANCHES,
            "batch.micro=2",
            "compute.threads=1",
            "seed=18446744073709551615",
        ],
        &[
            "teacher.variant=fp16",
            "optimizer.grad_clip=none",
            "optimizer.lr=3.0e-5",
            "trajectories.uri=s3://b/t",
        ],
        &["cluster.launcher=slurm"],
        &[
            "cluster.launcher=slurm",
            "cluster.slurm={partition: gpu, time: 90, gres: gpu:2, cpus: 4, worker: bin/worker}",
            "cluster.slurm.extra=[--exclude=n7]",
            "cluster.slurm.setup=[module load cuda, \"export A=${B:-c}\"]",
            "cluster.slurm.srun=[--container-image=i.sqsh]",
            "cluster.slurm.container=[apptainer, exec, -B, /a, -B, /b c, i.sif]",
        ],
        &["checkpoint.sharded=true", "optimizer.sharded=true"],
    ] {
        let recipe = read(SMALL, sets);
        let again = Recipe::from_stored(&recipe.to_stored());
        assert_eq!(again.as_ref(), Ok(&recipe), "{sets:?}");
    }
}

#[test]
fn secrets_stay_out_of_what_is_stored_and_shown() {
    let recipe = read(SMALL, &["cluster.token=hunter2"]);
    assert_eq!(
        recipe.cluster.token.as_ref().map(|t| t.reveal()),
        Some("hunter2")
    );
    let stored = recipe.to_stored();
    assert!(!stored.to_string().contains("hunter2"));
    let mut without = recipe.clone();
    without.cluster.token = None;
    assert_eq!(Recipe::from_stored(&stored), Ok(without));
    let faults =
        try_read(SMALL, &["cluster={token: hunter2, launcher: slumr}"]).expect_err("slumr");
    assert!(!faults.to_string().contains("hunter2"));
    assert!(!faults.to_json().to_string().contains("hunter2"));
}

#[test]
fn what_slurm_is_told_is_checked_and_kept() {
    let sets = [
        "cluster.launcher=slurm",
        "cluster.slurm={partition: gpu, time: 1:30:00, gres: gpu:2, devices: \"0,1\", extra: [--exclude=n7]}",
        "cluster.slurm.setup=[module load cuda, \"export A=${B:-c}\", fi, fi]",
    ];
    let recipe = read(SMALL, &sets);
    assert_eq!(recipe.cluster.listen, "0.0.0.0:0");
    assert_eq!(recipe.cluster.tls, Tls::On);
    let Launcher::Slurm(slurm) = &recipe.cluster.launcher else {
        panic!("{:?}", recipe.cluster.launcher);
    };
    assert_eq!(slurm.time.as_deref(), Some("1:30:00"));
    assert_eq!((slurm.engines(), slurm.poll_s), (2, 10));
    assert_eq!(
        slurm.setup,
        ["module load cuda", "export A=${B:-c}", "fi", "fi"]
    );
    let launched = "cluster.launcher=slurm";
    assert_eq!(read(SMALL, &[launched]).cluster.min_workers, 1);
    for (set, code, path) in [
        ("cluster.slurm.partition=a b", Code::OutOfRange, "partition"),
        ("cluster.slurm.time=1h", Code::OutOfRange, "time"),
        ("cluster.slurm.memory=64 G", Code::OutOfRange, "memory"),
        ("cluster.slurm.devices=gpu", Code::UnknownWord, "devices"),
        ("cluster.slurm.extra=[exclude]", Code::OutOfRange, "extra.0"),
        (
            "cluster.slurm.extra=[--array=0-3]",
            Code::NotApplicable,
            "extra.0",
        ),
        ("cluster.slurm.extra=[-J x]", Code::NotApplicable, "extra.0"),
        ("cluster.slurm.partitoin=a", Code::UnknownKey, "partitoin"),
        ("cluster.slurm.setup=[[a]]", Code::WrongType, "setup.0"),
    ] {
        check_one(&[launched, set], code, &format!("cluster.slurm.{path}"));
    }
    let local = ["cluster.slurm.partition=a"];
    check_one(&local, Code::NotApplicable, "cluster.slurm");
    let alone = [launched, "cluster.listen=127.0.0.1:0"];
    check_one(&alone, Code::Address, "cluster.listen");
}

#[test]
fn how_srun_starts_workers_is_checked_and_kept() {
    let launched = "cluster.launcher=slurm";
    let sets = [
        launched,
        "cluster.slurm.srun=[\"--container-mounts=/a b:/c\", -v]",
        "cluster.slurm.container=[apptainer, exec, -B, /a, -B, \"/it's b\", i.sif]",
    ];
    let recipe = read(SMALL, &sets);
    let Launcher::Slurm(slurm) = &recipe.cluster.launcher else {
        panic!("{:?}", recipe.cluster.launcher);
    };
    assert_eq!(slurm.srun, ["--container-mounts=/a b:/c", "-v"]);
    let words = ["apptainer", "exec", "-B", "/a", "-B", "/it's b", "i.sif"];
    assert_eq!(slurm.container, words);
    for (set, code, path) in [
        ("cluster.slurm.srun=[image]", Code::OutOfRange, "srun.0"),
        ("cluster.slurm.srun=[--]", Code::OutOfRange, "srun.0"),
        (
            "cluster.slurm.srun=[--container-image i]",
            Code::OutOfRange,
            "srun.0",
        ),
        (
            "cluster.slurm.srun=[--a=b, \"--c=\\0\"]",
            Code::OutOfRange,
            "srun.1",
        ),
        (
            "cluster.slurm.srun=[--wait=5]",
            Code::NotApplicable,
            "srun.0",
        ),
        ("cluster.slurm.srun=[-N2]", Code::NotApplicable, "srun.0"),
        (
            "cluster.slurm.container=[apptainer exec i.sif]",
            Code::OutOfRange,
            "container.0",
        ),
        (
            "cluster.slurm.container=apptainer exec i.sif",
            Code::WrongType,
            "container",
        ),
        (
            "cluster.slurm.container=[env, \"A=b\\nc\"]",
            Code::OutOfRange,
            "container.1",
        ),
        (
            "cluster.slurm.container=[env, \"\\0\"]",
            Code::OutOfRange,
            "container.1",
        ),
        (
            "cluster.slurm.container=[--nv, i.sif]",
            Code::OutOfRange,
            "container.0",
        ),
    ] {
        check_one(&[launched, set], code, &format!("cluster.slurm.{path}"));
    }
}

#[test]
fn what_pods_are_told_is_checked_and_kept() {
    let launched = "cluster.launcher=kubernetes";
    let image = "cluster.kubernetes.image=registry/worker:1";
    let sets = [
        launched,
        "cluster.kubernetes={image: registry/worker:1, gpus: 4, resources: {memory: 16Gi, cpu: 4}, labels: {team: a}, tolerations: [{key: gpu, effect: NoSchedule}], env_from: [bucket], volumes: [{claim: runs, path: /runs}]}",
    ];
    let recipe = read(SMALL, &sets);
    assert_eq!(recipe.cluster.listen, "0.0.0.0:7070");
    let pods = recipe.cluster.kubernetes.as_ref().expect("pods");
    assert_eq!((pods.pods(9), pods.pods(8), pods.pods(1)), (3, 2, 1));
    assert_eq!(pods.endpoint(7070), "distillery-coordinator:7070");
    assert_eq!(pods.resources["memory"], "16Gi");
    assert_eq!((pods.grace_seconds, pods.unreachable_seconds), (120, 30));
    let stored = recipe.to_stored();
    assert_eq!(Recipe::from_stored(&stored), Ok(recipe));
    for (set, code, path) in [
        ("namespace=Not_A_Name", Code::OutOfRange, "namespace"),
        ("service=coordinator:7070", Code::Address, "service"),
        (
            "resources={memory: 16GB}",
            Code::OutOfRange,
            "resources.memory",
        ),
        ("resources=[cpu]", Code::WrongType, "resources"),
        ("labels={a b: c}", Code::OutOfRange, "labels.a b"),
        ("labels={distillery/run: x}", Code::OutOfRange, "labels"),
        ("gpus=-1", Code::OutOfRange, "gpus"),
        ("node_selektor={a: b}", Code::UnknownKey, "node_selektor"),
    ] {
        let set = format!("cluster.kubernetes.{set}");
        check_one(
            &[launched, image, &set],
            code,
            &format!("cluster.kubernetes.{path}"),
        );
    }
    check_one(&[launched], Code::Missing, "cluster.kubernetes");
    check_one(&[image], Code::NotApplicable, "cluster.kubernetes");
    for listen in ["127.0.0.1:7070", "localhost:7070", "0.0.0.0:0"] {
        let listen = format!("cluster.listen={listen}");
        check_one(&[launched, image, &listen], Code::Address, "cluster.listen");
    }
    // External workers may be pods too, as `render` writes them.
    let external = [
        "cluster.launcher=external",
        image,
        "cluster.listen=0.0.0.0:7070",
    ];
    assert!(read(SMALL, &external).cluster.kubernetes.is_some());
}

#[test]
fn the_plan_digest_follows_results_not_processes() {
    let digest = |sets: &[&str], teacher: &[u8]| {
        read(SMALL, sets).plan_digest(&[("teacher", Digest::of(teacher))])
    };
    let base = digest(&[], b"t");
    for same in [
        "output=/x",
        "name=other",
        "cluster.workers={min: 2, max: 2}",
        "cluster={launcher: slurm, slurm: {partition: a}}",
        "cluster={launcher: kubernetes, kubernetes: {image: a}}",
        "checkpoint.every_steps=5",
        "compute.recompute=true",
        "checkpoint.sharded=true",
        "stages.0.compute={recompute: true}",
        "teacher.model=/moved",
    ] {
        assert_eq!(digest(&[same], b"t"), base, "{same}");
    }
    let shared = ["checkpoint.sharded=true", "optimizer.sharded=true"];
    assert_eq!(digest(&shared, b"t"), base);
    for other in [
        "seed=1",
        "stages.0.steps=11",
        "compute.threads=1",
        "prompts.holdout=0.02",
        "student.lora_alpha=9",
    ] {
        assert_ne!(digest(&[other], b"t"), base, "{other}");
    }
    assert_ne!(digest(&[], b"u"), base);
}

#[test]
fn the_plan_digest_follows_the_lineage_however_it_is_spelt() {
    let digest = |sets: &[&str]| read(SMALL, &[&[BRANCHES], sets].concat()).plan_digest(&[]);
    let base = digest(&[]);
    for same in [
        "stages.a.from=teacher",
        "stages.b.from=a",
        "stages.d.from=c",
    ] {
        assert_eq!(digest(&[same]), base, "{same}");
    }
    for other in [
        "stages.b.from=teacher",
        "stages.c.from=b",
        "stages.e.from=d",
    ] {
        assert_ne!(digest(&[other]), base, "{other}");
    }
}

/// Pinned: a run that was begun before `from` was there goes on.
#[test]
fn a_recipe_without_a_lineage_of_its_own_has_the_digest_it_always_had() {
    let recipe = read(SMALL, &[]);
    let mut stored = recipe.to_stored();
    assert_eq!(stored["stages"][0]["from"], json!("teacher"));
    stored["stages"][0]
        .as_object_mut()
        .expect("a stage")
        .shift_remove("from");
    assert_eq!(Recipe::from_stored(&stored), Ok(recipe.clone()));
    assert_eq!(
        recipe.plan_digest(&[]).to_string(),
        "01763902e81ac1a479be06507685f74a98e83cf957ddbf5f322b4073b34a855a"
    );
}

/// Keys of an object schema, through `anyOf` and `items`.
fn known<'a>(schema: &'a serde_json::Value, key: &str) -> Option<&'a serde_json::Value> {
    let here = schema.get("properties").and_then(|p| p.get(key));
    here.or_else(|| schema.get("items").and_then(|s| known(s, key)))
        .or_else(|| {
            schema
                .get("anyOf")?
                .as_array()?
                .iter()
                .find_map(|s| known(s, key))
        })
}

fn assert_known(schema: &serde_json::Value, value: &serde_json::Value, path: &str) {
    match value {
        serde_json::Value::Object(fields) => fields.iter().for_each(|(key, inner)| {
            let found =
                known(schema, key).unwrap_or_else(|| panic!("{path}.{key} is not in the schema"));
            assert_known(found, inner, &format!("{path}.{key}"));
        }),
        serde_json::Value::Array(items) => items.iter().for_each(|i| assert_known(schema, i, path)),
        _ => {}
    }
}

#[test]
fn the_schema_knows_every_key_of_a_resolved_recipe() {
    let schema = super::super::json_schema();
    let stored = read(
        SMALL,
        &["evaluate=true", "student.ema=true", "loss.kind=huber"],
    )
    .to_stored();
    assert_known(&schema, &stored, "");
    assert_eq!(schema["additionalProperties"], json!(false));
    assert_eq!(
        schema["properties"]["batch"]["properties"]["reproducible"]["enum"],
        json!([false, true])
    );
    assert_eq!(
        schema["properties"]["optimizer"]["properties"]["lr"]["default"],
        json!(1e-4)
    );
}

/// The paths of every key of the table, as `--set` writes them.
fn paths(section: &'static Section, above: &str, out: &mut Vec<String>) {
    for field in section.fields {
        let path = format!("{above}{}", field.key);
        match &field.kind {
            Kind::Section(inner) | Kind::Switch(inner) => paths(inner, &format!("{path}."), out),
            Kind::List(Kind::Section(inner)) => paths(inner, &format!("{path}.0."), out),
            _ => {}
        }
        out.push(path);
    }
}

/// Whatever stands in a recipe, reading it ends in a recipe or in faults.
#[test]
fn no_single_edit_makes_the_check_panic() {
    let mut keys = Vec::new();
    paths(&RECIPE, "", &mut keys);
    assert!(keys.len() > 90, "{}", keys.len());
    let values = [
        "",
        "~",
        "[]",
        "{}",
        "[[]]",
        "-1",
        "0",
        "7",
        "1e999",
        "nan",
        "true",
        "'x'",
        "${env:X}",
        "999999999999999999999",
        "{a: {b: c}}",
        "[1, 1]",
        "[{}]",
        "none",
        "auto",
    ];
    for (key, value) in keys.iter().flat_map(|k| values.map(|v| (k, v))) {
        let set = format!("{key}={value}");
        if let Err(faults) = try_read(SMALL, &[&set]) {
            assert!(!faults.list().is_empty(), "{set}");
            assert!(faults.render(true).contains("error["), "{set}");
        }
    }
}
