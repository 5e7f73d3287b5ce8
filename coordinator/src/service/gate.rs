//! The door of the service: how many may stand in it, for how long, and who comes in.
//!
//! Whoever connects is a *stranger* until it has shown the run's token, and a *member* from then on. With TLS a stranger
//! must show the run's certificate first; without it no byte of HTTP/2 is read. Strangers get little time and a bounded
//! number of places. When all are taken, those of the largest crowd make room, the silent first and then those that have
//! stood there longest, and newcomers wait in the kernel's queue meanwhile; members are never touched. Must never know
//! what is said inside.

mod guest;
mod refusals;
mod visit;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::metrics::Metrics;

pub use self::guest::Guest;
use self::guest::{Io, Patience};
use self::refusals::WORDLESS;
pub use self::visit::{Book, Visit};

/// Most members, whatever the limit on open files.
const MAX_MEMBERS: usize = 32_768;
/// Places for strangers.
const STRANGERS: usize = 1024;
/// Open files that are not for connections: the store's, the logs', the workers' pipes.
const OTHER_FILES: usize = 512;
/// Fewest open files that anything can be served with.
const FEWEST_FILES: usize = 256;
/// How long a stranger may take to show the token.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the door looks round. Ages are counted in looks.
const LOOK: Duration = Duration::from_millis(100);
/// Looks that a stranger may count on when others wait behind it.
const GRACE: u64 = 20;
/// Looks that one may count on who has not said a word: a caller that belongs to the run speaks as soon as it is connected,
/// and what it said is there already if it had to wait in the queue.
const SILENT_GRACE: u64 = 5;
/// Looks after which failures and refusals are counted anew.
const WINDOW: u64 = 100;
/// Connections of one address that may come to nothing in a window, before the address must wait for the next one.
const FAILURES: u32 = 500;
/// Strangers that may be on their way out while newcomers come in: their connections are still open.
const LEAVING: usize = 64;
/// Connections that may wait in the kernel until the door has room, if the system allows as many
/// (`net.core.somaxconn`). With a short queue a flood drives the kernel into SYN cookies, and then most callers believe in
/// connections that no server knows of; and a fleet that calls at once waits for its kernels' retries.
const BACKLOG: u32 = 4096;
/// Guests that may wait to be served.
const QUEUE: usize = 64;

/// What the door allows.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections that have shown the token.
    pub members: usize,
    /// Connections that have not.
    pub strangers: usize,
    /// How long they may take.
    pub patience: Duration,
    /// Looks that they may count on when others wait.
    pub grace: u64,
    /// The same of those that have not said a word.
    pub silent_grace: u64,
    /// How many of one address may come to nothing in a window.
    pub failures: u32,
}

impl Limits {
    /// As many members as this process may open files for, once its limit is as high as it goes.
    ///
    /// # Errors
    /// When that is too low to serve anybody.
    fn of_this_process() -> io::Result<Self> {
        let files = usize::try_from(raise_open_files()).unwrap_or(usize::MAX);
        Self::with_files(files).ok_or_else(|| {
            io::Error::other(format!(
                "this process may open {files} files and needs {FEWEST_FILES} at least; raise the limit (ulimit -n)"
            ))
        })
    }

    /// Shares `files` out. Where they are few, a quarter each goes to strangers and to what is no connection.
    pub(crate) fn with_files(files: usize) -> Option<Self> {
        let strangers = STRANGERS.min(files / 4);
        let others = OTHER_FILES.min(files / 4);
        (files >= FEWEST_FILES).then(|| Self {
            members: MAX_MEMBERS.min(files - strangers - others),
            strangers,
            patience: PATIENCE,
            grace: GRACE,
            silent_grace: SILENT_GRACE,
            failures: FAILURES,
        })
    }
}

/// Raises the limit on open files to what the administrator allows, and says what it is then.
fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let current = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            tracing::warn!(%error, "the limit on open files cannot be raised");
            limit.current
        }
    };
    current.unwrap_or(u64::MAX)
}

/// A bound port that nobody has come through yet.
#[derive(Debug)]
pub struct Door {
    listener: TcpListener,
    limits: Limits,
}

impl Door {
    /// Binds `address`, with a queue long enough for a fleet that calls at once.
    ///
    /// # Errors
    /// When no address that the name stands for can be bound (the last one's error), or this process may open too few
    /// files to serve anybody.
    pub async fn bind(address: &str) -> io::Result<Self> {
        let limits = Limits::of_this_process()?;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name stands for no address");
        for address in lookup_host(address).await? {
            match listen(address) {
                Ok(listener) => return Ok(Self { listener, limits }),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Where it is.
    ///
    /// # Errors
    /// The system's.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// How many workers and people can be served at a time.
    pub fn members(&self) -> usize {
        self.limits.members
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A coordinator that is started anew need not wait for connections of the old one to be forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts at `door` until nobody takes guests any more. With `tls`, only who shows the run's certificate is a guest.
/// Whoever is turned away is counted in `metrics`.
pub async fn keep(
    door: Door,
    tls: Option<TlsAcceptor>,
    guests: mpsc::Sender<Guest>,
    metrics: Metrics,
) {
    let Door { listener, limits } = door;
    let book = Book::new(limits, metrics);
    let mut greetings = JoinSet::new();
    let mut looks = tokio::time::interval(LOOK);
    loop {
        let room = book.make_room();
        tokio::select! {
            accepted = listener.accept(), if room => match accepted {
                Ok((stream, address)) => {
                    if let Some((visit, dismissed)) = book.enter(address) {
                        let patience = Patience::new(limits.patience, dismissed);
                        greetings.spawn(greet(stream, visit, patience, tls.clone(), guests.clone()));
                    }
                }
                Err(error) => {
                    book.refuse(listener_address(&listener), &format!("accepting failed: {error}"));
                    if !is_of_one_connection(&error) {
                        tokio::time::sleep(LOOK).await;
                    }
                }
            },
            _ = looks.tick() => book.look(),
            Some(_) = greetings.join_next() => {}
            () = guests.closed() => break,
        }
    }
    greetings.shutdown().await;
    book.close_window();
}

/// A channel for guests that need not wait.
pub fn hall() -> (mpsc::Sender<Guest>, mpsc::Receiver<Guest>) {
    mpsc::channel(QUEUE)
}

/// Whether the next connection may be better: this one left before it was accepted. Running out of files is no such error.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

fn listener_address(listener: &TcpListener) -> SocketAddr {
    listener
        .local_addr()
        .unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)))
}

/// Lets a stranger in who proves in the handshake that it knows the token; without TLS, anybody.
async fn greet(
    stream: TcpStream,
    visit: Arc<Visit>,
    mut patience: Patience,
    tls: Option<TlsAcceptor>,
    guests: mpsc::Sender<Guest>,
) {
    // Small messages that somebody waits for; a failure only costs latency.
    let _ = stream.set_nodelay(true);
    // Or whoever only looks whether somebody listens would count among those that were turned away.
    let mut first = [0];
    let said = tokio::select! {
        said = stream.peek(&mut first) => said,
        ended = &mut patience => return visit.failed(ended.to_owned()),
    };
    if !matches!(said, Ok(1..)) {
        return visit.failed(WORDLESS.to_owned());
    }
    visit.spoke();
    let io = match tls {
        None => Io::Plain(stream),
        Some(acceptor) => {
            let shaken = tokio::select! {
                shaken = acceptor.accept(stream) => shaken.map_err(|error| why(&error)),
                ended = &mut patience => Err(ended.to_owned()),
            };
            match shaken {
                Ok(stream) => Io::Tls(Box::new(stream)),
                Err(reason) => return visit.failed(reason),
            }
        }
    };
    // Nobody takes guests when the service ends.
    let _ = guests.send(Guest::new(io, visit, patience)).await;
}

/// Why a handshake failed, in words for whoever reads the log.
fn why(error: &io::Error) -> String {
    use rustls::Error as Tls;
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Tls>());
    match inner {
        Some(Tls::InvalidMessage(_)) => "it speaks no TLS, or broken TLS".to_owned(),
        Some(Tls::NoCertificatesPresented) => "it shows no certificate of this run".to_owned(),
        Some(Tls::InvalidCertificate(fault)) => {
            format!("its certificate is not valid for this run ({fault})")
        }
        Some(Tls::AlertReceived(alert)) => {
            format!(
                "it does not take this run's certificate ({alert:?}); it may have another run's join string"
            )
        }
        Some(other) => format!("the TLS handshake failed: {other}"),
        None => "it left during the TLS handshake".to_owned(),
    }
}

#[cfg(test)]
mod tests;
