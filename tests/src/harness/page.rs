//! What a run's page says.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::Context as _;

use super::Run;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Head and body of the answer to a request for `path` at `address`, without TLS.
pub fn get(address: &str, path: &str, headers: &[String]) -> io::Result<(String, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for header in headers {
        request.push_str(&format!("{header}\r\n"));
    }
    write!(stream, "{request}\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or(io::ErrorKind::InvalidData)?;
    Ok((head.to_owned(), body.to_owned()))
}

impl Run {
    /// What the living coordinator says at `/metrics` of a page on this host.
    pub fn metrics(&self) -> anyhow::Result<String> {
        let read = |name: &str| std::fs::read_to_string(self.output().join(name));
        let link = read("page").context("no link to a page")?;
        let link = link.trim().strip_prefix("http://");
        let address = link.and_then(|link| link.split('/').next());
        let address = address.context("the page is not on this host")?;
        let key = read("page-key").context("no key of the page")?;
        let bearer = format!("Authorization: Bearer {}", key.trim());
        let (head, body) = get(address, "/metrics", &[bearer])?;
        anyhow::ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
        Ok(body)
    }
}
