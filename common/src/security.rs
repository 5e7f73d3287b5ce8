//! Who may talk to whom: the run's token, the certificates derived from it, and the join string.
//!
//! A run has one secret, a 256-bit token. The key of its certificate authority is derived from the token and the
//! run's id (HKDF-SHA256, RFC 5869), names and dates are fixed and Ed25519 signs deterministically, so everybody
//! who holds the token makes the same certificates: nothing secret is stored with the run, and a coordinator
//! that starts again on another host is trusted at once. This module must never log, and its types never show
//! the token unless they are asked to.

use std::fmt;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use ring::hkdf;
use ring::rand::{SecureRandom as _, SystemRandom};
use subtle::ConstantTimeEq as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

use crate::cryptography;
use crate::ids::Digest;

mod join;
#[cfg(test)]
mod tests;

pub use self::join::{Join, JoinError};

/// The name that every coordinator's certificate carries, whatever host it runs on.
pub const SERVER_NAME: &str = "coordinator.distillery";

/// What went wrong with tokens and certificates.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is no token.
    #[error(
        "a token is 64 hexadecimal digits (256 bits), not {0} characters of other text; `openssl rand -hex 32` makes one"
    )]
    NotAToken(usize),
    /// The token file cannot be used.
    #[error("token file {}: {source}", path.display())]
    TokenFile {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others could read the token.
    #[error(
        "token file {} may be read by others (mode {mode:03o}); run `chmod 600` on it or remove it",
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
}

/// The secret that admits to one run.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    /// A new token from the operating system's randomness.
    pub fn generate() -> Result<Self, Error> {
        let mut bytes = [0; 32];
        SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| Error::NoRandomness)?;
        Ok(Self(bytes))
    }

    /// Reads 64 hexadecimal digits; white space around them is ignored.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        Digest::parse(text)
            .map(|digest| Self(digest.0))
            .ok_or(Error::NotAToken(text.chars().count()))
    }

    /// The token in the file at `path`; makes the file, readable by its owner alone, where there is none.
    pub fn load_or_create(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::TokenFile {
            path: path.to_owned(),
            source,
        };
        let token = Self::generate()?;
        let made = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        match made {
            Ok(mut file) => {
                writeln!(file, "{}", token.reveal()).map_err(failed)?;
                file.sync_all().map_err(failed)?;
                Ok(token)
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Self::load(path),
            Err(error) => Err(failed(error)),
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
    let failed = |source| Error::TokenFile {
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

/// The certificates of one run.
#[derive(Clone)]
pub struct Authority {
    certificate_der: Vec<u8>,
    certificate_pem: String,
    server_pem: String,
    server_key_pem: String,
}

impl Authority {
    /// The certificates that everybody derives from (`token`, `run_id`).
    pub fn derive(token: &Token, run_id: &str) -> Result<Self, Error> {
        let authority_key = signing_key(token, run_id, b"distillery certificate authority v1")?;
        let authority = rcgen::CertifiedIssuer::self_signed(
            certificate(run_id, "Distillery run", &[], true)?,
            authority_key,
        )?;
        let server_key = signing_key(token, run_id, b"distillery coordinator certificate v1")?;
        let names = [SERVER_NAME, "localhost", "127.0.0.1", "::1"];
        let server =
            certificate(run_id, SERVER_NAME, &names, false)?.signed_by(&server_key, &authority)?;
        Ok(Self {
            certificate_der: authority.der().to_vec(),
            certificate_pem: authority.pem(),
            server_pem: server.pem(),
            server_key_pem: server_key.serialize_pem(),
        })
    }

    /// SHA-256 of the authority's certificate.
    pub fn fingerprint(&self) -> Digest {
        Digest::of(&self.certificate_der)
    }

    /// How the coordinator proves who it is.
    pub fn server_tls(&self) -> ServerTlsConfig {
        cryptography::choose();
        let identity = Identity::from_pem(&self.server_pem, &self.server_key_pem);
        ServerTlsConfig::new().identity(identity)
    }

    /// How a worker or a person's command checks that.
    pub fn client_tls(&self) -> ClientTlsConfig {
        cryptography::choose();
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.certificate_pem))
            .domain_name(SERVER_NAME)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authority({})", self.fingerprint())
    }
}

/// The contents of a certificate. Everything in it is fixed or follows from its arguments.
fn certificate(
    run_id: &str,
    common_name: &str,
    names: &[&str],
    is_authority: bool,
) -> Result<rcgen::CertificateParams, Error> {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let mut params = rcgen::CertificateParams::new(names)?;
    // A run's certificates end with its token; dates would only make hosts with wrong clocks fail.
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2999, 12, 31);
    let serial = Digest::of(format!("{run_id} {common_name}").as_bytes());
    params.serial_number = Some(rcgen::SerialNumber::from_slice(&serial.0[..8]));
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, common_name);
    params
        .distinguished_name
        .push(rcgen::DnType::OrganizationName, run_id);
    if is_authority {
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    } else {
        params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    }
    Ok(params)
}

/// What the engines of a run recognise each other by: 32 bytes that follow from (token, run id).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GroupSecret(pub [u8; 32]);

impl GroupSecret {
    /// The secret of the run.
    pub fn derive(token: &Token, run_id: &str) -> Self {
        Self(derive(token, run_id, b"distillery training group v1"))
    }
}

impl fmt::Debug for GroupSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupSecret(…)")
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

/// An Ed25519 key from HKDF-SHA256(token, salt = run id, info = purpose).
fn signing_key(token: &Token, run_id: &str, purpose: &[u8]) -> Result<rcgen::KeyPair, Error> {
    // PKCS#8 of an Ed25519 private key (RFC 8410 §7): a fixed head, then the 32-byte seed.
    let mut pkcs8 = vec![
        0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04,
        0x20,
    ];
    pkcs8.extend_from_slice(&derive(token, run_id, purpose));
    Ok(rcgen::KeyPair::try_from(pkcs8.as_slice())?)
}
