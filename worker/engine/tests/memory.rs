//! What training takes of memory is what `footprint` says it takes, within a tenth.

use std::path::Path;

use distillery_common::footprint::{self, Footprint};
use distillery_common::recipe::{self, Batch, Dtype, Stage};
use distillery_common::teacher::Folder;
use distillery_common::telemetry::{Meter, peak_memory};
use distillery_engine::collective::solo::Solo;
use distillery_engine::diffusion::denoiser::Conditioning;
use distillery_engine::distill::{Rows, objective};
use distillery_engine::task::student::Student;
use distillery_engine::train::{Notice, Plan, Trainer};
use distillery_engine::workbench::TeacherModel;
use tch::{Device, Kind, Tensor};

/// Rows of a pass: enough for activations of a few hundred MiB, beside which a program's own memory is little.
const ROWS: i64 = 384;

fn configs() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs"))
}

/// The first stage of the small recipe with these settings.
fn stage(sets: &[&str]) -> Stage {
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    let mut recipe = recipe::load(&configs().join("tiny.yaml"), &sets).expect("a recipe");
    recipe.stages.remove(0)
}

/// Bytes of memory that this process has now.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    1024 * number.and_then(|n| n.parse::<u64>().ok()).expect("in KiB")
}

fn rows(folder: &Folder, teacher: &TeacherModel, rows: i64) -> Rows {
    let [channels, height, width] = teacher.parts.latent_shape();
    let latents = || Tensor::randn([rows, channels, height, width], (Kind::Float, Device::Cpu));
    let config = &folder.text.encoder.config;
    let context = [rows, config.positions, config.width];
    Rows {
        numbers: (0..rows as u64).collect(),
        z: latents(),
        eps_w: latents(),
        t: Tensor::arange(rows, (Kind::Int64, Device::Cpu)) + 50,
        conditioning: Conditioning {
            context: Tensor::randn(context, (Kind::Float, Device::Cpu)),
            pooled: None,
            time_ids: None,
        },
    }
}

/// The most that two steps of `count` rows with a copy of the state between them take, over `baseline`.
fn measured(folder: &Folder, stage: &Stage, count: i64, baseline: u64) -> u64 {
    let teacher = TeacherModel::load(folder, Kind::Float, Device::Cpu).expect("it is sound");
    let student = Student::fresh(&teacher, stage, 0, Device::Cpu).expect("it fits");
    let mut plan = Plan::from(stage);
    plan.batch = Batch {
        global: count as u64,
        micro: None,
        virtual_ranks: None,
    };
    let mut trainer = Trainer::new(plan, student.parameters());
    let schedule = teacher.schedule.to_device(Device::Cpu);
    let objective = objective(stage, schedule, teacher.prediction).expect("it is sound");
    let rows = [vec![rows(folder, &teacher, count)]];
    let _meter = Meter::start();
    let mut snapshot = trainer.empty_snapshot();
    for _ in 0..2 {
        trainer
            .step(
                &rows,
                &mut Notice::default,
                objective.as_ref(),
                &student.unet,
                None,
                &mut Solo::default(),
            )
            .expect("it learns");
        trainer.snapshot(&mut snapshot);
    }
    peak_memory().expect("Linux tells") - baseline
}

/// What the same takes by arithmetic. Nothing is sent to a store here.
fn predicted(folder: &Folder, stage: &Stage) -> u64 {
    let teacher = footprint::Teacher::of(folder);
    let taken: Footprint = footprint::of_pass(stage, Dtype::F32, &teacher, ROWS as u64);
    taken.device() + taken.masters + taken.moments + taken.average
}

/// What training is measured with.
const CASES: [&[&str]; 4] = [
    &[],
    &["compute.recompute=true"],
    &["student={kind: full, ema: {decay: 0.9}}"],
    &["student={kind: full}", "compute.recompute=true"],
];
/// Names the case that a process of its own measures.
const CASE: &str = "DISTILLERY_MEMORY_CASE";

/// Measures one case, since a process has one peak. Blocks are mapped one by one, so that what the process has is what is
/// in use, and nothing an allocator keeps.
#[test]
fn the_predicted_memory_is_within_a_tenth_of_the_measured() {
    if let Ok(case) = std::env::var(CASE) {
        return measure(CASES[case.parse::<usize>().expect("a number")]);
    }
    let own = std::env::current_exe().expect("it has a path");
    for case in 0..CASES.len() {
        let output = std::process::Command::new(&own)
            .args([
                "--exact",
                "the_predicted_memory_is_within_a_tenth_of_the_measured",
            ])
            .arg("--nocapture")
            .env(CASE, case.to_string())
            .env("MALLOC_MMAP_THRESHOLD_", "65536")
            .env("MALLOC_TRIM_THRESHOLD_", "65536")
            .output()
            .expect("it starts");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        print!("{said}");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(said.contains("MiB measured"), "{said}");
    }
}

fn measure(sets: &[&str]) {
    tch::set_num_threads(1);
    let folder = Folder::open(&configs().join("teachers/scenes"), None).expect("it is bundled");
    let stage = stage(sets);
    // Libraries and kernels come in at their first use: the same with a few rows.
    measured(&folder, &stage, 2, 0);
    let baseline = resident();
    let measured = measured(&folder, &stage, ROWS, baseline) as f64;
    let predicted = predicted(&folder, &stage) as f64;
    let (mib, ratio) = (f64::from(1 << 20), predicted / measured);
    println!(
        "{sets:?}: {:.1} MiB predicted, {:.1} MiB measured, ratio {ratio:.3}",
        predicted / mib,
        measured / mib,
    );
    assert!((0.9..=1.1).contains(&ratio), "{sets:?}: {ratio}");
}
