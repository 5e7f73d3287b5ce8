//! Who may talk to whom: the run's token, the certificates derived from it, and the join string.
//!
//! A run has one secret, a 256-bit token. The key of its certificate authority is derived from the token and the
//! run's id (HKDF-SHA256, RFC 5869), names and dates are fixed and Ed25519 signs deterministically, so everybody
//! who holds the token makes the same certificates: nothing secret is stored with the run, and a coordinator
//! that starts again on another host is trusted at once. This module must never log, and its types never show
//! the token unless they are asked to.

use std::fmt;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use ring::rand::{SecureRandom as _, SystemRandom};
use ring::{hkdf, hmac};
use subtle::ConstantTimeEq as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;

use crate::ids::Digest;

mod authority;
mod join;
#[cfg(test)]
mod tests;

pub use self::authority::{Authority, SERVER_NAME};
pub use self::join::{Join, JoinError};

/// What went wrong with tokens and certificates.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is no token.
    #[error(
        "a token is 64 hexadecimal digits (256 bits), not {0} characters of other text; `openssl rand -hex 32` makes one"
    )]
    NotAToken(usize),
    /// A file that holds the token, by itself or in a join string, cannot be used.
    #[error("the file {} cannot be used", path.display())]
    SecretFile {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others could read the token.
    #[error(
        "the file {} holds the run's token and may be read by others (mode {mode:03o}); run `chmod 600` on it or remove it",
        path.display()
    )]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The operating system gave no randomness.
    #[error("the operating system gave no random bytes for a token")]
    NoRandomness,
    /// A certificate could not be made.
    #[error("making the run's certificates failed")]
    Certificate(#[from] rcgen::Error),
    /// The certificates cannot be used.
    #[error("the run's certificates do not fit TLS")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The secret that admits to one run.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    /// A new token from the operating system's randomness.
    pub fn generate() -> Result<Self, Error> {
        nonce().map(Self)
    }

    /// Reads 64 hexadecimal digits; white space around them is ignored.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        Digest::parse(text)
            .map(|digest| Self(digest.0))
            .ok_or(Error::NotAToken(text.chars().count()))
    }

    /// The token in the file at `path`; makes the file, readable by its owner alone, where there is none.
    ///
    /// The file appears whole or not at all, whenever its maker is killed; of several makers one wins, and all have its
    /// token.
    ///
    /// # Errors
    /// [`Error::SecretFile`] or [`Error::Exposed`] where the file cannot be used, [`Error::NotAToken`] where it holds none.
    pub fn load_or_create(path: &Path) -> Result<Self, Error> {
        match Self::load(path) {
            Err(Error::SecretFile { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            known => return known,
        }
        let failed = |source| Error::SecretFile {
            path: path.to_owned(),
            source,
        };
        let token = Self::generate()?;
        // Under a name of its own and readable by nobody else; it goes with this value unless it is kept.
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        writeln!(file, "{}", token.reveal()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        match file.persist_noclobber(path) {
            Ok(_) => Ok(token),
            Err(lost) if lost.error.kind() == io::ErrorKind::AlreadyExists => Self::load(path),
            Err(lost) => Err(failed(lost.error)),
        }
    }

    /// The token in the file at `path`, which only its owner may read.
    pub fn load(path: &Path) -> Result<Self, Error> {
        Self::parse(&read_private(path)?)
    }

    /// The token as text, for a 0600 file, a join string or a request's header; nowhere else.
    pub fn reveal(&self) -> String {
        Digest(self.0).to_string()
    }

    /// Whether both are the same, in time that does not depend on where they differ.
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }

    /// Whether an `authorization` header shows this token.
    pub fn admits(&self, header: Option<&[u8]>) -> bool {
        let expected = format!("Bearer {}", self.reveal());
        header.is_some_and(|shown| shown.ct_eq(expected.as_bytes()).into())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// The text of a file that only its owner may read.
///
/// The system's administrator may keep it for this user's group: so a kubelet mounts a Secret.
pub fn read_private(path: &Path) -> Result<String, Error> {
    let failed = |source| Error::SecretFile {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::metadata(path).map_err(failed)?;
    let mode = file.permissions().mode() & 0o777;
    // A process's own folder in /proc belongs to whom the process runs as.
    let own = std::fs::metadata("/proc/self").map(|me| me.uid());
    if is_exposed(mode, file.uid(), own.unwrap_or(file.uid())) {
        return Err(Error::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    std::fs::read_to_string(path).map_err(failed)
}

/// Whether others than `owner` may read a file of this mode, as `me` sees it: what root keeps for a group that `me` is
/// in was meant for it.
fn is_exposed(mode: u32, owner: u32, me: u32) -> bool {
    let for_my_group = owner == 0 && me != 0;
    let own = if for_my_group { 0o740 } else { 0o700 };
    mode & 0o777 & !own != 0
}

/// Shows the token with every request of a client.
#[derive(Clone, Debug)]
pub struct ShowToken(MetadataValue<Ascii>);

impl ShowToken {
    /// Shows `token`.
    pub fn new(token: &Token) -> Self {
        let mut value = MetadataValue::try_from(format!("Bearer {}", token.reveal()))
            .expect("hexadecimal digits fit in a header");
        value.set_sensitive(true);
        Self(value)
    }
}

impl Interceptor for ShowToken {
    fn call(
        &mut self,
        mut request: tonic::Request<()>,
    ) -> Result<tonic::Request<()>, tonic::Status> {
        request
            .metadata_mut()
            .insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// Refuses every request to a server that does not show the token.
#[derive(Clone, Debug)]
pub struct RequireToken(Token);

impl RequireToken {
    /// Requires `token`.
    pub fn new(token: Token) -> Self {
        Self(token)
    }
}

impl Interceptor for RequireToken {
    fn call(&mut self, request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        let shown = request.metadata().get("authorization");
        if self.0.admits(shown.map(|value| value.as_bytes())) {
            Ok(request)
        } else {
            Err(tonic::Status::unauthenticated(
                "the token does not belong to this run; use the join string that this coordinator wrote",
            ))
        }
    }
}

/// Bytes that nobody can foresee, and that are never said twice.
///
/// # Errors
/// [`Error::NoRandomness`].
pub fn nonce() -> Result<[u8; 32], Error> {
    let mut bytes = [0; 32];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| Error::NoRandomness)?;
    Ok(bytes)
}

/// What the engines of a run recognise each other by: 32 bytes that follow from (token, run id).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GroupSecret(pub [u8; 32]);

impl GroupSecret {
    /// The secret of the run.
    pub fn derive(token: &Token, run_id: &str) -> Self {
        Self(derive(token, run_id, b"distillery training group v1"))
    }

    /// What only a holder of the secret can say about `words` (HMAC-SHA256), so that the secret itself is never said.
    pub fn seal(&self, words: &[u8]) -> [u8; 32] {
        let sealed = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.0), words);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(sealed.as_ref());
        bytes
    }

    /// Whether `seal` is this secret's of `words`, in time that does not depend on where it differs.
    pub fn sealed(&self, words: &[u8], seal: &[u8; 32]) -> bool {
        self.seal(words).ct_eq(seal).into()
    }
}

impl fmt::Debug for GroupSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupSecret(…)")
    }
}

/// What admits to the live page of a run, and to nothing else: it follows from (token, run id), and neither follows
/// from it.
#[derive(Clone)]
pub struct PageKey(String);

impl PageKey {
    /// The key of the run.
    pub fn derive(token: &Token, run_id: &str) -> Self {
        let key = derive(token, run_id, b"distillery live page v1");
        Self(Digest(key).to_string())
    }

    /// The key as text, for a link that is shown to the run's owner alone, and for the cookie that it leaves.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether `shown` is the key, in time that does not depend on where it differs.
    pub fn admits(&self, shown: &[u8]) -> bool {
        shown.ct_eq(self.0.as_bytes()).into()
    }
}

impl fmt::Debug for PageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PageKey(…)")
    }
}

/// HKDF-SHA256 of the token, salted with the run id.
fn derive(token: &Token, run_id: &str, purpose: &[u8]) -> [u8; 32] {
    let mut derived = [0; 32];
    hkdf::Salt::new(hkdf::HKDF_SHA256, run_id.as_bytes())
        .extract(&token.0)
        .expand(&[purpose], hkdf::HKDF_SHA256)
        .and_then(|output| output.fill(&mut derived))
        .expect("HKDF-SHA256 gives up to 8160 bytes, and 32 are asked for");
    derived
}
