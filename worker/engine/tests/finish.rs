//! What happens after training, on a whole small run: a teacher's folder, a trained student's checkpoint, and the
//! tasks that judge and export it, each reading what the one before committed.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use bytes::Bytes;
use distillery_common::checkpoint::{
    self, Kind, Lora, Snapshot, StateSource, TensorSpec, Training,
};
use distillery_common::commit::TaskCommit;
use distillery_common::figures::Figure;
use distillery_common::ids::{Digest, Generation, Incarnation, Term};
use distillery_common::once::{Export, Host, Line, Model, Request, Sample};
use distillery_common::prompts::{self, Prompt};
use distillery_common::recipe::{self, Recipe, StudentKind};
use distillery_common::security::GroupSecret;
use distillery_common::seed::{Purpose, normal};
use distillery_common::storage::layout::{self, PromptList};
use distillery_common::storage::{Store, get_verified, verify};
use distillery_common::task::{Lease, TaskId};
use distillery_common::teacher::Folder;
use distillery_engine::device;
use distillery_engine::inbox::Inbox;
use distillery_engine::io::Io;
use distillery_engine::link::{CommitRequest, Link, Setup};
use distillery_engine::task::student::Student;
use distillery_engine::task::{Fault, evaluate, export, reference};
use distillery_engine::workbench::{LIBTORCH_VERSION, TeacherModel, Workbench};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tch::{Device, Tensor};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
const STAGE: &str = "seg2";

/// A run whose training is over.
struct Run {
    folder: tempfile::TempDir,
    recipe: Recipe,
}

impl Run {
    fn new(teacher: &str) -> Self {
        tch::set_num_threads(1);
        let folder = tempfile::tempdir().expect("a folder");
        let text = format!(
            "version: 1\nname: finish\nseed: 11\noutput: {out}\nteacher: {{model: {teacher}, guidance: 3.0}}\n\
             prompts: {{train: train.txt, holdout: holdout.txt}}\n\
             student: {{kind: lora, lora_rank: 2, lora_alpha: 3}}\nbatch: {{global: 2}}\n\
             compute: {{dtype: f32, threads: 1}}\n\
             trajectories: {{count: 4, segments: 2, shard_trajectories: 4, batch: 4}}\n\
             stages: [{{name: {STAGE}, segments: 2, steps: 3}}]\n\
             preview: {{steps: [1, 2], seeds: [5], sampler: tlcm9}}\n\
             evaluate: {{samples: 18, steps: [1, 2], teacher_steps: [2, 3], samplers: [tlcm9, segments], \
             metrics: [latent_frechet, teacher_distance], batch: 4}}\n\
             export: {{formats: [diffusers, lora_universal]}}\n",
            out = folder.path().join("run").display(),
        );
        let recipe = recipe::parse(&text, "recipe.yaml", folder.path(), &[])
            .unwrap_or_else(|faults| panic!("{}", faults.render(false)));
        let run = Self { folder, recipe };
        run.write_record();
        run.write_checkpoint();
        run
    }

    fn uri(&self) -> String {
        self.folder.path().join("run").display().to_string()
    }

    fn store(&self) -> Store {
        Store::open_or_create(&self.uri()).expect("a folder on disk")
    }

    fn teacher(&self) -> Folder {
        let asked = &self.recipe.teacher;
        Folder::open(&asked.model, asked.variant.as_deref()).expect("the fixture is sound")
    }

    fn write_record(&self) {
        let files: BTreeMap<String, String> = self
            .teacher()
            .digests()
            .expect("readable")
            .into_iter()
            .map(|(path, digest)| (path, digest.to_string()))
            .collect();
        let record = json!({
            "format_version": 1,
            "run_id": "01890a5d-ac96-774b-bcce-b302099a8057",
            "recipe_digest": Digest::of(b"recipe").to_string(),
            "dataset_digest": null,
            "software": {
                "distillery": "0", "libtorch": LIBTORCH_VERSION, "cpu_capability": device::cpu_capability(),
            },
            "teacher_files": files,
            "prompts": {},
            "recipe": self.recipe.to_stored(),
        });
        let holdout: Vec<Prompt> = ["a red disc", "two blue rings", "a bar"]
            .iter()
            .filter_map(|t| Prompt::new(t))
            .collect();
        let io = Io::start().expect("threads");
        io.wait(async {
            let store = self.store();
            store
                .put(&layout::run_record(), Bytes::from(record.to_string()))
                .await
                .expect("disk");
            let list = prompts::to_parquet(&holdout);
            store
                .put(&layout::prompts(PromptList::Holdout), list)
                .await
                .expect("disk");
        });
    }

    /// A student with adapters that do something everywhere.
    fn student(&self) -> Student {
        let teacher =
            TeacherModel::load(&self.teacher(), tch::Kind::Float, Device::Cpu).expect("sound");
        let stage = &self.recipe.stages[0];
        let student = Student::fresh(&teacher, stage, self.recipe.seed, Device::Cpu).expect("fits");
        for (at, (_, mut tensor)) in student.trainable().into_iter().enumerate() {
            let values = normal(1, Purpose::AdapterInit, at as u64, 1, tensor.numel());
            let values = Tensor::from_slice(&values).view(&tensor.size()[..]) * 0.1;
            tch::no_grad(|| tensor.copy_(&values));
        }
        student
    }

    fn write_checkpoint(&self) {
        let state = State(self.student().trainable());
        let stage = &self.recipe.stages[0];
        let lora = match &stage.student.kind {
            StudentKind::Lora {
                lora_rank,
                lora_alpha,
                targets,
            } => Lora {
                lora_rank: *lora_rank,
                lora_alpha: *lora_alpha,
                targets: targets.clone(),
            },
            StudentKind::Full => panic!("the recipe asks for adapters"),
        };
        let training = Training {
            run: "01890a5d-ac96-774b-bcce-b302099a8057".into(),
            recipe_digest: Digest::of(b"recipe").to_string(),
            dataset_digest: None,
            parent: None,
            milestones: vec![0, 499, 999],
            schedule: "scaled_linear".into(),
            prediction_type: "epsilon".into(),
            skip: stage.skip,
            seed: self.recipe.seed,
            global_batch: 2,
            lora: Some(lora),
            libtorch: LIBTORCH_VERSION.into(),
            cpu_capability: device::cpu_capability().into(),
        };
        let io = Io::start().expect("threads");
        io.wait(async {
            let store = self.store();
            let copy = Arc::new(Snapshot::capture(&state, None));
            let written = checkpoint::write(
                &store,
                STAGE,
                3,
                Generation(1),
                training,
                &copy,
                Bytes::new(),
            );
            let manifest = written.await.expect("disk");
            store
                .create(&manifest.commit_key(), manifest.to_bytes())
                .await
                .expect("disk");
        });
    }

    /// Does one task and puts its COMMIT, as the worker would.
    fn perform(
        &self,
        stage: &str,
        index: u64,
        task: fn(&mut Workbench, &Lease) -> Result<Option<CommitRequest>, Fault>,
    ) -> TaskCommit {
        let (mut bench, _worker) = self.bench();
        let lease = Lease {
            term: Term(1),
            task: TaskId {
                stage: stage.into(),
                index,
            },
            attempt: 1,
            incarnation: Incarnation(9),
        };
        let request = task(&mut bench, &lease)
            .unwrap_or_else(|fault| panic!("{stage}/{index}: {fault}"))
            .expect("nobody took the lease back");
        let folder = layout::task(stage, index);
        assert_eq!(request.key, layout::commit(&folder));
        let commit = TaskCommit::from_bytes(&folder, &request.body).expect("all files lie below");
        bench.io.wait(async {
            for file in &commit.files {
                verify(&bench.store, file)
                    .await
                    .expect("files come before their COMMIT");
            }
            bench
                .store
                .create(&request.key, request.body)
                .await
                .expect("disk");
        });
        commit
    }

    /// A bench on a link to nobody in particular, who must stay until the bench has gone.
    fn bench(&self) -> (Workbench, std::thread::JoinHandle<()>) {
        let path = self.folder.path().join(format!("{}.sock", self.sockets()));
        let listener = UnixListener::bind(&path).expect("a socket");
        let worker = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the engine connects");
            let mut buffer = [0; 4096];
            while stream.read(&mut buffer).is_ok_and(|n| n > 0) {}
        });
        let (link, commands) = Link::connect(&path).expect("somebody listens");
        let setup = Setup {
            run_uri: self.uri(),
            worker: "w".into(),
            incarnation: Incarnation(9),
            group_secret: GroupSecret([0; 32]),
        };
        let io = Io::start().expect("threads");
        let bench = Workbench::open(io, link, Inbox::new(commands), Device::Cpu, setup);
        (bench.unwrap_or_else(|fault| panic!("{fault}")), worker)
    }

    fn sockets(&self) -> usize {
        std::fs::read_dir(self.folder.path())
            .expect("readable")
            .count()
    }

    fn export_path(&self) -> PathBuf {
        Path::new(&self.uri()).join("export").join(STAGE)
    }
}

/// Trainable tensors as checkpoints take them.
struct State(Vec<(String, Tensor)>);

impl StateSource for State {
    fn tensors(&self) -> Vec<TensorSpec> {
        let spec = |(name, tensor): &(String, Tensor)| TensorSpec {
            kind: Kind::Student,
            name: name.clone(),
            dtype: checkpoint::Dtype::F32,
            shape: tensor.size().iter().map(|&n| n as u64).collect(),
        };
        self.0.iter().map(spec).collect()
    }

    fn copy(&self, index: usize, start: usize, out: &mut [u8]) {
        let values = Vec::<f32>::try_from(self.0[index].1.detach().reshape([-1])).expect("f32");
        for (bytes, value) in out.chunks_exact_mut(4).zip(&values[start / 4..]) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn figures(commit: &TaskCommit) -> Vec<Figure> {
    serde_json::from_value(commit.result["figures"].clone()).expect("a list of figures")
}

#[test]
fn a_student_is_judged_beside_the_teacher_and_shown_in_a_grid() {
    let run = Run::new(&format!("{FIXTURES}/sd15"));
    // 18 samples in blocks of 4, one block a task.
    let blocks: Vec<TaskCommit> = (0..5)
        .map(|i| run.perform("reference", i, reference::draw))
        .collect();
    assert_eq!(
        blocks.iter().map(|c| c.rows).collect::<Vec<_>>(),
        [4, 4, 4, 4, 2]
    );
    let [teacher, undistilled, student] =
        [0, 1, 2].map(|i| run.perform("evaluate", i, evaluate::judge));

    let teacher = figures(&teacher);
    assert_eq!(teacher.len(), 2 * 2);
    let own = teacher
        .iter()
        .find(|f| f.steps == 3 && f.metric == "teacher_distance");
    assert_eq!(
        own.map(|f| (f.value, f.samples)),
        Some((0.0, 18)),
        "the teacher at its own reference"
    );
    assert!(
        teacher
            .iter()
            .all(|f| f.sampler == "ddim" && f.model == "teacher")
    );

    let undistilled = figures(&undistilled);
    assert_eq!(undistilled.len(), 2 * 2 * 2 * 2);
    assert!(
        undistilled
            .iter()
            .all(|f| f.value.is_finite() && f.value >= 0.0)
    );
    // Two segments deterministically without guidance and with are different samples.
    let of = |model: &str| {
        undistilled
            .iter()
            .find(|f| f.model == model && f.sampler == "segments" && f.steps == 2)
            .map(|f| f.value)
    };
    assert_ne!(of("undistilled"), of("undistilled_guided"));

    let judged = figures(&student);
    assert!(
        judged
            .iter()
            .all(|f| f.model == STAGE && f.interval.is_some())
    );
    let distance = |figures: &[Figure], model: &str| {
        figures
            .iter()
            .find(|f| {
                f.model == model
                    && f.sampler == "tlcm9"
                    && f.steps == 1
                    && f.metric == "teacher_distance"
            })
            .map(|f| f.value)
            .expect("it was asked for")
    };
    assert_ne!(
        distance(&judged, STAGE),
        distance(&undistilled, "undistilled"),
        "adapters were loaded"
    );
    // Judging again gives the same figures.
    let again = run.perform("evaluate", 2, evaluate::judge);
    assert_eq!(again.result, student.result);
    check_grid(&run, &student);
}

fn check_grid(run: &Run, student: &TaskCommit) {
    let grid = &student.result["grid"];
    assert_eq!(
        grid["columns"],
        json!(["teacher, 3 steps", "seg2, 1 (tlcm9)", "seg2, 2 (tlcm9)"])
    );
    assert_eq!(grid["rows"].as_array().map(Vec::len), Some(3));
    assert_eq!(grid["file"], student.files[0].key.as_str());
    let io = Io::start().expect("threads");
    let png = io
        .wait(get_verified(&run.store(), &student.files[0]))
        .expect("it is there");
    assert_eq!(&png[..4], b"\x89PNG");
}

/// An exported weight must be the teacher's plus `(alpha / rank) B A`, computed here in f64 from the files alone.
#[test]
fn exports_hold_the_sum_of_teacher_and_adapters_to_the_last_bit_of_f16() {
    let run = Run::new(&format!("{FIXTURES}/sd15"));
    let commit = run.perform("export", 0, export::write);
    let verified = commit.result["verified"]
        .as_array()
        .expect("both forms are verified");
    assert_eq!(verified.len(), 2);
    let listed = commit.result["files"].as_array().expect("a list");
    let has = |end: &str| {
        listed
            .iter()
            .any(|f| f["path"].as_str().is_some_and(|p| p.ends_with(end)))
    };
    for end in [
        "diffusers/model_index.json",
        "diffusers/README.md",
        "diffusers/tokenizer/tokenizer.json",
        "seg2-lora.safetensors",
    ] {
        assert!(has(end), "{end}: {listed:?}");
    }
    let weights = |path: &Path| numbers(&std::fs::read(path).expect("readable"));
    let before =
        weights(&Path::new(FIXTURES).join("sd15/unet/diffusion_pytorch_model.safetensors"));
    let after = weights(
        &run.export_path()
            .join("diffusers/unet/diffusion_pytorch_model.safetensors"),
    );
    assert_eq!(
        before.keys().collect::<Vec<_>>(),
        after.keys().collect::<Vec<_>>()
    );
    let adapters: BTreeMap<String, (Vec<i64>, Vec<f64>)> = run
        .student()
        .trainable()
        .into_iter()
        .map(|(name, t)| {
            let values = Vec::<f32>::try_from(t.detach().reshape([-1])).expect("f32");
            (
                name,
                (t.size(), values.into_iter().map(f64::from).collect()),
            )
        })
        .collect();
    let mut adapted = 0;
    for (name, base) in &before {
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let delta = adapters
            .get(&format!("{stem}.lora_A.weight"))
            .map(|(down_shape, down)| {
                let (_, up) = &adapters[&format!("{stem}.lora_B.weight")];
                adapted += 1;
                product(up, down, down_shape[0] as usize)
            });
        for (at, (old, new)) in base.iter().zip(&after[name]).enumerate() {
            let expected = old + delta.as_ref().map_or(0.0, |d| d[at] * 3.0 / 2.0);
            let ulp = (expected.abs() / 2048.0).max(6e-8);
            assert!(
                (new - expected).abs() <= ulp,
                "{name}[{at}] is {new}, expected {expected}"
            );
        }
    }
    assert!(adapted > 20, "{adapted} modules have adapters");
}

#[test]
fn the_same_student_is_exported_to_the_same_bytes() {
    let run = Run::new(&format!("{FIXTURES}/sd15"));
    run.perform("export", 0, export::write);
    let names = [
        "diffusers/unet/diffusion_pytorch_model.safetensors",
        "seg2-lora.safetensors",
    ];
    let first = names.map(|name| std::fs::read(run.export_path().join(name)).expect("readable"));
    run.perform("export", 0, export::write);
    let second = names.map(|name| std::fs::read(run.export_path().join(name)).expect("readable"));
    assert!(first == second, "exports are deterministic");
    let config = std::fs::read(
        run.export_path()
            .join("diffusers/scheduler/scheduler_config.json"),
    );
    let config: Value = serde_json::from_slice(&config.expect("readable")).expect("JSON");
    assert_eq!(config["original_inference_steps"], 40);
    assert_eq!(config["steps_offset"], 1);
}

/// `up [o, r] down [r, n]` row by row.
fn product(up: &[f64], down: &[f64], rank: usize) -> Vec<f64> {
    let (outputs, inputs) = (up.len() / rank, down.len() / rank);
    let mut out = vec![0.0; outputs * inputs];
    for (o, row) in out.chunks_exact_mut(inputs).enumerate() {
        for r in 0..rank {
            for (value, d) in row.iter_mut().zip(&down[r * inputs..]) {
                *value += up[o * rank + r] * d;
            }
        }
    }
    out
}

/// Every tensor of a safetensors file in f64.
fn numbers(file: &[u8]) -> BTreeMap<String, Vec<f64>> {
    let tensors = SafeTensors::deserialize(file).expect("a sound file");
    let values = |view: &safetensors::tensor::TensorView<'_>| -> Vec<f64> {
        match view.dtype() {
            safetensors::Dtype::F16 => view
                .data()
                .chunks_exact(2)
                .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f64())
                .collect(),
            safetensors::Dtype::F32 => view
                .data()
                .chunks_exact(4)
                .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
            other => panic!("{other:?} is not expected"),
        }
    };
    tensors
        .iter()
        .map(|(name, view)| (name.to_owned(), values(&view)))
        .collect()
}

/// Asks the engine's program, and gives its lines.
fn once(request: &Request) -> (bool, Vec<Line>) {
    let mut engine = Command::new(env!("CARGO_BIN_EXE_engine"))
        .arg("once")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it was built");
    let text = serde_json::to_vec(request).expect("JSON");
    engine
        .stdin
        .take()
        .expect("piped")
        .write_all(&text)
        .expect("it reads");
    let output = engine.wait_with_output().expect("it ends");
    let text = String::from_utf8(output.stdout).expect("text");
    let lines = text
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    (output.status.success(), lines)
}

fn host() -> Host {
    Host {
        device: "cpu".into(),
        threads: Some(1),
    }
}

#[test]
fn one_request_exports_a_student_and_another_samples_run_and_export() {
    let run = Run::new(&format!("{FIXTURES}/sd15"));
    // tests/python/check_exports.py reads what is kept.
    let kept = std::env::var_os("DISTILLERY_KEEP_EXPORT").map(PathBuf::from);
    let out = kept.unwrap_or_else(|| run.folder.path().join("out"));
    let export = Request::Export(Export {
        run: run.uri(),
        stage: None,
        formats: vec!["diffusers".into(), "lora_universal".into()],
        dtype: "f32".into(),
        out: out.clone(),
        host: host(),
    });
    let (well, lines) = once(&export);
    assert!(well, "{lines:?}");
    assert!(out.join("seg2-lora.safetensors").is_file());
    let (well, lines) = once(&export);
    assert!(
        !well && format!("{lines:?}").contains("exists"),
        "{lines:?}"
    );

    let picture = |model: Model, name: &str| -> Vec<u8> {
        let folder = run.folder.path().join(name);
        let request = Request::Sample(Sample {
            model,
            prompts: vec!["a red disc".into()],
            steps: vec![2],
            sampler: Some("lcm".into()),
            seeds: vec![5],
            guidance: None,
            out: Some(folder.clone()),
            grid: Some(folder.join("grid.png")),
            dtype: "f32".into(),
            host: host(),
        });
        let (well, lines) = once(&request);
        assert!(well, "{lines:?}");
        assert!(folder.join("grid.png").is_file());
        std::fs::read(folder.join("0000-seed5-steps2.png")).expect("a picture")
    };
    let of_run = picture(
        Model::Checkpoint {
            run: run.uri(),
            stage: None,
            step: None,
        },
        "a",
    );
    let of_export = picture(Model::Folder(out.join("diffusers")), "b");
    assert!(
        of_run == of_export,
        "the export draws what the student draws"
    );
    let teacher = Request::Sample(Sample {
        model: Model::Folder(Path::new(FIXTURES).join("sd15")),
        prompts: vec!["a red disc".into()],
        steps: vec![2],
        sampler: None,
        seeds: vec![5],
        guidance: None,
        out: Some(run.folder.path().join("c")),
        grid: None,
        dtype: "f32".into(),
        host: host(),
    });
    let (well, lines) = once(&teacher);
    assert!(
        !well && format!("{lines:?}").contains("guidance"),
        "{lines:?}"
    );
}
