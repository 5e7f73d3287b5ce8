//! What training takes of memory is what `footprint` says it takes, within a tenth.

use std::path::Path;

use distillery_common::footprint::{self, Footprint};
use distillery_common::recipe::{self, Batch, Dtype, Stage};
use distillery_common::teacher::Folder;
use distillery_common::telemetry::{Meter, peak_memory};
use distillery_engine::collective::solo::Solo;
use distillery_engine::diffusion::denoiser::Conditioning;
use distillery_engine::distill::{Rows, objective};
use distillery_engine::raw_tensor;
use distillery_engine::task::student::Student;
use distillery_engine::train::{Plan, Trainer};
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

fn rows(folder: &Folder, teacher: &TeacherModel) -> Rows {
    let [channels, height, width] = teacher.parts.latent_shape();
    let latents = || Tensor::randn([ROWS, channels, height, width], (Kind::Float, Device::Cpu));
    let config = &folder.text.encoder.config;
    let context = [ROWS, config.positions, config.width];
    Rows {
        z: latents(),
        eps_w: latents(),
        t: Tensor::arange(ROWS, (Kind::Int64, Device::Cpu)) + 50,
        conditioning: Conditioning {
            context: Tensor::randn(context, (Kind::Float, Device::Cpu)),
            pooled: None,
            time_ids: None,
        },
    }
}

/// The most that two steps around a copy of the state take, over `baseline`.
fn measured(folder: &Folder, stage: &Stage, baseline: u64) -> u64 {
    let teacher = TeacherModel::load(folder, Kind::Float, Device::Cpu).expect("it is sound");
    let student = Student::fresh(&teacher, stage, 0, Device::Cpu).expect("it fits");
    let mut plan = Plan::from(stage);
    plan.batch = Batch {
        global: ROWS as u64,
        micro: None,
    };
    let mut trainer = Trainer::new(plan, student.parameters());
    let schedule = teacher.schedule.to_device(Device::Cpu);
    let objective = objective(stage, schedule, teacher.prediction).expect("it is sound");
    let rows = [rows(folder, &teacher)];
    let _meter = Meter::start();
    let mut snapshot = trainer.empty_snapshot();
    for _ in 0..2 {
        trainer
            .step(&rows, objective.as_ref(), &student.unet, None, &mut Solo::default())
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

/// One test, since a process has one peak, and from little to much, since it keeps what it had.
#[test]
fn the_predicted_memory_is_within_a_tenth_of_the_measured() {
    raw_tensor::keep_freed_memory();
    tch::set_num_threads(1);
    let folder = Folder::open(&configs().join("teachers/scenes"), None).expect("it is bundled");
    // Libraries come in at the first use.
    let warm = Tensor::randn([64, 64], (Kind::Float, Device::Cpu));
    drop(warm.matmul(&warm));
    let baseline = resident();
    for sets in [
        &["compute.recompute=true"][..],
        &["student={kind: full}", "compute.recompute=true"],
        &[],
        &["student={kind: full, ema: {decay: 0.9}}"],
    ] {
        let stage = stage(sets);
        let (predicted, measured) = (
            predicted(&folder, &stage) as f64,
            measured(&folder, &stage, baseline) as f64,
        );
        let mib = f64::from(1 << 20);
        println!(
            "{sets:?}: {:.1} MiB predicted, {:.1} MiB measured, ratio {:.3}",
            predicted / mib,
            measured / mib,
            predicted / measured
        );
        let ratio = predicted / measured;
        assert!((0.9..=1.1).contains(&ratio), "{sets:?}: {ratio}");
    }
}
