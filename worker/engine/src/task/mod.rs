//! What an engine does for its worker: one kind of task in one file.
//!
//! A task reads the run's record, works, writes objects, and asks the worker to make them count. Whatever goes
//! wrong becomes a [`Fault`]: a class that decides what happens next, and a sentence for people.

pub mod current;
pub mod distill;
pub mod evaluate;
pub mod export;
pub mod finished_student;
pub mod host;
pub mod preview;
pub mod reference;
pub mod rows;
pub mod samples;
pub mod saver;
pub mod student;
pub mod studio;
pub mod trajectories;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use distillery_common::task::{Failure, FailureClass};
use distillery_common::{checkpoint, storage};

/// Why a task did not end well.
#[derive(Debug)]
pub struct Fault {
    class: FailureClass,
    error: anyhow::Error,
}

impl Fault {
    /// A fault of `class`, in words.
    pub fn new(class: FailureClass, message: impl Into<String>) -> Self {
        Self {
            class,
            error: anyhow::Error::msg(message.into()),
        }
    }

    /// A fault of the recipe or the host.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(FailureClass::Config, message)
    }

    /// As it is reported: the whole chain in one line.
    pub fn to_failure(&self) -> Failure {
        Failure {
            class: self.class,
            message: format!("{:#}", self.error),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        Self::new(failure.class, failure.message)
    }
}

impl From<checkpoint::Error> for Fault {
    fn from(error: checkpoint::Error) -> Self {
        let class = match &error {
            checkpoint::Error::Storage(storage) => storage.class(),
            checkpoint::Error::Manifest { .. }
            | checkpoint::Error::Differs { .. }
            | checkpoint::Error::Damaged(_) => FailureClass::Schema,
        };
        Self {
            class,
            error: error.into(),
        }
    }
}

impl From<storage::Error> for Fault {
    fn from(error: storage::Error) -> Self {
        Self {
            class: error.class(),
            error: error.into(),
        }
    }
}

/// Gives an error the class that decides what happens next.
pub trait OrFault<T> {
    /// The value, or a fault of `class`.
    fn or_fault(self, class: FailureClass) -> Result<T, Fault>;
}

impl<T, E: Into<anyhow::Error>> OrFault<T> for Result<T, E> {
    fn or_fault(self, class: FailureClass) -> Result<T, Fault> {
        self.map_err(|error| Fault {
            class,
            error: error.into(),
        })
    }
}

/// Runs `work`; a panic in it, such as libtorch's when memory is short, becomes a fault.
pub fn contained<T>(work: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("a panic without words");
        // libtorch appends a C++ backtrace; people need the first lines.
        let text: Vec<&str> = text.lines().take(3).collect();
        let text = text.join(" ");
        let lower = text.to_lowercase();
        let memory = [
            "out of memory",
            "can't allocate memory",
            "not enough memory",
        ];
        Err(if memory.iter().any(|words| lower.contains(words)) {
            Fault::new(
                FailureClass::OutOfMemory,
                format!("memory ran out: {text}; a smaller batch needs less"),
            )
        } else {
            Fault::new(
                FailureClass::Unknown,
                format!("the engine met a fault of its own: {text}"),
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_fault_with_its_class() {
        let fault = |text: &'static str| {
            contained::<()>(|| panic!("{text}"))
                .expect_err("a panic")
                .to_failure()
        };
        assert_eq!(
            fault("index 7 is out of range").class,
            FailureClass::Unknown
        );
        let memory = fault("CUDA out of memory. Tried to allocate 2.00 GiB\nframe #0: x");
        assert_eq!(memory.class, FailureClass::OutOfMemory);
        assert!(
            memory.message.contains("smaller batch"),
            "{}",
            memory.message
        );
        assert_eq!(contained(|| Ok(3)).ok(), Some(3));
    }

    #[test]
    fn a_fault_names_its_causes_in_one_line() {
        let error = anyhow::anyhow!("no such file").context("opening the teacher");
        let failure = Err::<(), _>(error)
            .or_fault(FailureClass::Config)
            .expect_err("it is one");
        assert_eq!(
            failure.to_failure().message,
            "opening the teacher: no such file"
        );
    }
}
