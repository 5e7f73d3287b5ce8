//! Students that have been trained: found in the store, verified, loaded.

use distillery_common::checkpoint::{self, Checkpoint, Manifest};
use distillery_common::recipe::{Compute, Dtype, Stage};
use distillery_common::storage::Store;
use distillery_common::task::FailureClass;
use tch::Device;

use super::student::Student;
use super::{Fault, OrFault as _};
use crate::io::Io;
use crate::workbench::TeacherModel;

/// A checkpoint whose weights are worth sampling.
#[derive(Debug)]
pub struct Found {
    checkpoint: Checkpoint,
}

impl Found {
    /// The whole checkpoint of `stage` at `step`, by the newest generation.
    pub fn at(io: &Io, store: &Store, stage: &str, step: u64) -> Result<Self, Fault> {
        let newest = io.wait(checkpoint::newest(store, stage, |found, _| found == step));
        let checkpoint = newest.or_fault(FailureClass::Io)?.ok_or_else(|| {
            Fault::new(
                FailureClass::Io,
                format!(
                    "stage {stage} has no whole checkpoint at step {step} in {}",
                    store.uri()
                ),
            )
        })?;
        Ok(Self { checkpoint })
    }

    /// The newest whole checkpoint of `stage`.
    pub fn newest(io: &Io, store: &Store, stage: &str) -> Result<Self, Fault> {
        let newest = io.wait(checkpoint::newest(store, stage, |_, _| true));
        let checkpoint = newest.or_fault(FailureClass::Io)?.ok_or_else(|| {
            Fault::new(
                FailureClass::Io,
                format!("stage {stage} has no whole checkpoint in {}", store.uri()),
            )
        })?;
        Ok(Self { checkpoint })
    }

    /// What the checkpoint consists of.
    pub fn manifest(&self) -> &Manifest {
        self.checkpoint.manifest()
    }

    /// The student: averaged weights where the stage keeps an average, computing in `dtype`. `teacher` computes in
    /// the same.
    pub fn load(
        &self,
        io: &Io,
        teacher: &TeacherModel,
        stage: &Stage,
        dtype: Dtype,
        run_seed: u64,
        device: Device,
    ) -> Result<Student, Fault> {
        let stage = Stage {
            compute: Compute {
                dtype,
                ..stage.compute
            },
            ..stage.clone()
        };
        let student = Student::fresh(teacher, &stage, run_seed, device)?;
        io.wait(student.load_published(&self.checkpoint))?;
        Ok(student)
    }
}
