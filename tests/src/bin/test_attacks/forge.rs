//! Certificates and connections of attackers, made without the programs' own code: what anybody could write who knows
//! the token, or does not.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use distillery_common::ids::Digest;
use distillery_common::security::Join;
use ring::hkdf;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// What an attacker shows in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// No certificate.
    Nothing,
    /// Of the run's authority, for members, as it should be.
    Member,
    /// The same, of a time that is over.
    Expired,
    /// Of the run's authority, for the coordinator.
    Server,
    /// Of an authority of the attacker's own.
    Foreign,
}

/// A secret to make certificates from.
#[derive(Debug)]
pub(crate) struct Forge {
    token: Vec<u8>,
    run_id: String,
}

impl Forge {
    pub(crate) fn of(join: &Join) -> Result<Self> {
        let token = Digest::parse(&join.token().reveal()).context("a token is a number")?;
        Ok(Self {
            token: token.0.to_vec(),
            run_id: join.run_id().to_owned(),
        })
    }

    fn key(&self, purpose: &[u8]) -> Result<rcgen::KeyPair> {
        let mut seed = [0; 32];
        hkdf::Salt::new(hkdf::HKDF_SHA256, self.run_id.as_bytes())
            .extract(&self.token)
            .expand(&[purpose], hkdf::HKDF_SHA256)
            .and_then(|output| output.fill(&mut seed))
            .map_err(|_| anyhow::anyhow!("no key"))?;
        let head = [
            0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20,
        ];
        Ok(rcgen::KeyPair::try_from(
            [&head[..], &seed].concat().as_slice(),
        )?)
    }

    fn authority(
        &self,
        key: rcgen::KeyPair,
    ) -> Result<rcgen::CertifiedIssuer<'static, rcgen::KeyPair>> {
        let mut params = self.params("Distillery run")?;
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        Ok(rcgen::CertifiedIssuer::self_signed(params, key)?)
    }

    fn params(&self, name: &str) -> Result<rcgen::CertificateParams> {
        let mut params = rcgen::CertificateParams::new(vec![])?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        let parts = &mut params.distinguished_name;
        parts.push(rcgen::DnType::CommonName, name);
        parts.push(rcgen::DnType::OrganizationName, self.run_id.as_str());
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2999, 12, 31);
        Ok(params)
    }

    /// A client that shows `shown` and believes every server.
    fn config(&self, shown: Shown) -> Result<ClientConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Credulous(provider)));
        if shown == Shown::Nothing {
            return Ok(config.with_no_client_auth());
        }
        let authority_key = match shown {
            Shown::Foreign => rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)?,
            _ => self.key(b"distillery certificate authority v1")?,
        };
        let authority = self.authority(authority_key)?;
        let mut params = self.params("member.distillery")?;
        params.extended_key_usages = vec![match shown {
            Shown::Server => rcgen::ExtendedKeyUsagePurpose::ServerAuth,
            _ => rcgen::ExtendedKeyUsagePurpose::ClientAuth,
        }];
        if shown == Shown::Expired {
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        }
        let key = self.key(b"any key will do")?;
        let certificate = params.signed_by(&key, &authority)?;
        let chain = vec![CertificateDer::from(certificate.der().to_vec())];
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Ok(config.with_client_auth_cert(chain, key.into())?)
    }

    /// Connects to `address` and shakes hands. A server of TLS 1.3 refuses after the client's end of the handshake, so a
    /// stream is no sign that anybody listens.
    pub(crate) async fn connect(
        &self,
        address: &str,
        shown: Shown,
    ) -> Result<TlsStream<TcpStream>> {
        let mut config = self.config(shown)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("coordinator.distillery")?;
        Ok(TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await?)
    }
}

/// Believes every server: an attacker does not care whom it talks to.
#[derive(Debug)]
struct Credulous(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
