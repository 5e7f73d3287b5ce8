//! One operation on a ring: this thread sends and receives, whichever connection is ready.

use std::fmt;
use std::io::{self, Read, Write};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_tcp_congestion;

use super::{Error, Links};

/// Bytes handed to a connection, or asked of it, at a time: with as much again on the other side they fit the cache
/// of a core, and what was just received is sent on before it leaves it.
pub(super) const PIECE: usize = 256 * 1024;

/// What the ranks do together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    AllReduce = 1,
    Broadcast = 2,
    Gather = 3,
    ReduceScatter = 4,
    AllGather = 5,
    AllReduceFixed = 6,
}

/// Begins every operation, so that ranks that do different things find out instead of mixing their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label {
    pub(super) operation: Operation,
    /// The root of a broadcast, the leaves of a tree.
    pub(super) detail: u32,
    pub(super) number: u64,
    pub(super) len: u64,
}

/// Bytes of a label.
const LABEL: usize = 24;

impl Label {
    fn bytes(self) -> [u8; LABEL] {
        let mut bytes = [0; LABEL];
        bytes[..4].copy_from_slice(&(self.operation as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.detail.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }
}

/// A label in words, also one that this version does not know.
struct Words([u8; LABEL]);

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |at: usize| {
            let bytes = self.0[at..at + 8]
                .try_into()
                .expect("a label has three words");
            u64::from_le_bytes(bytes)
        };
        let (kind, detail) = (word(0) as u32, word(0) >> 32);
        write!(f, "operation {}, ", word(8))?;
        match kind {
            1 => write!(f, "all-reduce"),
            2 => write!(f, "broadcast from rank {detail}"),
            3 => write!(f, "gathering"),
            4 => write!(f, "reduce-scatter"),
            5 => write!(f, "all-gather"),
            6 => write!(f, "all-reduce over {detail} leaves"),
            _ => write!(f, "an unknown operation"),
        }?;
        write!(f, " of length {}", word(16))
    }
}

/// What passes through a rank in one operation, as bytes in both directions.
pub(super) trait Traffic {
    /// What may go to the next rank now; empty where it waits for the previous one, or nothing is left.
    fn outgoing(&mut self) -> &[u8];

    /// The first `bytes` of what [`Self::outgoing`] gave are gone.
    fn sent(&mut self, bytes: usize);

    /// Where the previous rank's next bytes belong; empty where they cannot be taken yet, or none are left.
    fn incoming(&mut self) -> &mut [u8];

    /// The first `bytes` of what [`Self::incoming`] gave are filled.
    fn received(&mut self, bytes: usize) -> Result<(), Error>;
}

/// Both neighbours, and what is done with them.
pub(super) struct Ring<'a> {
    pub(super) links: &'a Links,
    pub(super) rank: u32,
    pub(super) world: u32,
    pub(super) deadline: Duration,
    pub(super) label: Label,
}

/// Makes connections that are shaken hands over ready for [`Ring::run`].
pub(super) fn prepare(links: &Links) -> io::Result<()> {
    for stream in [&links.next, &links.previous] {
        stream.set_nonblocking(true)?;
        if stream.local_addr()?.ip() == stream.peer_addr()?.ip() {
            // Within a host nothing can be congested. What hosts set for wide networks, such as BBR, paces its sending by
            // timers, which costs a quarter of the speed here. Where the kernel refuses, that is all that is lost.
            let _ = set_tcp_congestion(stream, UNPACED);
        }
    }
    Ok(())
}

/// A congestion control without timers, which every Linux has and allows.
const UNPACED: &str = "reno";

impl Ring<'_> {
    /// Exchanges labels, then moves `traffic` until nothing is left in either direction.
    pub(super) fn run(&self, traffic: &mut impl Traffic) -> Result<(), Error> {
        self.drive(&mut Greeting {
            ours: self.label.bytes(),
            theirs: [0; LABEL],
            sent: 0,
            received: 0,
            ring: self,
        })?;
        self.drive(traffic)
    }

    /// Every turn sends once and receives once; where neither connection was ready, the thread sleeps until one is.
    fn drive(&self, traffic: &mut impl Traffic) -> Result<(), Error> {
        loop {
            let outgoing = traffic.outgoing();
            let wants_to_send = !outgoing.is_empty();
            let mut progress = false;
            if wants_to_send {
                let bytes = self.send(outgoing)?;
                progress |= bytes > 0;
                if bytes > 0 {
                    traffic.sent(bytes);
                }
            }
            let incoming = traffic.incoming();
            let wants_to_receive = !incoming.is_empty();
            if wants_to_receive {
                let bytes = self.receive(incoming)?;
                progress |= bytes > 0;
                if bytes > 0 {
                    traffic.received(bytes)?;
                }
            }
            if !wants_to_send && !wants_to_receive {
                return Ok(());
            }
            if !progress {
                self.wait(wants_to_send, wants_to_receive)?;
            }
        }
    }

    /// How many bytes the connection took; 0 if it is full.
    fn send(&self, bytes: &[u8]) -> Result<usize, Error> {
        loop {
            return match (&self.links.next).write(bytes) {
                Ok(0) => Err(self.lost(self.next(), io::ErrorKind::WriteZero.into())),
                Ok(sent) => Ok(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(self.lost(self.next(), error)),
            };
        }
    }

    /// How many bytes were there; 0 if none have come yet.
    fn receive(&self, bytes: &mut [u8]) -> Result<usize, Error> {
        loop {
            return match (&self.links.previous).read(bytes) {
                Ok(0) => Err(self.lost(self.previous(), io::ErrorKind::UnexpectedEof.into())),
                Ok(received) => Ok(received),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(self.lost(self.previous(), error)),
            };
        }
    }

    /// Sleeps until a connection that is wanted is ready, for no longer than the deadline.
    fn wait(&self, to_send: bool, to_receive: bool) -> Result<(), Error> {
        let peer = if to_receive {
            self.previous()
        } else {
            self.next()
        };
        let mut watched = Vec::with_capacity(2);
        if to_receive {
            watched.push(PollFd::new(&self.links.previous, PollFlags::IN));
        }
        if to_send {
            watched.push(PollFd::new(&self.links.next, PollFlags::OUT));
        }
        let deadline = Timespec {
            tv_sec: i64::try_from(self.deadline.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: self.deadline.subsec_nanos().into(),
        };
        match poll(&mut watched, Some(&deadline)) {
            Ok(0) => Err(Error::Timeout {
                rank: self.rank,
                peer,
            }),
            // After a signal the next turn finds out where things stand.
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(self.lost(peer, error.into())),
        }
    }

    fn next(&self) -> u32 {
        (self.rank + 1) % self.world
    }

    fn previous(&self) -> u32 {
        (self.rank + self.world - 1) % self.world
    }

    fn lost(&self, peer: u32, source: io::Error) -> Error {
        Error::PeerLost {
            rank: self.rank,
            peer,
            source,
        }
    }
}

/// The exchange of labels.
struct Greeting<'a> {
    ours: [u8; LABEL],
    theirs: [u8; LABEL],
    sent: usize,
    received: usize,
    ring: &'a Ring<'a>,
}

impl Traffic for Greeting<'_> {
    fn outgoing(&mut self) -> &[u8] {
        &self.ours[self.sent..]
    }

    fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
    }

    fn incoming(&mut self) -> &mut [u8] {
        &mut self.theirs[self.received..]
    }

    fn received(&mut self, bytes: usize) -> Result<(), Error> {
        self.received += bytes;
        if self.received == LABEL && self.theirs != self.ours {
            return Err(Error::OutOfStep {
                rank: self.ring.rank,
                peer: self.ring.previous(),
                ours: Words(self.ours).to_string(),
                theirs: Words(self.theirs).to_string(),
            });
        }
        Ok(())
    }
}
