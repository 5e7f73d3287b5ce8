//! The page where other hosts reach it: over TLS, with the run's own certificate, and with little for strangers to take.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use distillery_common::cryptography;
use distillery_common::security::{Authority, Join, SERVER_NAME, Token};
use distillery_tests::harness::{EngineKind, Run, get, sim_recipe};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

const PATIENCE: Duration = Duration::from_secs(120);
/// Connections that the page serves at a time.
const PLACES: usize = 64;

/// A run whose page other hosts reach, and where on this host it is.
struct Scene {
    run: Run,
    port: u16,
    key: String,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new(http: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let recipe = sim_recipe().replace("cluster: {", &format!("cluster: {{http: \"{http}\", "));
        let run = Run::new(folder.path(), &recipe, EngineKind::Sim).expect("built");
        let mut run = run.with("SIM_TASK_MS", 300).with("SIM_STEP_MS", 100);
        run.start().expect("starts");
        let (address, key) = run.page(PATIENCE).expect("a link");
        let port = address.rsplit_once(':').expect("a port").1;
        let scene = Self {
            run,
            port: port.parse().expect("a number"),
            key,
            _folder: folder,
        };
        // Whatever is tried lasts longer than the work would.
        scene.tell("pause");
        scene
    }

    fn tell(&self, what: &str) {
        let mut command = self.run.command("coordinator");
        command.arg(what).arg(self.run.output());
        let said = command.output().expect("it starts");
        assert!(said.status.success(), "{what}: {said:?}");
    }

    /// The run goes on as if nothing had been.
    fn finish(mut self) {
        self.tell("resume");
        self.run.finish(PATIENCE).expect("it finishes");
        let said = self.run.log();
        assert!(!said.contains("panicked"), "{said}");
    }

    fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).expect("it listens")
    }

    /// What the page answers to whoever trusts the authorities of `pem`, and expects `name` on the certificate.
    fn get(&self, pem: &[u8], name: &str, path: &str, header: &str) -> io::Result<String> {
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let client = ClientConnection::new(trusting(pem), name).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(client, self.connect());
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    fn authority(&self) -> Vec<u8> {
        std::fs::read(self.run.output().join("page-ca.pem")).expect("a certificate")
    }
}

fn trusting(pem: &[u8]) -> Arc<ClientConfig> {
    cryptography::choose();
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        roots
            .add(certificate.expect("a certificate"))
            .expect("an authority");
    }
    let config = ClientConfig::builder().with_root_certificates(roots);
    Arc::new(config.with_no_client_auth())
}

#[test]
fn the_page_proves_who_it_is_and_wants_the_key_over_tls() {
    let scene = Scene::new("0.0.0.0:0");
    let pem = scene.authority();
    let shown = format!("Authorization: Bearer {}\r\n", scene.key);
    for name in [SERVER_NAME, "localhost", "127.0.0.1"] {
        let metrics = scene.get(&pem, name, "/metrics", &shown).expect("answers");
        assert!(metrics.starts_with("HTTP/1.1 200 "), "{name}: {metrics}");
        assert!(metrics.contains("distillery_run_state"), "{metrics}");
    }
    let refused = scene.get(&pem, SERVER_NAME, "/metrics", "");
    let refused = refused.expect("answers");
    assert!(refused.starts_with("HTTP/1.1 401 "), "{refused}");
    let path = format!("/?key={}", scene.key);
    let left = scene.get(&pem, SERVER_NAME, &path, "").expect("answers");
    assert!(
        left.starts_with("HTTP/1.1 303 ") && left.contains("; Secure"),
        "a cookie that only goes over TLS: {left}"
    );
    // Another run's certificate is not this one's, and neither is another name.
    let join = std::fs::read_to_string(scene.run.output().join("join")).expect("there");
    let join = Join::parse(&join, false).expect("usable");
    let other = Token::generate().expect("random");
    let foreign = Authority::derive(&other, join.run_id()).expect("derives");
    let foreign = foreign.certificate_pem().as_bytes();
    let error = scene
        .get(foreign, SERVER_NAME, "/metrics", &shown)
        .expect_err("it cannot prove that it is the other run's");
    assert!(error.to_string().contains("certificate"), "{error}");
    let error = scene.get(&pem, "elsewhere.example.com", "/metrics", &shown);
    let error = error.expect_err("that name is not on the certificate");
    assert!(error.to_string().contains("certificate"), "{error}");
    // Whoever speaks no TLS is told nothing.
    let mut plain = scene.connect();
    let asked = format!("GET /metrics HTTP/1.1\r\nHost: x\r\n{shown}\r\n");
    // It may be cut off before it has said all, and a reset is as good as an end.
    let _ = plain.write_all(asked.as_bytes());
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(!answer.contains("HTTP/1.1"), "{answer}");
    scene.finish();
}

/// Whether the page has ended this connection, on which nothing was ever said.
fn is_closed(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).expect("a socket");
    let peeked = stream.peek(&mut [0]);
    !matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

fn taken_by_the_silent(http: &str, ask: impl Fn(&Scene) -> String) {
    let scene = Scene::new(http);
    let silent: Vec<TcpStream> = (0..PLACES).map(|_| scene.connect()).collect();
    // It waits for a place, and gets one although nobody leaves.
    let answer = ask(&scene);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let closed = silent.iter().filter(|stream| is_closed(stream)).count();
    assert!(closed > 0, "somebody was sent away for its place");
    scene.finish();
}

fn ask_plainly(scene: &Scene) -> String {
    let address = format!("127.0.0.1:{}", scene.port);
    let (head, _) = get(&address, "/healthz", &[]).expect("it answers");
    head
}

#[test]
fn who_takes_all_places_and_is_silent_loses_them() {
    taken_by_the_silent("127.0.0.1:0", ask_plainly);
}

#[test]
fn who_takes_all_places_and_does_not_shake_hands_loses_them() {
    taken_by_the_silent("0.0.0.0:0", |scene| {
        let pem = scene.authority();
        let answer = scene.get(&pem, SERVER_NAME, "/healthz", "");
        answer.expect("it answers")
    });
}

#[test]
fn heads_that_are_too_long_or_never_end_are_refused() {
    let scene = Scene::new("127.0.0.1:0");
    // Longer than any head may be.
    let mut stream = scene.connect();
    let long = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}", "y".repeat(64 << 10));
    // It may be cut off before it has said all.
    let _ = stream.write_all(long.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431 "),
        "{answer}"
    );
    // One that stops in the middle: the page ends it, not we.
    let mut stream = scene.connect();
    let half = "GET /healthz HTTP/1.1\r\nHost: x\r\n";
    stream.write_all(half.as_bytes()).expect("it is sent");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(!answer.starts_with("HTTP/1.1 200 "), "{answer}");
    // Nor is a body waited for.
    let mut stream = scene.connect();
    let posted =
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nConnection: close\r\n\r\n";
    stream.write_all(posted.as_bytes()).expect("it is sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    assert!(ask_plainly(&scene).starts_with("HTTP/1.1 200 "));
    scene.finish();
}

/// So Kubernetes asks whether a coordinator lives.
#[test]
fn who_only_looks_whether_the_workers_port_is_there_is_not_told_of() {
    let scene = Scene::new("127.0.0.1:0");
    let join = std::fs::read_to_string(scene.run.output().join("join")).expect("there");
    let join = Join::parse(&join, false).expect("usable");
    drop(TcpStream::connect(join.address()).expect("it listens"));
    let mut stranger = TcpStream::connect(join.address()).expect("it listens");
    stranger.write_all(b"hello\r\n\r\n").expect("it is sent");
    let _ = stranger.read_to_end(&mut Vec::new());
    let told = || {
        let log = scene.run.log();
        log.contains("it speaks no TLS").then_some(log)
    };
    let told = scene.run.await_some(told, "refusal", PATIENCE);
    let told = told.expect("a stranger that says something is told of");
    let times = told.matches("turned a connection away").count();
    assert_eq!(times, 1, "{told}");
    scene.finish();
}
