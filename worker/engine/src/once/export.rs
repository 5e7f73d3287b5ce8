//! A student of a run in other forms, written beside its place and moved there once it was verified.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use distillery_common::once::{Export, Line};
use distillery_common::recipe::ExportFormat;
use distillery_common::task::FailureClass;
use serde_json::{Value, json};
use tch::Kind;

use super::{Run, open_host, parse_dtype};
use crate::task::export::{Finished, put_file};
use crate::task::finished_student::Found;
use crate::task::{Fault, OrFault as _};

/// Writes what is wanted.
pub(super) fn write(wanted: &Export, say: &mut dyn FnMut(Line)) -> Result<Value, Fault> {
    let formats = wanted
        .formats
        .iter()
        .map(|name| parse_format(name))
        .collect::<Result<Vec<_>, _>>()?;
    if formats.is_empty() {
        return Err(Fault::config(
            "no format is named; diffusers and lora_universal can be written",
        ));
    }
    let dtype = parse_dtype(&wanted.dtype)?;
    if wanted.out.exists() {
        return Err(Fault::config(format!(
            "{} exists; name a folder that does not",
            wanted.out.display()
        )));
    }
    let device = open_host(&wanted.host)?;
    let run = Run::open(&wanted.run)?;
    let stage = run.stage(wanted.stage.as_deref())?;
    let found = Found::newest(&run.io, &run.store, &stage.name)?;
    let step = found.manifest().step;
    let teacher = run.teacher(Kind::Float, device)?;
    let student = Finished {
        record: &run.record,
        recipe: &run.recipe,
        stage,
        found,
        teacher: &teacher,
        device,
    };
    let parent = wanted
        .out
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).or_fault(FailureClass::Io)?;
    let staged = tempfile::Builder::new()
        .prefix(".export-")
        // As any new folder: the umask decides, not a temporary folder's secrecy.
        .permissions(Permissions::from_mode(0o777))
        .tempdir_in(parent)
        .or_fault(FailureClass::Io)?;
    let mut files = Vec::new();
    let mut verified = Vec::new();
    for (done, &format) in (1..).zip(&formats) {
        let expected = student.export(&run.io, format, dtype, &mut |path, bytes| {
            files.push(path.to_owned());
            put_file(&staged.path().join(path), &bytes)
        })?;
        verified.push(expected.verify(&student, staged.path())?);
        say(Line::Progress {
            done,
            total: formats.len() as u64,
        });
    }
    let whole = staged.keep();
    std::fs::rename(&whole, &wanted.out).or_fault(FailureClass::Io)?;
    for file in &files {
        say(Line::Written(wanted.out.join(file)));
    }
    Ok(json!({
        "stage": stage.name,
        "step": step,
        "is_final": step == stage.steps,
        "folder": wanted.out,
        "files": files,
        "verified": verified,
    }))
}

fn parse_format(name: &str) -> Result<ExportFormat, Fault> {
    match name {
        "diffusers" => Ok(ExportFormat::Diffusers),
        "lora_universal" => Ok(ExportFormat::LoraUniversal),
        other => Err(Fault::config(format!(
            "the format {other:?} is none of diffusers, lora_universal"
        ))),
    }
}
