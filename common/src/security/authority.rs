//! The certificates of one run: its authority, the coordinator's, and the one that every member shows.
//!
//! All follow from (token, run id). Whoever knows the token can make each of them, so a certificate says no more than
//! that its holder knows the token; it says so in the handshake, before a stranger's first request is read.

use std::fmt;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use super::{Error, Token, derive};
use crate::cryptography;
use crate::ids::Digest;

/// The name that every coordinator's certificate carries, whatever host it runs on.
pub const SERVER_NAME: &str = "coordinator.distillery";

/// The name on the certificate of workers and of people's commands.
const MEMBER_NAME: &str = "member.distillery";

/// The one protocol that both ends speak: messages of HTTP/2.
const ALPN_H2: &[u8] = b"h2";

/// What the page speaks.
const ALPN_HTTP: &[u8] = b"http/1.1";

/// The certificates of one run.
#[derive(Clone)]
pub struct Authority {
    pub(super) certificate_der: Vec<u8>,
    pub(super) certificate_pem: String,
    pub(super) server: Proof,
    pub(super) member: Proof,
}

/// A certificate with its key.
#[derive(Clone)]
pub(super) struct Proof {
    pub(super) certificate_der: Vec<u8>,
    pub(super) certificate_pem: String,
    key_der: Vec<u8>,
    pub(super) key_pem: String,
}

/// What a certificate is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Authority,
    Server,
    Member,
}

impl Authority {
    /// The certificates that everybody derives from (`token`, `run_id`).
    pub fn derive(token: &Token, run_id: &str) -> Result<Self, Error> {
        let key = signing_key(token, run_id, b"distillery certificate authority v1")?;
        let params = contents(run_id, "Distillery run", &[], Purpose::Authority)?;
        let authority = rcgen::CertifiedIssuer::self_signed(params, key)?;
        let prove = |name, names: &[&str], purpose, info| {
            let key = signing_key(token, run_id, info)?;
            let certificate =
                contents(run_id, name, names, purpose)?.signed_by(&key, &authority)?;
            Ok::<_, Error>(Proof {
                certificate_der: certificate.der().to_vec(),
                certificate_pem: certificate.pem(),
                key_der: key.serialize_der(),
                key_pem: key.serialize_pem(),
            })
        };
        let server_names = [SERVER_NAME, "localhost", "127.0.0.1", "::1"];
        let server_info = b"distillery coordinator certificate v1";
        let member_info = b"distillery member certificate v1";
        Ok(Self {
            certificate_der: authority.der().to_vec(),
            certificate_pem: authority.pem(),
            server: prove(SERVER_NAME, &server_names, Purpose::Server, server_info)?,
            member: prove(MEMBER_NAME, &[MEMBER_NAME], Purpose::Member, member_info)?,
        })
    }

    /// SHA-256 of the authority's certificate.
    pub fn fingerprint(&self) -> Digest {
        Digest::of(&self.certificate_der)
    }

    /// The authority's certificate in PEM, for whoever checks the page's: no secret.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// How the coordinator proves who it is, and has everybody prove that they know the token: TLS 1.3 alone, and
    /// nothing is resumed, so that what was recorded of one connection opens no other.
    ///
    /// # Errors
    /// [`Error::Tls`] should the certificates not fit.
    pub fn server_config(&self) -> Result<Arc<rustls::ServerConfig>, Error> {
        cryptography::choose();
        let mut roots = RootCertStore::empty();
        let root = CertificateDer::from(self.certificate_der.clone());
        roots.add(root).map_err(unfit)?;
        let members = WebPkiClientVerifier::builder(Arc::new(roots));
        let members = members.build().map_err(unfit)?;
        let chain = vec![CertificateDer::from(self.server.certificate_der.clone())];
        let key = PrivatePkcs8KeyDer::from(self.server.key_der.clone());
        let mut config =
            rustls::ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
                .with_client_cert_verifier(members)
                .with_single_cert(chain, key.into())
                .map_err(unfit)?;
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// How the coordinator proves who it is to a browser, which has no certificate of the run and shows a key instead.
    ///
    /// # Errors
    /// [`Error::Tls`] should the certificate not fit.
    pub fn page_config(&self) -> Result<Arc<rustls::ServerConfig>, Error> {
        cryptography::choose();
        let chain = vec![CertificateDer::from(self.server.certificate_der.clone())];
        let key = PrivatePkcs8KeyDer::from(self.server.key_der.clone());
        let mut config =
            rustls::ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
                .with_no_client_auth()
                .with_single_cert(chain, key.into())
                .map_err(unfit)?;
        config.alpn_protocols = vec![ALPN_HTTP.to_vec()];
        Ok(Arc::new(config))
    }

    /// How a worker or a person's command checks that, and proves that it belongs to the run.
    pub fn client_tls(&self) -> ClientTlsConfig {
        cryptography::choose();
        let member = Identity::from_pem(&self.member.certificate_pem, &self.member.key_pem);
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.certificate_pem))
            .identity(member)
            .domain_name(SERVER_NAME)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authority({})", self.fingerprint())
    }
}

fn unfit(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Tls(Box::new(error))
}

/// The contents of a certificate. Everything in it is fixed or follows from its arguments.
fn contents(
    run_id: &str,
    common_name: &str,
    names: &[&str],
    purpose: Purpose,
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
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    match purpose {
        Purpose::Authority => {
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
            params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        }
        Purpose::Server => {
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        }
        Purpose::Member => {
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        }
    }
    Ok(params)
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
