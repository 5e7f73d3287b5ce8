//! The join string: everything that a worker needs to know to find and trust its coordinator.
//!
//! ```text
//! https://host:port/<run id>#<fingerprint of the authority>#<token>      with TLS
//! http://host:port/<run id>#<token>                                      without, on one host or with --insecure
//! ```

use std::fmt;

use super::{Authority, Token};
use crate::ids::Digest;

/// A checked join string. `Display` hides the token; [`Join::reveal`] shows it.
#[derive(Clone, Debug)]
pub struct Join {
    address: String,
    run_id: String,
    token: Token,
    authority: Option<Authority>,
}

/// Why a text is no usable join string. Never holds the token.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Not of the documented form.
    #[error(
        "the join string has no {missing}; it reads https://HOST:PORT/RUN#FINGERPRINT#TOKEN and is printed by `coordinator run`"
    )]
    Form {
        /// The part that is not there.
        missing: &'static str,
    },
    /// TLS is off although the coordinator is on another host.
    #[error(
        "the join string says http:// for {address}, which is not this host; without TLS the token could be read on the way, so say --insecure to accept that"
    )]
    Insecure {
        /// Where the coordinator is.
        address: String,
    },
    /// The two halves of the secret do not belong together.
    ///
    /// What stands in the fingerprint's place is not told: it may be the token.
    #[error(
        "the fingerprint in the join string does not follow from its token and run id (they give {derived}); it was cut or mixed with another run's, copy it again as a whole"
    )]
    Fingerprint {
        /// What the token gives.
        derived: String,
    },
    /// The token or the certificates.
    #[error(transparent)]
    Secret(#[from] super::Error),
}

impl Join {
    /// How to reach the coordinator of `run_id` at `address` (`host:port`), with TLS or without.
    pub fn new(address: &str, run_id: &str, token: Token, tls: bool) -> Result<Self, super::Error> {
        let authority = if tls {
            Some(Authority::derive(&token, run_id)?)
        } else {
            None
        };
        Ok(Self {
            address: address.to_owned(),
            run_id: run_id.to_owned(),
            token,
            authority,
        })
    }

    /// Reads a join string; `insecure` accepts one without TLS for another host.
    pub fn parse(text: &str, insecure: bool) -> Result<Self, JoinError> {
        let text = text.trim();
        let (tls, rest) = if let Some(rest) = text.strip_prefix("https://") {
            (true, rest)
        } else if let Some(rest) = text.strip_prefix("http://") {
            (false, rest)
        } else {
            let missing = "https:// in front";
            return Err(JoinError::Form { missing });
        };
        let (place, secrets) = split(rest, '#', "#TOKEN at its end")?;
        let (address, run_id) = split(place, '/', "run id after the port")?;
        let run_id = run_id.trim_end_matches('/');
        let port = address
            .rsplit_once(':')
            .map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(_))) {
            let missing = "port";
            return Err(JoinError::Form { missing });
        }
        if run_id.is_empty() {
            let missing = "run id after the port";
            return Err(JoinError::Form { missing });
        }
        if !tls {
            if !insecure && !is_loopback(address) {
                let address = address.to_owned();
                return Err(JoinError::Insecure { address });
            }
            return Ok(Self::new(address, run_id, Token::parse(secrets)?, false)?);
        }
        let (fingerprint, token) = split(secrets, '#', "fingerprint between two # signs")?;
        let join = Self::new(address, run_id, Token::parse(token)?, true)?;
        let derived = join.fingerprint().map(|digest| digest.to_string());
        match derived {
            Some(derived) if derived != fingerprint => Err(JoinError::Fingerprint { derived }),
            _ => Ok(join),
        }
    }

    /// `host:port` of the coordinator.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Which run.
    pub fn run_id(&self) -> &str {
        &self.run_id
    }

    /// What admits to it.
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// The run's certificates; none without TLS.
    pub fn authority(&self) -> Option<&Authority> {
        self.authority.as_ref()
    }

    /// SHA-256 of the authority's certificate; none without TLS.
    pub fn fingerprint(&self) -> Option<Digest> {
        self.authority.as_ref().map(Authority::fingerprint)
    }

    /// The whole string with its token, for a 0600 file or an environment variable; nowhere else.
    pub fn reveal(&self) -> String {
        format!("{}#{}", self.without_token(), self.token.reveal())
    }

    fn without_token(&self) -> String {
        match self.fingerprint() {
            Some(fingerprint) => format!("{}/{}#{fingerprint}", self.url(), self.run_id),
            None => format!("{}/{}", self.url(), self.run_id),
        }
    }

    /// The URL to connect to, without a secret.
    pub fn url(&self) -> String {
        let scheme = if self.authority.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://{}", self.address)
    }

    /// What to connect with: the address, and TLS where the run has it.
    pub fn endpoint(&self) -> Result<tonic::transport::Endpoint, tonic::transport::Error> {
        let endpoint = tonic::transport::Endpoint::from_shared(self.url())?;
        match &self.authority {
            Some(authority) => endpoint.tls_config(authority.client_tls()),
            None => Ok(endpoint),
        }
    }
}

impl fmt::Display for Join {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#…", self.without_token())
    }
}

fn split<'a>(
    text: &'a str,
    at: char,
    missing: &'static str,
) -> Result<(&'a str, &'a str), JoinError> {
    text.split_once(at).ok_or(JoinError::Form { missing })
}

/// Whether `host:port` names this host and nothing else.
pub(super) fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}
