//! Storage servers on loopback, on free ports, that end with the test.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A running server.
pub(crate) struct Server {
    child: Child,
    pub(crate) port: u16,
    _folder: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; there is nothing else to do about it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program that `variable` names. Without one the test is skipped loudly, or fails where that is asked for.
pub(crate) fn program(variable: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Some(path.into());
    }
    let message = format!("{variable} is not set (deploy/test-servers.sh prints it)");
    assert!(
        std::env::var("DISTILLERY_REQUIRE_SERVERS").as_deref() != Ok("1"),
        "{message}, and DISTILLERY_REQUIRE_SERVERS=1"
    );
    eprintln!("SKIPPED: {message}");
    None
}

/// The S3 server, with an empty bucket.
pub(crate) fn moto(program: PathBuf, bucket: &str) -> Server {
    let server = start(|port, _| {
        let mut command = Command::new(program);
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        command
    });
    let made = request(server.port, &format!("PUT /{bucket} HTTP/1.1\r\n"));
    assert!(
        made.starts_with("HTTP/1.1 200"),
        "moto made no bucket: {made}"
    );
    server
}

/// The Azure server, with an empty container.
pub(crate) fn azurite(program: PathBuf, container: &str) -> Server {
    let server = start(|port, folder| {
        let mut command = Command::new(program);
        command.args(["--silent", "--skipApiVersionCheck", "--disableTelemetry"]);
        command.args(["--blobHost", "127.0.0.1", "--blobPort", &port.to_string()]);
        command.arg("--location").arg(folder);
        command
    });
    let made = request(server.port, &signed_creation(container));
    assert!(
        made.starts_with("HTTP/1.1 201"),
        "Azurite made no container: {made}"
    );
    server
}

/// Azurite's account and key, which its documentation publishes.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// "Create Container" under the SharedKey scheme: twelve lines of headers that are not sent come first.
fn signed_creation(container: &str) -> String {
    let headers = "x-ms-date:Thu, 01 Jan 2026 00:00:00 GMT\nx-ms-version:2021-12-02";
    let path = format!("/{ACCOUNT}/{container}");
    let unsent = "\n".repeat(12);
    let text = format!("PUT{unsent}{headers}\n/{ACCOUNT}{path}\nrestype:container");
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &base64_decode(KEY));
    let signature = base64_encode(ring::hmac::sign(&key, text.as_bytes()).as_ref());
    format!(
        "PUT {path}?restype=container HTTP/1.1\r\n{}\r\nAuthorization: SharedKey {ACCOUNT}:{signature}\r\n",
        headers.replace('\n', "\r\n")
    )
}

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64_encode(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = (0..3).fold(0u32, |word, i| {
            word << 8 | u32::from(*chunk.get(i).unwrap_or(&0))
        });
        for i in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * i) & 63) as usize];
            text.push(if i > chunk.len() { '=' } else { digit.into() });
        }
    }
    text
}

fn base64_decode(text: &str) -> Vec<u8> {
    let (mut bytes, mut word, mut bits) = (Vec::new(), 0u32, 0);
    for digit in text.bytes().filter(|&digit| digit != b'=') {
        let value = DIGITS
            .iter()
            .position(|&d| d == digit)
            .expect("the key is base64");
        word = word << 6 | u32::try_from(value).expect("one of 64");
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((word >> bits & 255) as u8);
        }
    }
    bytes
}

fn start(command: impl FnOnce(u16, &std::path::Path) -> Command) -> Server {
    let free = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let port = free.local_addr().expect("it is bound").port();
    drop(free);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let child = command(port, folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the server's program can be started");
    let server = Server {
        child,
        port,
        _folder: folder,
    };
    for _ in 0..600 {
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return server;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("the server did not listen within a minute");
}

/// Sends a request without a body, and gives the reply.
fn request(port: u16, head: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the server listens");
    let rest = format!("Host: 127.0.0.1:{port}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    stream
        .write_all(format!("{head}{rest}").as_bytes())
        .expect("the server reads");
    let mut reply = String::new();
    stream
        .read_to_string(&mut reply)
        .expect("the server answers");
    reply
}
