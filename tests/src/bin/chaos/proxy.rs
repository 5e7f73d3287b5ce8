//! A TCP proxy before a storage server, that misbehaves as it is told.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// What it does to connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mood {
    /// Passes everything on.
    Good,
    /// Closes each connection at once, as a server that is gone.
    Refuses,
    /// Passes every piece on after a while.
    Slow,
    /// Passes requests on, and resets the connection instead of the reply: nobody knows what became of them.
    LosesReplies,
    /// Answers 503 to everything.
    Busy,
}

impl Mood {
    /// All bad ones.
    pub(crate) const BAD: [Self; 4] = [Self::Refuses, Self::Slow, Self::LosesReplies, Self::Busy];

    fn of(number: u8) -> Self {
        let bad = Self::BAD.into_iter();
        bad.into_iter()
            .find(|mood| *mood as u8 == number)
            .unwrap_or(Self::Good)
    }
}

/// What the proxy and its connections share.
struct Shared {
    mood: AtomicU8,
    ended: AtomicBool,
    hurt: AtomicU64,
    server: SocketAddr,
}

impl Shared {
    fn mood(&self) -> Mood {
        Mood::of(self.mood.load(Ordering::Relaxed))
    }
}

/// A running proxy; ends when dropped.
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    pub(crate) port: u16,
}

impl Proxy {
    /// A proxy before `server`, in a good mood.
    pub(crate) fn before(server: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            mood: AtomicU8::new(Mood::Good as u8),
            ended: AtomicBool::new(false),
            hurt: AtomicU64::new(0),
            server,
        });
        let own = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if own.ended.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let shared = Arc::clone(&own);
                // A connection that breaks is what this is for.
                std::thread::spawn(move || drop(serve(&shared, stream)));
            }
        });
        Ok(Self { shared, port })
    }

    /// Changes what happens from now on, to open connections too.
    pub(crate) fn be(&self, mood: Mood) {
        self.shared.mood.store(mood as u8, Ordering::Relaxed);
    }

    /// Connections and pieces that were hurt so far.
    pub(crate) fn hurt(&self) -> u64 {
        self.shared.hurt.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the listener, so that it sees the end.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(shared: &Arc<Shared>, client: TcpStream) -> std::io::Result<()> {
    match shared.mood() {
        Mood::Refuses => {
            shared.hurt.fetch_add(1, Ordering::Relaxed);
            return client.shutdown(Shutdown::Both);
        }
        Mood::Busy => return answer_busy(shared, client),
        Mood::Good | Mood::Slow | Mood::LosesReplies => {}
    }
    let server = TcpStream::connect(shared.server)?;
    let (from, to) = (client.try_clone()?, server.try_clone()?);
    let requests = Arc::clone(shared);
    let passing = std::thread::spawn(move || pass(&requests, from, to, false));
    let passed = pass(shared, server, client, true);
    // Either half ends the other by closing both sockets.
    let _ = passing.join();
    passed
}

/// Passes on what comes until either side ends, or the mood says otherwise.
fn pass(
    shared: &Shared,
    mut from: TcpStream,
    mut to: TcpStream,
    is_reply: bool,
) -> std::io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut piece).unwrap_or(0);
        let lost = match shared.mood() {
            Mood::Good => false,
            Mood::Slow => {
                shared.hurt.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(150));
                false
            }
            Mood::LosesReplies => is_reply,
            Mood::Refuses | Mood::Busy => true,
        };
        if lost && read > 0 {
            shared.hurt.fetch_add(1, Ordering::Relaxed);
        }
        if read == 0 || lost || to.write_all(&piece[..read]).is_err() {
            // Closed on the other side already, or about to be.
            let _ = from.shutdown(Shutdown::Both);
            return to.shutdown(Shutdown::Both);
        }
    }
}

fn answer_busy(shared: &Shared, mut client: TcpStream) -> std::io::Result<()> {
    shared.hurt.fetch_add(1, Ordering::Relaxed);
    let mut piece = vec![0; 64 << 10];
    client.set_read_timeout(Some(Duration::from_millis(50)))?;
    while client
        .read(&mut piece)
        .is_ok_and(|read| read == piece.len())
    {}
    let reply = "HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    client.write_all(reply.as_bytes())?;
    client.shutdown(Shutdown::Write)?;
    // What is still on its way must be read, or the reply is lost to a reset.
    while client.read(&mut piece).is_ok_and(|read| read > 0) {}
    Ok(())
}
