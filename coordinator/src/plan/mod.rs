//! The plan: which stages a run has, what each reads, and how much work each is.
//!
//! Pure: a function of the recipe and of facts that others measured. Immutable once made. Must never know what
//! has already been done, who does it, or when.

mod build;
mod display;
mod memory;

pub use build::{Facts, build};
pub use display::{bytes, grouped};
pub use memory::{Memory, MemoryTable, memory};

/// Name of the stage that draws trajectories.
pub const TRAJECTORIES: &str = "trajectories";
/// Name of the stage that draws the teacher's own samples for evaluation.
pub const REFERENCE: &str = "reference";
/// Name of the stage that judges the models.
pub const EVALUATE: &str = "evaluate";
/// Name of the stage that writes the finished student.
pub const EXPORT: &str = "export";

/// The stages of a run, each after everything it reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// In order of preference: earlier stages get workers first.
    pub stages: Vec<Stage>,
}

/// A node of the plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// Unique in the plan; part of storage keys.
    pub name: String,
    /// What happens in it.
    pub kind: Kind,
    /// Positions in the plan of the stages whose sealed results it reads; all of them smaller than its own.
    pub after: Vec<usize>,
    /// How much there is to do.
    pub work: Work,
}

/// What happens in a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The teacher draws rows to learn from.
    Trajectories,
    /// A group trains a student.
    Distill,
    /// The teacher draws the samples that students are compared with.
    Reference,
    /// Models are judged.
    Evaluate,
    /// The finished student is written and verified.
    Export,
}

/// How much there is to do in a stage.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// Tasks `0..count`, each leased on its own.
    Tasks(Tasks),
    /// Steps that a group takes together.
    Training(Training),
}

/// Work that is cut into tasks.
#[derive(Debug, Clone, PartialEq)]
pub struct Tasks {
    /// Number of tasks, at least 1.
    pub count: u64,
    /// Rows (or samples) that they make together.
    pub rows: u64,
    /// Bytes that they write together; an estimate.
    pub bytes: u64,
    /// How many of them may be set aside for bad input.
    pub quarantine_limit: u64,
}

/// Work of a group.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    /// Optimizer steps.
    pub steps: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Newest checkpoints that are kept, at least 1.
    pub keep_last: u32,
    /// Rows in one step over all members.
    pub global_batch: u64,
    /// Fewest members.
    pub min_world: u32,
    /// Whether its bits do not depend on how many.
    pub reproducible: bool,
    /// Most members.
    pub max_world: u32,
    /// Position of the stage whose final checkpoint this one starts from.
    pub parent: Option<usize>,
}

impl Plan {
    /// Position of the stage called `name`.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.stages.iter().position(|stage| stage.name == name)
    }
}

impl Kind {
    /// For people and for the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trajectories => "trajectories",
            Self::Distill => "distill",
            Self::Reference => "reference",
            Self::Evaluate => "evaluate",
            Self::Export => "export",
        }
    }
}
