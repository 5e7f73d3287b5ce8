//! What is fed of what the programs say to one another, keep for themselves, and are answered and asked.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use distillery_common::ids::Digest;
use distillery_common::logs;
use distillery_common::proto::{engine_link, framing, wire};
use distillery_common::security::Token;
use distillery_common::storage::Store;
use distillery_coordinator::driver::{self, Handle};
use distillery_coordinator::http::{self, Site};
use distillery_coordinator::journal::{self, Journal, Spent};
use distillery_coordinator::launch::slurm;
use distillery_coordinator::metrics::Metrics;
use distillery_coordinator::scheduler::Timings;
use distillery_coordinator::service::Identity;
use distillery_worker::engine_process;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use uuid::Uuid;

use super::corpus::Corpus;
use super::targets::{LITTLE_MIB, target};
use super::{Target, messages};

/// Both directions of an engine's socket, as streams of bytes.
pub(super) fn sockets() -> Vec<Target> {
    vec![
        target(
            "message of an engine",
            LITTLE_MIB,
            messages::of_engines(),
            |mut bytes| {
                let read = framing::read::<_, wire::FromEngine>(&mut bytes);
                if let Some(Ok(Some(message))) = at_once(read) {
                    drop(engine_process::from_wire(message));
                }
            },
        ),
        target(
            "message to an engine",
            LITTLE_MIB,
            messages::to_engines(),
            |mut bytes| {
                let read = framing::read::<_, wire::ToEngine>(&mut bytes);
                if let Some(Ok(Some(message))) = at_once(read) {
                    drop(engine_link::understand(message));
                }
            },
        ),
    ]
}

/// What comes of reading bytes that are all there.
fn at_once<T>(read: impl Future<Output = T>) -> Option<T> {
    futures::FutureExt::now_or_never(read)
}

/// Objects that a coordinator or a worker writes for itself. What carries its own digest is given the right one, so that
/// more than the digest is tried.
pub(super) fn caches(corpus: &Corpus) -> Result<Vec<Target>> {
    let digest = Digest::of(b"a COMMIT");
    let index =
        format!(r#"{{"format_version":1,"commits":[[0,8,1000,"{digest}"],[1,8,99,"{digest}"]]}}"#);
    anyhow::ensure!(
        driver::parse_commit_index(&sealed(index.as_bytes())).is_ok(),
        "no commit index"
    );
    Ok(vec![
        target(
            "snapshot of the journal",
            LITTLE_MIB,
            vec![snapshot(corpus)?],
            |bytes| {
                drop(journal::parse_snapshot(bytes));
                drop(journal::parse_snapshot(&sealed(bytes)));
            },
        ),
        target(
            "commit index",
            LITTLE_MIB,
            vec![index.into_bytes()],
            |bytes| {
                drop(driver::parse_commit_index(bytes));
                drop(driver::parse_commit_index(&sealed(bytes)));
            },
        ),
        target(
            "part of a log",
            LITTLE_MIB,
            corpus.contents(|key| key.starts_with("logs/"))?,
            |bytes| drop(logs::from_bytes(bytes)),
        ),
    ])
}

fn sealed(body: &[u8]) -> Vec<u8> {
    [body, format!("\n{}\n", Digest::of(body)).as_bytes()].concat()
}

/// The body of a snapshot of everything that the corpus' run has written down.
fn snapshot(corpus: &Corpus) -> Result<Vec<u8>> {
    let mut records = Vec::new();
    for segment in corpus.contents(|key| key.starts_with("journal/0"))? {
        let (_, more) = journal::parse(&segment).map_err(anyhow::Error::msg)?;
        records.extend(more);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(async {
        let store = Store::in_memory();
        let spent = Spent::default();
        let claimed = Journal::claim(&store, "127.0.0.1:1", Uuid::nil(), spent).await?;
        let mut journal = claimed.with_snapshots_every(1);
        journal.append(&records, spent).await?;
        let root = distillery_common::storage::layout::journal();
        let all = store.list(&root).await?;
        let found = all
            .iter()
            .rfind(|entry| entry.key.as_str().contains("snapshot"))
            .context("no snapshot")?;
        let bytes = store.get(&found.key).await?;
        journal::parse_snapshot(&bytes).map_err(anyhow::Error::msg)?;
        let end = bytes[..bytes.len() - 1].iter().rposition(|&b| b == b'\n');
        Ok(bytes[..end.context("no digest")?].to_vec())
    })
}

/// What Slurm answers, and what anybody asks of the page.
pub(super) fn answers() -> Result<Vec<Target>> {
    let queue = b"12_0|RUNNING|None|node1|2026-01-01T00:00:00\n12_1|PENDING|launch failed requeued held||N/A\n".to_vec();
    let run_id = "0198f3a2-7c11-7e55-b9f0-3f7a4c1d2e90";
    let token = Token::generate()?;
    let asked = [
        format!("GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n", token.reveal()),
        format!("GET /?key=0f0f&x=y HTTP/1.1\r\nHost: x\r\nCookie: a=b; distillery-{run_id}=0f\r\n\r\n"),
        "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET /readyz HTTP/1.0\r\n\r\n".to_owned(),
    ];
    let identity = Identity {
        run_id: run_id.to_owned(),
        run_uri: "file:///run".to_owned(),
        name: "run".to_owned(),
        term: 1,
        timings: Timings::default(),
    };
    let site = Site::new(identity, token, Handle::to_nobody(), Metrics::default());
    let site = Arc::new(site);
    // What takes its time is over at once.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()?;
    Ok(vec![
        target("squeue", LITTLE_MIB, vec![queue], |bytes| {
            slurm::count_jobs(&String::from_utf8_lossy(bytes));
        }),
        target(
            "request to the page",
            LITTLE_MIB,
            asked.map(String::into_bytes).into(),
            move |bytes| runtime.block_on(ask(Arc::clone(&site), bytes)),
        ),
    ])
}

/// Asks with `bytes`, and takes all answers.
async fn ask(site: Arc<Site>, bytes: &[u8]) {
    let (mut client, server) = tokio::io::duplex(64 << 10);
    let asking = async {
        // It may hang up before all is said.
        let _ = client.write_all(bytes).await;
        let _ = client.shutdown().await;
        let mut answers = Vec::new();
        let _ = client.read_to_end(&mut answers).await;
    };
    tokio::join!(http::answer_all(server, site), asking);
}
