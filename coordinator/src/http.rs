//! A small HTTP/1.1 server beside the gRPC service: the live page, `/metrics`, `/healthz` and `/readyz`.
//!
//! Read-only. All but the two health checks want the page's own key, which follows from the token but not the other way
//! round; the link that `coordinator run` prints carries it once and leaves it in a cookie, and scrapers show it in a
//! header. The token in a header does as well. Must never decide anything, and never see storage or the journal.

mod gauges;
mod history;
mod page;
mod request;

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use distillery_common::security::{PageKey, Token};

use self::history::History;
use crate::driver::{Handle, Snapshot};
use crate::metrics::Metrics;
use crate::service::Identity;

/// Connections at a time; more wait to be accepted.
const CONNECTIONS: usize = 64;
/// Most bytes of a request's head.
const HEAD_BYTES: usize = 16 << 10;
/// Time for a request's head, and for a TLS handshake.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long one connection may live.
const LIFE: Duration = Duration::from_secs(60);
/// How long the driver may take to say how the run is.
const ANSWER: Duration = Duration::from_secs(2);
/// Between two points of the page's curves.
const SAMPLE: Duration = Duration::from_secs(2);
/// Pause after a connection could not be accepted, for want of file descriptors say.
const REST: Duration = Duration::from_millis(100);

/// What is served.
#[derive(Debug)]
pub struct Site {
    identity: Identity,
    token: Token,
    key: PageKey,
    secure: bool,
    handle: Handle,
    metrics: Metrics,
    history: Mutex<History>,
    /// Whether the driver answered the last time it was asked; none before the first answer.
    ready: watch::Sender<Option<bool>>,
}

impl Site {
    /// The site of the run of `handle`'s driver.
    pub fn new(identity: Identity, token: Token, handle: Handle, metrics: Metrics) -> Self {
        let key = PageKey::derive(&token, &identity.run_id);
        Self {
            identity,
            token,
            key,
            secure: false,
            handle,
            metrics,
            history: Mutex::default(),
            ready: watch::Sender::new(None),
        }
    }

    /// What opens the page and the metrics, and nothing else.
    pub fn key(&self) -> &PageKey {
        &self.key
    }

    /// The link to the page at `address` (`host:port`), key and all: for a terminal or a 0600 file, nowhere else.
    pub fn link(&self, address: &str, tls: bool) -> String {
        let scheme = if tls { "https" } else { "http" };
        format!("{scheme}://{address}/?key={}", self.key.reveal())
    }
}

type Answer = Response<Full<Bytes>>;

/// Serves `site` on `listener`, over TLS if it is given how, until it is dropped.
pub async fn serve(listener: TcpListener, mut site: Site, tls: Option<Arc<ServerConfig>>) {
    let tls = tls.map(TlsAcceptor::from);
    site.secure = tls.is_some();
    let site = Arc::new(site);
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    // Dropped with everything in it when this future is.
    let mut tasks = JoinSet::new();
    tasks.spawn(sample(Arc::clone(&site)));
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a connection to the page could not be accepted");
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        let (site, tls) = (Arc::clone(&site), tls.clone());
        tasks.spawn(async move {
            // Whoever takes longer is cut off; a page is loaded anew with every connection.
            let _ = tokio::time::timeout(LIFE, converse(stream, tls, site)).await;
            drop(permit);
        });
    }
}

async fn converse(stream: TcpStream, tls: Option<TlsAcceptor>, site: Arc<Site>) {
    match tls {
        None => answer_all(stream, site).await,
        Some(tls) => {
            if let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, tls.accept(stream)).await {
                answer_all(stream, site).await;
            }
        }
    }
}

/// Answers what is asked on one connection, until it closes.
pub async fn answer_all(stream: impl AsyncRead + AsyncWrite + Unpin, site: Arc<Site>) {
    let service = service_fn(move |request| {
        let site = Arc::clone(&site);
        async move { Ok::<_, Infallible>(site.answer(&request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to the page ended");
    }
}

/// Remembers the curves that the page shows.
async fn sample(site: Arc<Site>) {
    loop {
        match tokio::time::timeout(ANSWER, site.handle.snapshot()).await {
            Ok(Ok(snapshot)) => {
                site.history().note(&snapshot.view);
                site.ready.send_replace(Some(true));
            }
            Ok(Err(_)) => {
                site.ready.send_replace(Some(false));
                return;
            }
            Err(_) => {
                site.ready.send_replace(Some(false));
            }
        }
        tokio::time::sleep(SAMPLE).await;
    }
}

impl Site {
    async fn answer(&self, request: &Request<Incoming>) -> Answer {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return plain(
                StatusCode::METHOD_NOT_ALLOWED,
                "nothing can be changed here\n",
            );
        }
        let path = request.uri().path();
        match path {
            "/healthz" => return plain(StatusCode::OK, "ok\n"),
            "/readyz" => return self.ready().await,
            _ => {}
        }
        if path == "/" && self.key_in_query(request.uri().query()) {
            return self.remember();
        }
        if !self.admits(request.headers()) {
            return unknown();
        }
        match path {
            "/" => self.page().await,
            "/metrics" => self.metrics_text().await,
            _ => plain(StatusCode::NOT_FOUND, "there are: / and /metrics\n"),
        }
    }

    async fn snapshot(&self) -> Option<Snapshot> {
        let asked = tokio::time::timeout(ANSWER, self.handle.snapshot());
        asked.await.ok()?.ok()
    }

    /// From the last sample: strangers may ask, and must not keep the driver busy.
    async fn ready(&self) -> Answer {
        let mut ready = self.ready.subscribe();
        let told = tokio::time::timeout(ANSWER, ready.wait_for(Option::is_some)).await;
        match told.is_ok_and(|told| told.is_ok_and(|ready| *ready == Some(true))) {
            true => plain(StatusCode::OK, "ready\n"),
            false => plain(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        }
    }

    async fn page(&self) -> Answer {
        let Some(snapshot) = self.snapshot().await else {
            return busy();
        };
        let html = page::render(&self.identity, &snapshot, &self.history());
        answer(StatusCode::OK, "text/html; charset=utf-8", html)
    }

    async fn metrics_text(&self) -> Answer {
        const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        let Some(snapshot) = self.snapshot().await else {
            return busy();
        };
        let mut text = String::new();
        let written = self
            .metrics
            .write(&mut text)
            .and_then(|()| gauges::write(&self.identity, &snapshot, &mut text));
        match written {
            Ok(()) => answer(StatusCode::OK, OPEN_METRICS, text),
            Err(_) => busy(),
        }
    }

    fn history(&self) -> std::sync::MutexGuard<'_, History> {
        let history = self.history.lock();
        history.expect("no holder of this lock can panic")
    }
}

fn plain(status: StatusCode, text: &'static str) -> Answer {
    answer(status, "text/plain; charset=utf-8", text)
}

fn busy() -> Answer {
    plain(
        StatusCode::SERVICE_UNAVAILABLE,
        "the coordinator does not say how the run is; try again\n",
    )
}

fn unknown() -> Answer {
    let mut answer = plain(
        StatusCode::UNAUTHORIZED,
        "open the link that `coordinator run` printed, or show the page's key, which is the end of that link: Authorization: Bearer KEY\n",
    );
    let challenge = header::HeaderValue::from_static("Bearer");
    answer
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, challenge);
    answer
}

fn answer(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
        ),
    ];
    for (name, value) in headers {
        let value = header::HeaderValue::from_static(value);
        answer.headers_mut().insert(name, value);
    }
    answer
}
