//! Why an operation on a store failed, in words that name the object and say what to do.

use std::fmt;

/// What was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reading an object or its length.
    Read,
    /// Writing a data object.
    Write,
    /// Creating an object that must not exist yet.
    Create,
    /// Listing a folder.
    List,
    /// Removing an object.
    Delete,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "reading",
            Self::Write => "writing",
            Self::Create => "creating",
            Self::List => "listing",
            Self::Delete => "deleting",
        })
    }
}

/// An error and its causes on one line, each as far as it says more than those before it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        next = cause.source();
    }
    text
}

/// What a store said, with its causes. It names none as its own source: object_store's errors repeat theirs in their own
/// words, level by level, and a chain of them would say everything three times.
#[derive(Debug)]
pub struct Said(Box<object_store::Error>);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&chain(&*self.0))
    }
}

impl std::error::Error for Said {}

/// Why an operation on a store failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URI names no store that we know or could open.
    #[error("cannot open the store {uri:?}: {reason}")]
    BadUri {
        /// The URI without anything that could be a secret.
        uri: String,
        /// What is wrong with it, and what to write instead.
        reason: String,
    },
    /// There is no such object.
    #[error("there is no object {key} in {uri}")]
    NotFound {
        /// The store.
        uri: String,
        /// The object.
        key: String,
    },
    /// The store refuses us.
    #[error(
        "{operation} {key} in {uri} is not allowed; check the credentials in the environment and their rights"
    )]
    Denied {
        /// The store.
        uri: String,
        /// The object or folder.
        key: String,
        /// What was tried.
        operation: Operation,
        /// What the store said.
        source: Said,
    },
    /// An object ended before the bytes that were asked for.
    #[error(
        "{key} in {uri} ends early: {expected} bytes from {start} were asked for, {found} came"
    )]
    Short {
        /// The store.
        uri: String,
        /// The object.
        key: String,
        /// First byte asked for.
        start: u64,
        /// How many were asked for.
        expected: u64,
        /// How many came.
        found: u64,
    },
    /// Two creations of one object both succeeded.
    #[error(
        "{uri} lets two writers create one object, so it cannot hold a run; use a store with atomic conditional writes"
    )]
    NotAtomic {
        /// The store.
        uri: String,
    },
    /// Everything else that a store can say.
    #[error("{operation} {key} in {uri} failed")]
    Backend {
        /// The store.
        uri: String,
        /// The object or folder.
        key: String,
        /// What was tried.
        operation: Operation,
        /// What the store said.
        source: Said,
    },
}

impl Error {
    /// Sorts what object_store says by what a caller would do about it.
    pub(super) fn new(
        uri: &str,
        key: &str,
        operation: Operation,
        source: object_store::Error,
    ) -> Self {
        use object_store::Error as Store;
        let (uri, key) = (uri.to_owned(), key.to_owned());
        match source {
            Store::NotFound { .. } => Self::NotFound { uri, key },
            Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => Self::Denied {
                uri,
                key,
                operation,
                source: Said(source.into()),
            },
            source => Self::Backend {
                uri,
                key,
                operation,
                source: Said(source.into()),
            },
        }
    }

    /// Whether the same operation may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Backend {
                source, operation, ..
            } => match *source.0 {
                object_store::Error::Generic { .. } | object_store::Error::JoinError { .. } => true,
                // Whoever creates looks at what is there first: this is a conflict over nothing.
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. } => *operation == Operation::Create,
                _ => false,
            },
            Self::BadUri { .. }
            | Self::NotFound { .. }
            | Self::Denied { .. }
            | Self::Short { .. }
            | Self::NotAtomic { .. } => false,
        }
    }

    /// The class under which a task that met this error fails.
    pub fn class(&self) -> crate::task::FailureClass {
        use crate::task::FailureClass;
        match self {
            Self::BadUri { .. } | Self::NotAtomic { .. } => FailureClass::Config,
            Self::Denied { .. } => FailureClass::Auth,
            Self::NotFound { .. } | Self::Short { .. } | Self::Backend { .. } => FailureClass::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As object_store's own: each level repeats the one below it in its words.
    #[derive(Debug, thiserror::Error)]
    #[error("{said} - {source}")]
    struct Repeating {
        said: &'static str,
        source: Innermost,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("Server returned non-2xx status code: {0}: no")]
    struct Innermost(&'static str);

    fn error(uri: &str, said: &'static str, code: &'static str) -> Error {
        let source = Repeating {
            said,
            source: Innermost(code),
        };
        let source = object_store::Error::Generic {
            store: "S3",
            source: source.into(),
        };
        Error::new(uri, "run.json", Operation::Read, source)
    }

    #[test]
    fn a_cause_is_said_once() {
        let error = error(
            "s3://b/x",
            "Error performing GET https://b.example/x",
            "500",
        );
        assert_eq!(
            chain(&error),
            "reading run.json in s3://b/x failed: Generic S3 error: Error performing GET https://b.example/x - \
             Server returned non-2xx status code: 500: no"
        );
        let levels = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source());
        assert_eq!(
            levels.count(),
            2,
            "whoever prints every level repeats nothing"
        );
        assert!(error.is_transient());
    }
}
