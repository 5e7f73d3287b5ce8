//! One operation on a ring: this thread receives, a second one sends.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::{Error, Links, PIECE};

/// What the ranks do together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    AllReduce = 1,
    Broadcast = 2,
    Agree = 3,
}

/// Begins every operation, so that ranks that do different things find out instead of mixing their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label {
    pub(super) operation: Operation,
    pub(super) number: u64,
    pub(super) len: u64,
}

impl Label {
    fn bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&(self.operation as u64).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(f, self.bytes())
    }
}

/// A label in words, also one that this version does not know.
struct Foreign([u8; 24]);

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(f, self.0)
    }
}

fn describe(f: &mut fmt::Formatter<'_>, bytes: [u8; 24]) -> fmt::Result {
    let word = |at: usize| {
        let bytes = bytes[at..at + 8]
            .try_into()
            .expect("a label has three words");
        u64::from_le_bytes(bytes)
    };
    let name = match word(0) {
        1 => "all-reduce",
        2 => "broadcast",
        3 => "agreement",
        _ => "an unknown operation",
    };
    write!(f, "operation {}, {name} of length {}", word(8), word(16))
}

/// Runs `body` with both neighbours; the first thing that breaks is the error, and ends both connections.
pub(super) fn run<T>(
    links: &Links,
    rank: u32,
    world: u32,
    label: Label,
    body: impl FnOnce(&mut Exchange<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let first = Mutex::new(None);
    let fail = |error: Error| {
        let mut first = first.lock().expect("nobody panics holding this lock");
        first.get_or_insert(error);
        links.shut();
    };
    let (to_send, outgoing) = channel::<Vec<u8>>();
    let (spent, reusable) = channel::<Vec<u8>>();
    let next = (rank + 1) % world;
    let value = thread::scope(|scope| {
        let fail = &fail;
        scope.spawn(move || {
            if let Err(error) = send_all(&links.next, &outgoing, &spent) {
                fail(classify(rank, next, error));
            }
        });
        let mut exchange = Exchange {
            previous: &links.previous,
            rank,
            previous_rank: (rank + world - 1) % world,
            to_send,
            reusable,
            bytes: vec![0; 4 * PIECE],
            floats: vec![0.0; PIECE],
        };
        let result = exchange.open(label).and_then(|()| body(&mut exchange));
        // Dropping the exchange closes the queue; the sender then empties it and ends.
        drop(exchange);
        result.map_err(fail).ok()
    });
    let first = first.into_inner().expect("nobody panics holding this lock");
    match (value, first) {
        (_, Some(error)) => Err(error),
        (Some(value), None) => Ok(value),
        (None, None) => unreachable!("a failed body leaves its error"),
    }
}

fn send_all(
    mut next: &TcpStream,
    outgoing: &Receiver<Vec<u8>>,
    spent: &Sender<Vec<u8>>,
) -> io::Result<()> {
    for piece in outgoing {
        next.write_all(&piece)?;
        // Nobody takes buffers back once the receiving side is done.
        let _ = spent.send(piece);
    }
    Ok(())
}

fn classify(rank: u32, peer: u32, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Timeout { rank, peer },
        _ => Error::PeerLost {
            rank,
            peer,
            source: error,
        },
    }
}

/// Both directions of one operation.
pub(super) struct Exchange<'a> {
    previous: &'a TcpStream,
    rank: u32,
    previous_rank: u32,
    to_send: Sender<Vec<u8>>,
    reusable: Receiver<Vec<u8>>,
    bytes: Vec<u8>,
    floats: Vec<f32>,
}

impl Exchange<'_> {
    fn open(&mut self, label: Label) -> Result<(), Error> {
        self.send_bytes(&label.bytes());
        let theirs: [u8; 24] = self.receive_bytes(false)?;
        if theirs != label.bytes() {
            return Err(Error::OutOfStep {
                rank: self.rank,
                peer: self.previous_rank,
                ours: label.to_string(),
                theirs: Foreign(theirs).to_string(),
            });
        }
        Ok(())
    }

    /// Queues `values` for the next rank.
    pub(super) fn send(&self, values: &[f32]) {
        for piece in values.chunks(PIECE) {
            let mut bytes = self.reusable.try_recv().unwrap_or_default();
            bytes.clear();
            bytes.extend(piece.iter().flat_map(|value| value.to_le_bytes()));
            self.queue(bytes);
        }
    }

    /// Queues raw bytes for the next rank.
    pub(super) fn send_bytes(&self, bytes: &[u8]) {
        self.queue(bytes.to_vec());
    }

    fn queue(&self, bytes: Vec<u8>) {
        // A sender that has failed has said why and has ended the connections; receiving will fail too.
        let _ = self.to_send.send(bytes);
    }

    /// Receives as many values as `own` has, lets `merge` combine each piece into `own`, and sends that on.
    pub(super) fn receive(
        &mut self,
        own: &mut [f32],
        merge: impl Fn(&mut [f32], &[f32]),
    ) -> Result<(), Error> {
        for part in own.chunks_mut(PIECE) {
            self.receive_piece(part, &merge)?;
            self.send(part);
        }
        Ok(())
    }

    /// [`Self::receive`] where the next rank has these values already.
    pub(super) fn receive_last(
        &mut self,
        own: &mut [f32],
        merge: impl Fn(&mut [f32], &[f32]),
    ) -> Result<(), Error> {
        own.chunks_mut(PIECE)
            .try_for_each(|part| self.receive_piece(part, &merge))
    }

    fn receive_piece(
        &mut self,
        own: &mut [f32],
        merge: &impl Fn(&mut [f32], &[f32]),
    ) -> Result<(), Error> {
        let bytes = &mut self.bytes[..4 * own.len()];
        self.previous
            .read_exact(bytes)
            .map_err(|error| classify(self.rank, self.previous_rank, error))?;
        let floats = &mut self.floats[..own.len()];
        for (float, bytes) in floats.iter_mut().zip(bytes.chunks_exact(4)) {
            *float = f32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
        merge(own, floats);
        Ok(())
    }

    /// Receives N raw bytes, and sends them on if `forward`.
    pub(super) fn receive_bytes<const N: usize>(
        &mut self,
        forward: bool,
    ) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.previous
            .read_exact(&mut bytes)
            .map_err(|error| classify(self.rank, self.previous_rank, error))?;
        if forward {
            self.send_bytes(&bytes);
        }
        Ok(bytes)
    }
}
