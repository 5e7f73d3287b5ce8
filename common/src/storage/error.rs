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

/// Where a host of a cloud is asked for its role: the last resort of object_store, when the environment names no one.
const INSTANCE_ROLES: [&str; 3] = [
    "//169.254.169.254/",
    "//[fd00:ec2::254]/",
    "//metadata.google.internal/",
];

fn asks_an_instance_role(error: &object_store::Error) -> bool {
    let said = chain(error);
    INSTANCE_ROLES.iter().any(|host| said.contains(host))
}

/// What is missing for the store at `uri`.
fn wanted(uri: &str) -> &'static str {
    match uri.split("://").next() {
        Some("s3" | "s3a") => {
            "AWS_ACCESS_KEY_ID is not set and no instance role answers; set it and AWS_SECRET_ACCESS_KEY (profiles in ~/.aws are not read)"
        }
        Some("gs") => {
            "GOOGLE_APPLICATION_CREDENTIALS is not set and no instance role answers; set it to the file of a key"
        }
        _ => {
            "AZURE_STORAGE_ACCOUNT_KEY is not set and no managed identity answers; set it and AZURE_STORAGE_ACCOUNT_NAME"
        }
    }
}

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
    /// Nothing in the environment says who we are, and the host has no role of its own.
    #[error("there are no credentials for {uri}: {wants}")]
    NoCredentials {
        /// The store.
        uri: String,
        /// What is not there, and what to set.
        wants: &'static str,
        /// What was asked last, and what it said.
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
            source if asks_an_instance_role(&source) => Self::NoCredentials {
                wants: wanted(&uri),
                uri,
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

    /// Whether the same operation is tried again at once.
    pub(super) fn is_tried_again(&self) -> bool {
        // A request for credentials has been repeated by object_store, for as long as one to a bucket.
        self.is_transient() && !matches!(self, Self::NoCredentials { .. })
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
            // A role may be slow to answer; one that is refused was never given.
            Self::NoCredentials { source, .. } => !["401", "403", "404"]
                .iter()
                .any(|code| source.to_string().contains(&format!("status code: {code}"))),
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
            Self::Denied { .. } | Self::NoCredentials { .. } => FailureClass::Auth,
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
        assert!(error.is_transient() && error.is_tried_again());
    }

    #[test]
    fn missing_credentials_are_called_so_and_not_asked_for_again() {
        let aws = "Error performing PUT http://169.254.169.254/latest/api/token in 1ms";
        let google =
            "Error performing GET http://metadata.google.internal/computeMetadata/v1/x in 1ms";
        let azure =
            "Error performing GET http://169.254.169.254/metadata/identity/oauth2/token in 1ms";
        for (uri, said, variable) in [
            ("s3://b/x", aws, "AWS_ACCESS_KEY_ID is not set"),
            (
                "gs://b/x",
                google,
                "GOOGLE_APPLICATION_CREDENTIALS is not set",
            ),
            ("az://b/x", azure, "AZURE_STORAGE_ACCOUNT_KEY is not set"),
        ] {
            let refused = error(uri, said, "403 Forbidden");
            let text = chain(&refused);
            assert!(text.contains(variable), "{text}");
            assert!(text.contains(uri) && text.contains(said), "{text}");
            assert_eq!(refused.class(), crate::task::FailureClass::Auth);
            assert!(!refused.is_transient() && !refused.is_tried_again());
            // A role that is there and overloaded is worth another try of whoever has time.
            let busy = error(uri, said, "503 Service Unavailable");
            assert!(busy.is_transient() && !busy.is_tried_again(), "{busy}");
        }
    }
}
