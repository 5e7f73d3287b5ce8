//! Answers one request of a user's command: draws pictures, or exports a student. No worker takes part.

mod export;
mod sample;

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use distillery_common::once::{Host, Line, MAX_REQUEST_BYTES, Request};
use distillery_common::recipe::{Dtype, Recipe, Stage};
use distillery_common::run::RunRecord;
use distillery_common::storage::{Store, layout};
use distillery_common::task::FailureClass;
use distillery_common::teacher::Folder;
use tch::{Device, Kind};

use crate::device;
use crate::io::Io;
use crate::task::{Fault, OrFault as _, contained};
use crate::workbench::TeacherModel;

/// Reads the request, answers it, and says how it ended.
pub fn main() -> ExitCode {
    let answered = read_request().and_then(|request| {
        contained(|| match &request {
            Request::Sample(wanted) => sample::draw(wanted, &mut say),
            Request::Export(wanted) => export::write(wanted, &mut say),
        })
    });
    match answered {
        Ok(result) => {
            say(Line::Result(result));
            ExitCode::SUCCESS
        }
        Err(fault) => {
            say(Line::Error(fault.to_string()));
            ExitCode::FAILURE
        }
    }
}

/// Writes a line at once. When who started us has gone, nobody needs the rest.
fn say(line: Line) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{}", line.to_json())
        .and_then(|()| out.flush())
        .is_err()
    {
        std::process::exit(1);
    }
}

fn read_request() -> Result<Request, Fault> {
    let mut text = Vec::new();
    std::io::stdin()
        .take(MAX_REQUEST_BYTES + 1)
        .read_to_end(&mut text)
        .or_fault(FailureClass::Io)?;
    if text.len() as u64 > MAX_REQUEST_BYTES {
        return Err(Fault::config(format!(
            "the request has more than {MAX_REQUEST_BYTES} bytes"
        )));
    }
    serde_json::from_slice(&text)
        .map_err(|error| Fault::config(format!("the request is not readable: {error}")))
}

/// Opens the device and sets the threads.
fn open_host(host: &Host) -> Result<Device, Fault> {
    let device = device::open(&host.device).or_fault(FailureClass::Config)?;
    tch::set_num_interop_threads(1);
    if let Some(threads) = host.threads {
        let threads = i32::try_from(threads).ok().filter(|&n| n > 0);
        tch::set_num_threads(threads.ok_or_else(|| Fault::config("threads must be 1 or more"))?);
    }
    Ok(device)
}

fn parse_dtype(name: &str) -> Result<Dtype, Fault> {
    match name {
        "f32" => Ok(Dtype::F32),
        "f16" => Ok(Dtype::F16),
        "bf16" => Ok(Dtype::Bf16),
        other => Err(Fault::config(format!(
            "the number format {other:?} is none of f32, f16, bf16"
        ))),
    }
}

/// A run, as its record says.
struct Run {
    io: Io,
    store: Store,
    record: RunRecord,
    recipe: Recipe,
}

impl Run {
    fn open(uri: &str) -> Result<Self, Fault> {
        let io = Io::start().or_fault(FailureClass::Io)?;
        let store = Store::open(uri).or_fault(FailureClass::Config)?;
        let bytes = io
            .wait(store.find(&layout::run_record()))?
            .ok_or_else(|| Fault::config(format!("there is no run at {}", store.uri())))?;
        let record = RunRecord::from_bytes(&bytes).or_fault(FailureClass::Schema)?;
        let recipe = Recipe::from_stored(&record.recipe).or_fault(FailureClass::Schema)?;
        Ok(Self {
            io,
            store,
            record,
            recipe,
        })
    }

    fn stage(&self, name: Option<&str>) -> Result<&Stage, Fault> {
        let stages = &self.recipe.stages;
        let found = match name {
            Some(name) => stages.iter().find(|stage| stage.name == name),
            None => stages.last(),
        };
        found.ok_or_else(|| {
            let known: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
            Fault::config(format!(
                "the run has no training stage {}; it has {}",
                name.unwrap_or("at all"),
                known.join(", ")
            ))
        })
    }

    /// The run's teacher, its files unchanged since the run began.
    fn teacher(&self, kind: Kind, device: Device) -> Result<TeacherModel, Fault> {
        let asked = &self.recipe.teacher;
        let folder =
            Folder::open(&asked.model, asked.variant.as_deref()).or_fault(FailureClass::Config)?;
        if folder.digests().or_fault(FailureClass::Config)? != self.record.teacher_files {
            return Err(Fault::config(format!(
                "the teacher in {} is not the one that the run was begun with; restore its files",
                asked.model.display()
            )));
        }
        TeacherModel::load(&folder, kind, device)
    }
}
