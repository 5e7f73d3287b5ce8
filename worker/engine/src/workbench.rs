//! What every task of an engine needs: the run it works for, its store, its teacher and its link.

use std::rc::Rc;

use anyhow::Context as _;
use distillery_common::recipe::{Dtype, Recipe};
use distillery_common::run::RunRecord;
use distillery_common::storage::{Store, layout};
use distillery_common::task::FailureClass;
use distillery_common::teacher::{self, BetaSchedule, Folder, ScheduleConfig};
use distillery_common::telemetry::Meter;
use tch::{Device, Kind};

use crate::device;
use crate::diffusion::prediction::Prediction;
use crate::diffusion::schedule::{Betas, Schedule};
use crate::inbox::Inbox;
use crate::io::Io;
use crate::link::{Link, Setup};
use crate::models::Teacher;
use crate::task::{Fault, OrFault as _};

/// libtorch that this program was built against.
pub const LIBTORCH_VERSION: &str = env!("DISTILLERY_LIBTORCH_VERSION");

/// An engine's bench: opened once, used by one task after the other.
#[derive(Debug)]
pub struct Workbench {
    /// Where waiting happens.
    pub io: Io,
    /// The run's objects.
    pub store: Store,
    /// What the run is.
    pub record: RunRecord,
    /// What the user asked for.
    pub recipe: Recipe,
    /// The way to the worker.
    pub link: Link,
    /// What the worker says.
    pub inbox: Inbox,
    /// Where tensors live.
    pub device: Device,
    /// Who works here.
    pub setup: Setup,
    /// Measures the work under way.
    pub meter: Meter,
    teacher: Option<(Kind, Rc<TeacherModel>)>,
}

/// A loaded teacher with its mathematics.
#[derive(Debug)]
pub struct TeacherModel {
    /// Networks and tokenizers.
    pub parts: Teacher,
    /// Its noise schedule, on the device.
    pub schedule: Schedule,
    /// What it predicts.
    pub prediction: Prediction,
}

impl Workbench {
    /// Reads what the run is from its store, and refuses to compute for a run made by another libtorch.
    pub fn open(
        io: Io,
        link: Link,
        inbox: Inbox,
        device: Device,
        setup: Setup,
    ) -> Result<Self, Fault> {
        let store = Store::open(&setup.run_uri)
            .with_context(|| format!("opening the run {}", setup.run_uri))
            .or_fault(FailureClass::Config)?;
        let record = io.wait(store.get(&layout::run_record()))?;
        let record = RunRecord::from_bytes(&record).or_fault(FailureClass::Schema)?;
        let recipe = Recipe::from_stored(&record.recipe).or_fault(FailureClass::Schema)?;
        if record.software.libtorch != LIBTORCH_VERSION {
            return Err(Fault::config(format!(
                "the run was begun for libtorch {}, this engine has {LIBTORCH_VERSION}; results would \
                 differ: use the engine that began it, or a new output",
                record.software.libtorch
            )));
        }
        let capability = device::cpu_capability();
        if device == Device::Cpu && record.software.cpu_capability != capability {
            return Err(Fault::config(format!(
                "the run was begun on CPUs with {}, this host has {capability}; results would differ: use \
                 hosts of one kind, or a new output",
                record.software.cpu_capability
            )));
        }
        Ok(Self {
            io,
            store,
            record,
            recipe,
            link,
            inbox,
            device,
            setup,
            meter: Meter::start(),
            teacher: None,
        })
    }

    /// The teacher, computing in `dtype`; loaded at the first call, after its files were compared with the run's.
    pub fn teacher(&mut self, dtype: Dtype) -> Result<Rc<TeacherModel>, Fault> {
        let kind = kind_of(dtype);
        if let Some((loaded, teacher)) = &self.teacher
            && *loaded == kind
        {
            return Ok(Rc::clone(teacher));
        }
        // The one in the other format leaves before its successor comes: two may not fit.
        self.teacher = None;
        let asked = &self.recipe.teacher;
        let folder =
            Folder::open(&asked.model, asked.variant.as_deref()).or_fault(FailureClass::Config)?;
        let digests = folder.digests().or_fault(FailureClass::Config)?;
        if digests != self.record.teacher_files {
            return Err(Fault::config(format!(
                "the teacher in {} is not the one that the run was begun with: {}; restore its files, or \
                 choose a new output",
                asked.model.display(),
                first_difference(&self.record.teacher_files, &digests)
            )));
        }
        let teacher = Rc::new(TeacherModel::load(&folder, kind, self.device)?);
        self.teacher = Some((kind, Rc::clone(&teacher)));
        Ok(teacher)
    }
}

impl TeacherModel {
    /// Loads a checked folder, computing in `kind` on `device`.
    pub fn load(folder: &Folder, kind: Kind, device: Device) -> Result<Self, Fault> {
        let parts = Teacher::load(folder, kind, device).or_fault(FailureClass::Config)?;
        let (schedule, prediction) = mathematics(&parts.schedule)?;
        Ok(Self {
            parts,
            schedule: schedule.to_device(device),
            prediction,
        })
    }
}

/// The noise schedule and the prediction that a scheduler configuration names.
fn mathematics(config: &ScheduleConfig) -> Result<(Schedule, Prediction), Fault> {
    let (beta_start, beta_end) = (config.beta_start, config.beta_end);
    let betas = match (&config.trained_betas, config.beta_schedule) {
        (Some(betas), _) => Betas::Trained(betas.clone()),
        (None, BetaSchedule::Linear) => Betas::Linear {
            start: beta_start,
            end: beta_end,
        },
        (None, BetaSchedule::ScaledLinear) => Betas::ScaledLinear {
            start: beta_start,
            end: beta_end,
        },
        (None, BetaSchedule::SquaredCosine) => Betas::SquaredCosine,
    };
    let schedule = Schedule::new(&betas, config.zero_snr).or_fault(FailureClass::Config)?;
    let prediction = match config.prediction {
        teacher::Prediction::Epsilon => Prediction::Epsilon,
        teacher::Prediction::Velocity => Prediction::V,
        teacher::Prediction::Sample => Prediction::Sample,
    };
    prediction.check(&schedule).or_fault(FailureClass::Config)?;
    Ok((schedule, prediction))
}

/// libtorch's name of a number format.
pub fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::Bf16 => Kind::BFloat16,
    }
}

fn first_difference<V: PartialEq>(
    expected: &std::collections::BTreeMap<String, V>,
    found: &std::collections::BTreeMap<String, V>,
) -> String {
    let mut names = expected.keys().chain(found.keys());
    match names.find(|name| expected.get(*name) != found.get(*name)) {
        Some(name) if !found.contains_key(name) => format!("{name} is missing"),
        Some(name) if !expected.contains_key(name) => format!("{name} is new"),
        Some(name) => format!("{name} has other bytes"),
        None => "nothing differs".to_owned(),
    }
}
