//! How the run as a whole stands.

use std::fmt;
use std::time::Duration;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every stage is sealed.
    Succeeded,
    /// It cannot go on.
    Failed {
        /// What, where, and what to do, in the first line; below it what the engine printed last.
        message: String,
    },
    /// Somebody gave it up for good.
    Cancelled {
        /// Who or why.
        reason: String,
    },
    /// Somebody stopped it; the same command resumes it.
    Stopped {
        /// Who or why.
        reason: String,
    },
}

impl Outcome {
    /// Whether nothing follows: no later coordinator may open the run again.
    pub fn is_for_good(&self) -> bool {
        match self {
            Self::Succeeded | Self::Cancelled { .. } => true,
            Self::Failed { .. } | Self::Stopped { .. } => false,
        }
    }
}

/// In one line.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Succeeded => write!(f, "succeeded"),
            Self::Failed { message } => {
                let headline = message.lines().next().unwrap_or_default();
                write!(f, "failed: {headline}")
            }
            Self::Cancelled { reason } => write!(f, "cancelled: {reason}"),
            Self::Stopped { reason } => write!(f, "stopped: {reason}"),
        }
    }
}

/// Where the run is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// Stages advance.
    Running,
    /// What is under way is finished, and nothing new is begun.
    Paused,
    /// Workers finish what they hold; at the deadline the run stops anyway.
    Stopping { reason: String, deadline: Duration },
    /// Terminal.
    Finished(Outcome),
}
