//! Writes a finished student in the forms that other programs read, and reads back what was written: an export
//! that does not compute as the student does is a fault, not a result.
//!
//! Weights are merged and rounded from f32, whatever the stage trained in. The same student gives the same bytes.

mod card;
mod lora_file;
mod pipeline;
mod verify;

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use distillery_common::ids::Digest;
use distillery_common::recipe::{Dtype, ExportFormat, Recipe, Stage, StudentKind};
use distillery_common::run::RunRecord;
use distillery_common::storage::layout::{self, Prefix};
use distillery_common::storage::{self, FileEntry, Store, get_verified};
use distillery_common::task::{FailureClass, Lease};
use distillery_common::teacher::{Folder, digest_of_list};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::finished_student::Found;
use super::student::Student;
use super::studio::{finished, lcm_original_steps};
use super::{Fault, OrFault as _};
use crate::io::Io;
use crate::link::{CommitRequest, Event};
use crate::models::lora;
use crate::workbench::{TeacherModel, Workbench, kind_of};
use verify::{Probe, check_close};

/// Folder of the pipeline within an export.
pub const PIPELINE: &str = "diffusers";
/// How far an export may be from a student with equally rounded weights: f32 arithmetic in another order.
const EXACT: f64 = 1e-4;
/// How far rounding to f16 or bf16 may move a prediction. More means that the wrong weights were written.
const ROUNDING: f64 = 5e-2;

/// Writes the student of the last stage, and gives the request that makes it count; none when the worker took the
/// lease back in between.
pub fn write(bench: &mut Workbench, lease: &Lease) -> Result<Option<CommitRequest>, Fault> {
    let recipe = bench.recipe.clone();
    let wanted = recipe
        .export
        .clone()
        .ok_or_else(|| Fault::config("the recipe says export: false, yet it is asked for"))?;
    let stage = recipe
        .stages
        .last()
        .ok_or_else(|| Fault::config("there is no stage to export"))?;
    let teacher = bench.teacher(Dtype::F32)?;
    let student = Finished {
        record: &bench.record,
        recipe: &recipe,
        stage,
        found: Found::at(&bench.io, &bench.store, &stage.name, stage.steps)?,
        teacher: &teacher,
        device: bench.device,
    };
    let place = layout::export(&stage.name);
    let mut files = Vec::new();
    let total = wanted.formats.len() as u64 + 1;
    let mut checks = Vec::new();
    for (done, &format) in (0..).zip(&wanted.formats) {
        if bench.inbox.cancelled(lease) {
            return Ok(None);
        }
        bench.link.send(Event::Progress {
            lease: lease.clone(),
            done,
            total,
        });
        let mut written = Vec::new();
        let expected = student.export(&bench.io, format, wanted.dtype, &mut |path, bytes| {
            written.push(upload(&bench.io, &bench.store, &place, path, bytes)?);
            Ok(())
        })?;
        if wanted.verify {
            let copy = Copy::of(&bench.io, &bench.store, &place, &written)?;
            checks.push(expected.verify(&student, copy.path())?);
        }
        files.extend(written);
    }
    let listed: Vec<Value> = files.iter().map(described).collect();
    let result = json!({
        "stage": stage.name,
        "folder": place.as_str(),
        "files": listed,
        "verified": checks,
    });
    // The export's own keys carry no attempt, so that people find them; the list of them does, and is committed.
    let list = Bytes::from(format!("{result:#}\n"));
    let key = layout::task_file(
        &layout::task(&lease.task.stage, lease.task.index),
        lease,
        "files.json",
    );
    let entry = FileEntry::of(&key, &list);
    bench.io.wait(bench.store.put(&key, list))?;
    Ok(Some(finished(bench, lease, vec![entry], 0..1, result)))
}

/// Puts one file of the export at `place`.
fn upload(
    io: &Io,
    store: &Store,
    place: &Prefix,
    path: &str,
    bytes: Vec<u8>,
) -> Result<FileEntry, Fault> {
    let key = layout::export_file(place, path);
    let mut upload = store.upload(&key);
    io.wait(async {
        upload.write(Bytes::from(bytes)).await?;
        upload.finish().await
    })
    .map_err(Fault::from)
}

fn described(file: &FileEntry) -> Value {
    json!({"path": file.key.as_str(), "bytes": file.len, "sha256": file.sha256.to_string()})
}

/// What was written, as files that were checked against their digests: where the store keeps them, or a copy.
enum Copy {
    InPlace(PathBuf),
    Temporary(tempfile::TempDir),
}

impl Copy {
    fn of(io: &Io, store: &Store, place: &Prefix, files: &[FileEntry]) -> Result<Self, Fault> {
        if let Some(folder) = store.local_folder(place) {
            for file in files {
                io.wait(storage::verify(store, file))
                    .or_fault(FailureClass::Io)?;
            }
            return Ok(Self::InPlace(folder));
        }
        // What is checked here is read again by its name: nobody else may change it in between, whatever the umask.
        let folder = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .or_fault(FailureClass::Io)?;
        for file in files {
            let bytes = io
                .wait(get_verified(store, file))
                .or_fault(FailureClass::Io)?;
            let below = file
                .key
                .as_str()
                .strip_prefix(place.as_str())
                .unwrap_or(file.key.as_str());
            put_file(&folder.path().join(below.trim_start_matches('/')), &bytes)?;
        }
        Ok(Self::Temporary(folder))
    }

    fn path(&self) -> &Path {
        match self {
            Self::InPlace(folder) => folder,
            Self::Temporary(folder) => folder.path(),
        }
    }
}

/// Writes a file and the folders that it lies in.
pub(crate) fn put_file(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    let write = || {
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        std::fs::write(path, bytes)
    };
    write().map_err(|error| {
        Fault::new(
            FailureClass::Io,
            format!("cannot write {}: {error}", path.display()),
        )
    })
}

/// Where an export puts its files: a path below the export's folder, and the bytes.
pub type Put<'a> = dyn FnMut(&str, Vec<u8>) -> Result<(), Fault> + 'a;

/// A student that can be exported, and where it comes from.
pub struct Finished<'a> {
    /// Of its run.
    pub record: &'a RunRecord,
    /// Of its run.
    pub recipe: &'a Recipe,
    /// Its stage.
    pub stage: &'a Stage,
    /// Its checkpoint.
    pub found: Found,
    /// Its teacher, in f32.
    pub teacher: &'a TeacherModel,
    /// Where to compute.
    pub device: Device,
}

/// What an export must compute when it is read back.
pub struct Expected {
    format: ExportFormat,
    probe: Probe,
    /// By the student itself.
    plain: Tensor,
    /// By the student with its weights rounded as they are written.
    rounded: Tensor,
}

impl Finished<'_> {
    /// Gives every file of `format` to `put`, weights in `dtype`, and says what must come back.
    pub fn export(
        &self,
        io: &Io,
        format: ExportFormat,
        dtype: Dtype,
        put: &mut Put<'_>,
    ) -> Result<Expected, Fault> {
        self.check(format)?;
        let seed = self.recipe.seed;
        let mut student =
            self.found
                .load(io, self.teacher, self.stage, Dtype::F32, seed, self.device)?;
        student.unet.set_trainable(false);
        let probe = Probe::new(&self.teacher.parts, seed, self.device);
        let plain = probe.predict(&student.unet);
        let kind = kind_of(dtype);
        match format {
            ExportFormat::LoraUniversal => {
                let file = lora_file::bytes(self, &student.unet, kind)?;
                put(&lora_file::name(self.stage), file)?;
                round_adapters(&student, kind);
            }
            ExportFormat::Diffusers => {
                lora::merge(&mut student.unet);
                let folder = self.teacher_folder()?;
                pipeline::write(self, &folder, &student.unet, kind, put)?;
                // The teacher may have the weights that had no adapter, so none is rounded in its place.
                let rounded = student.unet.duplicate(kind, self.device);
                student.unet = rounded.duplicate(Kind::Float, self.device);
            }
        }
        let rounded = probe.predict(&student.unet);
        Ok(Expected {
            format,
            probe,
            plain,
            rounded,
        })
    }

    fn teacher_folder(&self) -> Result<Folder, Fault> {
        let asked = &self.recipe.teacher;
        Folder::open(&asked.model, asked.variant.as_deref()).or_fault(FailureClass::Config)
    }

    /// `original_inference_steps` of its LCMScheduler.
    fn original_steps(&self) -> u32 {
        lcm_original_steps(self.recipe)
    }

    /// Names the teacher's files.
    fn teacher_digest(&self) -> Digest {
        digest_of_list(&self.record.teacher_files)
    }

    /// Refuses formats that cannot hold this student.
    fn check(&self, format: ExportFormat) -> Result<(), Fault> {
        match (format, &self.stage.student.kind) {
            (ExportFormat::LoraUniversal, StudentKind::Full) => Err(Fault::config(format!(
                "stage {} trains every weight, so it has no adapters to write as lora_universal; use diffusers",
                self.stage.name
            ))),
            (ExportFormat::LoraUniversal, StudentKind::Lora { .. })
            | (ExportFormat::Diffusers, _) => Ok(()),
        }
    }
}

/// Rounds adapters as the LoRA file does: the up matrix with the scale folded in.
fn round_adapters(student: &Student, kind: Kind) {
    let round = |tensor: &Tensor| tensor.detach().to_kind(kind).to_kind(Kind::Float);
    let scale = lora::scale(&student.unet).unwrap_or(1.0);
    let rounded: BTreeMap<String, Tensor> = lora::parameters(&student.unet)
        .into_iter()
        .map(|(name, tensor)| {
            let rounded = match name.ends_with(".lora_B.weight") {
                true => round(&(tensor * scale)) / scale,
                false => round(&tensor),
            };
            (name, rounded)
        })
        .collect();
    lora::set_parameters(&student.unet, &rounded);
}

impl Expected {
    /// Reads the export in the folder `copy` and compares. Gives what was found, for the record.
    pub fn verify(&self, student: &Finished<'_>, copy: &Path) -> Result<Value, Fault> {
        let (name, found) = match self.format {
            ExportFormat::Diffusers => {
                let folder = copy.join(PIPELINE);
                (
                    PIPELINE.to_owned(),
                    pipeline::read_back(student, &folder, &self.probe)?,
                )
            }
            ExportFormat::LoraUniversal => {
                let name = lora_file::name(student.stage);
                let found = lora_file::read_back(student, &copy.join(&name), &self.probe)?;
                (name, found)
            }
        };
        let exact = check_close(&name, &found, &self.rounded, EXACT)?;
        let rounding = check_close(&name, &found, &self.plain, ROUNDING)?;
        Ok(json!({"export": name, "difference": exact, "rounding": rounding}))
    }
}
