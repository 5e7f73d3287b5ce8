//! Attacks of those who got past the handshake: without a token, or with one and ill will towards the protocol.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use distillery_common::proto::wire::coordinator_client::CoordinatorClient;
use distillery_common::proto::wire::{self, worker_message};
use distillery_common::proto::{MAX_MESSAGE_BYTES, PROTOCOL_VERSION};
use distillery_common::security::{ShowToken, Token};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::codegen::http::uri::PathAndQuery;

use super::door::PREFACE;
use super::forge::{Forge, Shown};
use super::site::{Site, Trial};

/// Calls that are begun and taken back at once.
const RESETS: usize = 10_000;
/// An answer must be there after this.
const ANSWER: Duration = Duration::from_secs(15);
/// Who abuses the protocol must be gone after this.
const SOON: Duration = Duration::from_secs(60);
/// Codes of HTTP/2's frames.
const GOAWAY: u8 = 7;
/// Codes of HTTP/2's errors, by which a server says why it ends a connection.
const PROTOCOL_ERROR: u32 = 1;
const ENHANCE_YOUR_CALM: u32 = 11;
/// What the log says of strangers that were not sent away for the time that they took, but hung up on for what they said.
const WITHOUT_TOKEN: &str = "it left without showing the token";

/// Every attack within.
pub(crate) async fn all(site: &Site) -> Vec<Trial> {
    let too_large = vec![b'x'; 2 * MAX_MESSAGE_BYTES];
    let no_sense = vec![0xff; 1000];
    vec![
        Trial::of("no token", no_token(site).await),
        Trial::of("a wrong token", wrong_token(site).await),
        Trial::of("nonsense in HTTP/2", nonsense(site).await),
        Trial::of(
            "calls begun and taken back, over and over",
            resets(site).await,
        ),
        Trial::of("headers without end", headers(site).await),
        Trial::of(
            "a message that is too large",
            raw(site, too_large, "too large").await,
        ),
        Trial::of(
            "a message without sense",
            raw(site, no_sense, "decode").await,
        ),
        Trial::of("a worker of another protocol", other_protocol(site).await),
        Trial::of("a session without a hello", no_hello(site).await),
    ]
}

/// What the log says of those who do not show this run's token.
const TOKENLESS: &str = "its token is not this run's";

async fn no_token(site: &Site) -> Result<String> {
    let before = site.refusals_for(TOKENLESS);
    let channel = site.join.endpoint()?.connect().await?;
    let mut client = CoordinatorClient::new(channel);
    let refused = match client.status(wire::StatusRequest {}).await {
        Ok(_) => bail!("it was answered"),
        Err(status) => said(&status, tonic::Code::Unauthenticated)?,
    };
    drop(client);
    site.await_refusals(TOKENLESS, before, 1).await?;
    Ok(refused)
}

async fn wrong_token(site: &Site) -> Result<String> {
    let before = site.refusals_for(TOKENLESS);
    let channel = site.join.endpoint()?.connect().await?;
    let token = ShowToken::new(&Token::generate()?);
    let mut client = CoordinatorClient::with_interceptor(channel, token);
    let refused = match client.status(wire::StatusRequest {}).await {
        Ok(_) => bail!("it was answered"),
        Err(status) => said(&status, tonic::Code::Unauthenticated)?,
    };
    drop(client);
    site.await_refusals(TOKENLESS, before, 1).await?;
    Ok(refused)
}

fn said(status: &tonic::Status, code: tonic::Code) -> Result<String> {
    ensure!(status.code() == code, "{status}");
    Ok(status.message().to_owned())
}

/// Something else than HTTP/2, behind a good handshake.
async fn nonsense(site: &Site) -> Result<String> {
    let before = site.refusals_for(WITHOUT_TOKEN);
    let forge = Forge::of(&site.join)?;
    let mut stream = forge.connect(site.join.address(), Shown::Member).await?;
    stream.write_all(&[0x55; 4096]).await?;
    let mut heard = Vec::new();
    let ended = tokio::time::timeout(SOON, stream.read_to_end(&mut heard)).await;
    ensure!(ended.is_ok(), "the connection is open after {SOON:?}");
    site.await_refusals(WITHOUT_TOKEN, before, 1).await?;
    Ok(format!("hung up after {} bytes of answer", heard.len()))
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The headers of a call, by HPACK's static table: POST, https, a path, an authority.
fn call_headers() -> Vec<u8> {
    let mut block = vec![0x83, 0x87, 0x04];
    for text in ["/distill.v1.Coordinator/Status", "x"] {
        if text == "x" {
            block.push(0x01);
        }
        block.push(text.len() as u8);
        block.extend(text.as_bytes());
    }
    block
}

/// Says `bytes` on a connection of a member who shows no token; it must end with one of `errors`.
async fn abuse(site: &Site, bytes: &[u8], errors: &[u32]) -> Result<String> {
    let forge = Forge::of(&site.join)?;
    let stream = forge.connect(site.join.address(), Shown::Member).await?;
    let (mut from, mut to) = tokio::io::split(stream);
    let speak = async {
        // It may hang up before all is said.
        let _ = to.write_all(PREFACE).await;
        let _ = to.write_all(bytes).await;
        std::future::pending::<()>().await;
    };
    let mut heard = Vec::new();
    let listen = tokio::time::timeout(SOON, from.read_to_end(&mut heard));
    let ended = tokio::select! {
        ended = listen => ended,
        () = speak => bail!("it never ends"),
    };
    ensure!(ended.is_ok(), "the connection is open after {SOON:?}");
    let Some(code) = goodbye(&heard) else {
        bail!("hung up after {} bytes, none of them why", heard.len());
    };
    ensure!(
        errors.contains(&code),
        "sent away with HTTP/2's error {code}"
    );
    Ok(format!("sent away with HTTP/2's error {code}"))
}

/// The error code of the GOAWAY among whole frames.
fn goodbye(mut frames: &[u8]) -> Option<u32> {
    while let Some((head, rest)) = frames.split_first_chunk::<9>() {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let payload = rest.get(..length)?;
        if head[3] == GOAWAY {
            let code = payload.get(4..8)?;
            return Some(u32::from_be_bytes(code.try_into().ok()?));
        }
        frames = &rest[length..];
    }
    None
}

async fn resets(site: &Site) -> Result<String> {
    let headers = call_headers();
    let cancel = 8u32.to_be_bytes();
    let mut bytes = Vec::new();
    for at in 0..RESETS as u32 {
        let stream = 2 * at + 1;
        bytes.extend(frame(1, 0x4, stream, &headers));
        bytes.extend(frame(3, 0, stream, &cancel));
    }
    abuse(site, &bytes, &[ENHANCE_YOUR_CALM]).await
}

/// Continuations of one header block, far beyond what is read.
async fn headers(site: &Site) -> Result<String> {
    let mut field = vec![0x00, 0x01, b'x', 0x7f, 0xe1, 0x1e];
    field.extend(vec![b'y'; 4000]);
    let mut bytes = frame(1, 0, 1, &call_headers());
    for _ in 0..2000 {
        bytes.extend(frame(9, 0, 1, &field));
    }
    abuse(site, &bytes, &[PROTOCOL_ERROR, ENHANCE_YOUR_CALM]).await
}

/// One message of any bytes on the stream of a worker who has the token.
async fn raw(site: &Site, bytes: Vec<u8>, says: &str) -> Result<String> {
    let before = site.unwelcome();
    let channel = site.join.endpoint()?.connect().await?;
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await?;
    let path = PathAndQuery::from_static("/distill.v1.Coordinator/Session");
    let mut request = tonic::Request::new(tokio_stream::iter([bytes]));
    let token = format!("Bearer {}", site.join.token().reveal());
    request
        .metadata_mut()
        .insert("authorization", token.parse()?);
    // A message whose first field is these bytes: where a hello belongs.
    let codec = tonic_prost::ProstCodec::<Vec<u8>, wire::CoordinatorMessage>::default();
    let answer = tokio::time::timeout(ANSWER, client.streaming(request, path, codec)).await?;
    let Err(status) = answer else {
        bail!("it was let in");
    };
    let text = status.message().to_owned();
    ensure!(text.contains(says) && text.len() < 500, "{text}");
    site.await_unwelcome(&text, before).await?;
    Ok(text)
}

fn hello(version: u32) -> wire::WorkerMessage {
    let hello = wire::Hello {
        protocol_version: version,
        name: "guest".into(),
        host: "elsewhere".into(),
        ..wire::Hello::default()
    };
    wire::WorkerMessage {
        message: Some(worker_message::Message::Hello(hello)),
    }
}

async fn other_protocol(site: &Site) -> Result<String> {
    let before = site.unwelcome();
    let mut client = site.member().await?;
    let messages = tokio_stream::iter([hello(PROTOCOL_VERSION + 1)]);
    let text = match client.session(messages).await {
        Ok(_) => bail!("it was let in"),
        Err(status) => said(&status, tonic::Code::FailedPrecondition)?,
    };
    site.await_unwelcome(&text, before).await?;
    Ok(text)
}

async fn no_hello(site: &Site) -> Result<String> {
    let before = site.unwelcome();
    let mut client = site.member().await?;
    let silence = tokio_stream::pending::<wire::WorkerMessage>();
    let text = match tokio::time::timeout(ANSWER, client.session(silence)).await? {
        Ok(_) => bail!("it was let in"),
        Err(status) => said(&status, tonic::Code::DeadlineExceeded)?,
    };
    site.await_unwelcome(&text, before).await?;
    Ok(text)
}
