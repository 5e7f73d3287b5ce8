//! A connection that is let in, which ends by itself unless its holder shows the token soon.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::Sleep;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::Visit;

/// A connection to serve.
#[derive(Debug)]
pub struct Guest {
    io: Io,
    visit: Arc<Visit>,
    /// None once the token was shown.
    patience: Option<Patience>,
    /// Whether it was told to go: whatever it says now comes too late.
    gone: bool,
}

/// What carries the bytes.
#[derive(Debug)]
pub(super) enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Ends with the reason when a stranger has to go.
#[derive(Debug)]
pub(super) struct Patience {
    deadline: Pin<Box<Sleep>>,
    dismissed: Option<oneshot::Receiver<()>>,
}

impl Patience {
    pub(super) fn new(limit: Duration, dismissed: oneshot::Receiver<()>) -> Self {
        Self {
            deadline: Box::pin(tokio::time::sleep(limit)),
            dismissed: Some(dismissed),
        }
    }
}

impl Future for Patience {
    type Output = &'static str;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<&'static str> {
        if let Some(dismissed) = &mut self.dismissed {
            match Pin::new(dismissed).poll(cx) {
                Poll::Ready(Ok(())) => {
                    self.dismissed = None;
                    return Poll::Ready("it did not show the token while others waited");
                }
                // Nobody can send it away any more: it has just shown the token.
                Poll::Ready(Err(_)) => self.dismissed = None,
                Poll::Pending => {}
            }
        }
        self.deadline
            .as_mut()
            .poll(cx)
            .map(|()| "it did not show the token in time")
    }
}

impl Guest {
    pub(super) fn new(io: Io, visit: Arc<Visit>, patience: Patience) -> Self {
        Self {
            io,
            visit,
            patience: Some(patience),
            gone: false,
        }
    }

    /// Ends with an error when a stranger's time is over; asks to be woken when it is. Asked before everything, since whoever
    /// takes no answers keeps the service waiting to write, and is never read from again.
    fn may_stay(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        self.gone = self.gone || self.has_to_go(cx);
        match self.gone {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(()),
        }
    }

    fn has_to_go(&mut self, cx: &mut Context<'_>) -> bool {
        if self.visit.is_member() {
            self.patience = None;
        }
        let Some(patience) = &mut self.patience else {
            return false;
        };
        match Pin::new(patience).poll(cx) {
            Poll::Ready(_) if self.visit.is_member() => false,
            Poll::Ready(reason) => {
                self.visit.failed(reason.to_owned());
                true
            }
            Poll::Pending => false,
        }
    }
}

impl Connected for Guest {
    type ConnectInfo = Arc<Visit>;

    fn connect_info(&self) -> Arc<Visit> {
        Arc::clone(&self.visit)
    }
}

impl AsyncRead for Guest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.may_stay(cx)?;
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Io::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Guest {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.may_stay(cx)?;
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.may_stay(cx)?;
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.may_stay(cx)?;
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.may_stay(cx)?;
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
