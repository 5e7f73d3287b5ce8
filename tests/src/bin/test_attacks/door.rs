//! Attacks of those who have no valid secret, or show it wrongly: none may get a byte of HTTP/2 out of the coordinator.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use distillery_common::proto::wire::StatusRequest;
use distillery_common::proto::wire::coordinator_client::CoordinatorClient;
use distillery_common::security::{Join, ShowToken, Token};
use distillery_common::telemetry::Stopwatch;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::forge::{Forge, Shown};
use super::site::{Site, Trial};

/// What a client of HTTP/2 says first: the preface, and settings without any.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// A stranger must be gone after this.
const GONE: Duration = Duration::from_secs(60);
/// Attackers of one kind at a time, of whom the log must tell in few lines.
const CROWD: u64 = 50;
/// Lines about them in one window: the first of them, and how many more.
const LINES: u64 = 2;
/// The coordinator's window, in which repetitions are only counted.
const WINDOW: Duration = Duration::from_secs(10);

/// Windows that a time may have touched.
pub(crate) fn windows(elapsed: Duration) -> u64 {
    elapsed.as_secs() / WINDOW.as_secs() + 2
}

/// Every attack at the door.
pub(crate) async fn all(site: &Site) -> Vec<Trial> {
    let wrong_certificates = [
        (
            "no certificate",
            Shown::Nothing,
            "no certificate of this run",
        ),
        (
            "a certificate that has expired",
            Shown::Expired,
            "not valid for this run (certificate expired",
        ),
        (
            "a certificate of another authority",
            Shown::Foreign,
            "not valid for this run",
        ),
        (
            "the coordinator's certificate, shown by a client",
            Shown::Server,
            "not valid for this run",
        ),
    ];
    let mut trials = Vec::new();
    for (name, shown, reason) in wrong_certificates {
        trials.push(Trial::of(name, certificate(site, shown, reason).await));
    }
    trials.push(Trial::of(
        "plain HTTP/2 on the TLS port",
        words(site, PREFACE).await,
    ));
    let get = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    trials.push(Trial::of(
        "plain HTTP/1 on the TLS port",
        words(site, get).await,
    ));
    let garbage = vec![0x16; 100_000];
    trials.push(Trial::of(
        "bytes without sense on the TLS port",
        words(site, &garbage).await,
    ));
    trials.push(Trial::of(
        "a token of another run",
        foreign_join(site).await,
    ));
    trials.push(Trial::of(
        "a join string of an earlier run here",
        stale_join(site).await,
    ));
    trials.push(Trial::of(
        "a recorded session, played again",
        replay(site).await,
    ));
    trials.push(Trial::of(
        "half a handshake, and silence",
        half_a_handshake(site).await,
    ));
    trials
}

/// A crowd that shows a wrong certificate: all are refused, and the log tells of all of them in a few lines.
async fn certificate(site: &Site, shown: Shown, reason: &str) -> Result<String> {
    let forge = Forge::of(&site.join)?;
    let before = site.refusals_for(reason);
    let watch = Stopwatch::start();
    for _ in 0..CROWD {
        // Some servers refuse within the handshake.
        if let Ok(stream) = forge.connect(site.join.address(), shown).await {
            unheard(stream, PREFACE).await?;
        }
    }
    let told = site.await_refusals(reason, before, CROWD).await?;
    let most = LINES * windows(watch.elapsed());
    ensure!(
        told.lines <= most,
        "{} lines of log for {CROWD} refusals, not {most}",
        told.lines
    );
    Ok(format!(
        "{CROWD} times refused, told in {} lines of log: {reason}",
        told.lines
    ))
}

/// Says `words` and waits for the end of the connection, in which nothing but an alert of TLS may come.
async fn unheard(mut stream: impl AsyncRead + AsyncWrite + Unpin, words: &[u8]) -> Result<usize> {
    // It may have hung up already.
    let _ = stream.write_all(words).await;
    let mut heard = Vec::new();
    match tokio::time::timeout(GONE, stream.read_to_end(&mut heard)).await {
        Err(_) => bail!("the connection is open after {GONE:?}"),
        Ok(_) => {
            ensure!(
                heard.len() < 200,
                "it was answered with {} bytes",
                heard.len()
            );
            Ok(heard.len())
        }
    }
}

async fn words(site: &Site, words: &[u8]) -> Result<String> {
    let reason = "it speaks no TLS";
    let before = site.refusals_for(reason);
    let stream = TcpStream::connect(site.join.address()).await?;
    let heard = unheard(stream, words).await?;
    site.await_refusals(reason, before, 1).await?;
    Ok(format!("{heard} bytes of answer; {reason}"))
}

/// All that a join string gives, of another token: the client itself does not trust this coordinator.
async fn foreign_join(site: &Site) -> Result<String> {
    let join = Join::new(
        site.join.address(),
        site.join.run_id(),
        Token::generate()?,
        true,
    )?;
    untrusted(site, &join).await
}

/// A client of `join` does not trust this coordinator, and one that does not look whom it talks to is refused.
async fn untrusted(site: &Site, join: &Join) -> Result<String> {
    let reason = "not valid for this run";
    let before = site.refusals_for(reason);
    let error = refused(join).await?;
    ensure!(error.contains("invalid peer certificate"), "{error}");
    let stream = Forge::of(join)?
        .connect(join.address(), Shown::Member)
        .await;
    if let Ok(stream) = stream {
        unheard(stream, PREFACE).await?;
    }
    site.await_refusals(reason, before, 1).await?;
    Ok(format!("at the client: {error}"))
}

/// The same place and token, of a run that was there before.
async fn stale_join(site: &Site) -> Result<String> {
    let earlier = "01890000-0000-7000-8000-000000000000";
    let token = site.join.token().clone();
    let join = Join::new(site.join.address(), earlier, token, true)?;
    untrusted(site, &join).await
}

async fn refused(join: &Join) -> Result<String> {
    match join.endpoint()?.connect().await {
        Ok(_) => bail!("it was let in"),
        Err(error) => Ok(format!("{:#}", anyhow::Error::from(error))),
    }
}

/// A member's conversation through a wire that remembers it, then the same bytes once more.
async fn replay(site: &Site) -> Result<String> {
    let wire = TcpListener::bind("127.0.0.1:0").await?;
    let (address, real) = (
        wire.local_addr()?.to_string(),
        site.join.address().to_owned(),
    );
    let (recorder, mut recorded) = mpsc::unbounded_channel();
    let tapped = tokio::spawn(async move {
        let (mut client, _) = wire.accept().await?;
        let mut server = TcpStream::connect(real).await?;
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let upwards = async {
            let mut bytes = vec![0; 64 << 10];
            loop {
                let count = from_client.read(&mut bytes).await?;
                if count == 0 {
                    return to_server.shutdown().await;
                }
                // Whoever listens may be gone.
                let _ = recorder.send(bytes[..count].to_vec());
                to_server.write_all(&bytes[..count]).await?;
            }
        };
        let downwards = tokio::io::copy(&mut from_server, &mut to_client);
        tokio::try_join!(upwards, downwards).map(drop)
    });
    let join = Join::new(
        &address,
        site.join.run_id(),
        site.join.token().clone(),
        true,
    )?;
    let workers = site.workers().await?;
    {
        let channel = join.endpoint()?.connect().await?;
        let mut client = CoordinatorClient::with_interceptor(channel, ShowToken::new(join.token()));
        let answer = client.status(StatusRequest {}).await;
        answer.context("the recorded session itself")?;
    }
    let _ = tokio::time::timeout(Duration::from_secs(5), tapped).await;
    let mut session = Vec::new();
    while let Ok(bytes) = recorded.try_recv() {
        session.extend(bytes);
    }
    ensure!(
        session.len() > 500,
        "only {} bytes were recorded",
        session.len()
    );
    ensure!(
        !session
            .windows(64)
            .any(|bytes| bytes == join.token().reveal().as_bytes()),
        "the token is in plain sight"
    );
    let reason = "the TLS handshake failed";
    let before = site.refusals_for(reason);
    let mut stream = TcpStream::connect(site.join.address()).await?;
    stream.write_all(&session).await?;
    let mut heard = Vec::new();
    let ended = tokio::time::timeout(GONE, stream.read_to_end(&mut heard)).await;
    ensure!(ended.is_ok(), "the connection is open after {GONE:?}");
    site.await_refusals(reason, before, 1).await?;
    ensure!(site.workers().await? == workers, "the workers have changed");
    Ok(format!("{} bytes, the handshake failed", session.len()))
}

/// Connections that stop in the middle of their first message, and members' ones that never show the token.
async fn half_a_handshake(site: &Site) -> Result<String> {
    let reason = "it did not show the token in time";
    let before = site.refusals_for(reason);
    let mut stream = TcpStream::connect(site.join.address()).await?;
    stream.write_all(&[0x16, 3, 1, 2, 0, 1, 0]).await?;
    let silent = unheard(stream, b"");
    let forge = Forge::of(&site.join)?;
    let member = forge.connect(site.join.address(), Shown::Member).await?;
    let tokenless = async {
        let mut member = member;
        member.write_all(PREFACE).await?;
        let mut heard = Vec::new();
        let ended = tokio::time::timeout(GONE, member.read_to_end(&mut heard)).await;
        ensure!(
            ended.is_ok(),
            "a connection without token is open after {GONE:?}"
        );
        Ok(0)
    };
    tokio::try_join!(silent, tokenless)?;
    site.await_refusals(reason, before, 2).await?;
    Ok("both were hung up on after ten seconds".into())
}
