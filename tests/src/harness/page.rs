//! What a run says of itself: its page, and its log.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;

use super::Run;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

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
    /// Address and key of the page, once its link is there.
    pub fn page(&self, patience: Duration) -> anyhow::Result<(String, String)> {
        let link = self.read_when_there(&self.output().join("page"), patience)?;
        let parts = link.trim().split_once("://");
        let parts = parts.and_then(|(_, rest)| rest.split_once("/?key="));
        let (address, key) = parts.with_context(|| format!("{link:?} is no link to a page"))?;
        Ok((address.to_owned(), key.to_owned()))
    }

    /// What the living coordinator says at `/metrics` of a page on this host.
    pub fn metrics(&self) -> anyhow::Result<String> {
        let (address, key) = self.page(Duration::ZERO)?;
        let bearer = format!("Authorization: Bearer {key}");
        let (head, body) = get(&address, "/metrics", &[bearer])?;
        anyhow::ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
        Ok(body)
    }

    /// Everything that the coordinators said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// What the coordinators said, the last lines of it: for people, since what is looked for may stand before them.
    pub fn log_tail(&self) -> String {
        let text = self.log();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    pub(super) fn log_path(&self) -> PathBuf {
        self.folder.join("coordinator.log")
    }
}
