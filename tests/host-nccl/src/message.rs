//! What communicators and the hub say to each other: a length, then that many bytes.

use std::io::{self, Read, Write};

/// Longest message: a guard against nonsense.
const LONGEST: u64 = 4 << 30;

/// A collective operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Everybody gets the sum.
    AllReduce,
    /// Everybody gets what the root has.
    Broadcast,
    /// Everybody gets a part of the sum.
    ReduceScatter,
    /// Everybody gets what everybody has.
    AllGather,
    /// The root gets the sum.
    Reduce,
}

/// What a rank asks of the hub.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// First of all: who it is.
    Join { rank: u32, world: u32 },
    /// All ranks ask for the same.
    Collective {
        operation: Operation,
        kind: i32,
        root: u32,
        payload: Vec<u8>,
    },
    /// Sends and receives that belong together: peers, with bytes or their number.
    Group {
        sends: Vec<(u32, Vec<u8>)>,
        receives: Vec<(u32, u64)>,
    },
    /// It ends in peace.
    Leave,
}

/// What the hub answers: a result of NCCL, and what the rank receives.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) result: i32,
    pub(crate) payloads: Vec<Vec<u8>>,
}

impl Request {
    pub(crate) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut message = Message::default();
        match self {
            Self::Join { rank, world } => {
                message.numbers(&[0, (*rank).into(), (*world).into()]);
            }
            Self::Collective {
                operation,
                kind,
                root,
                payload,
            } => {
                message.numbers(&[1, *operation as u64, *kind as u64, (*root).into()]);
                message.bytes(payload);
            }
            Self::Group { sends, receives } => {
                message.numbers(&[2, sends.len() as u64, receives.len() as u64]);
                for (peer, payload) in sends {
                    message.numbers(&[(*peer).into()]);
                    message.bytes(payload);
                }
                for &(peer, bytes) in receives {
                    message.numbers(&[peer.into(), bytes]);
                }
            }
            Self::Leave => message.numbers(&[3]),
        }
        message.write(to)
    }

    pub(crate) fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut message = Reader::read(from)?;
        let request = match message.number()? {
            0 => Self::Join {
                rank: message.number()? as u32,
                world: message.number()? as u32,
            },
            1 => Self::Collective {
                operation: match message.number()? {
                    0 => Operation::AllReduce,
                    1 => Operation::Broadcast,
                    2 => Operation::ReduceScatter,
                    3 => Operation::AllGather,
                    4 => Operation::Reduce,
                    _ => return Err(nonsense()),
                },
                kind: message.number()? as i32,
                root: message.number()? as u32,
                payload: message.bytes()?,
            },
            2 => {
                let (sends, receives) = (message.number()?, message.number()?);
                Self::Group {
                    sends: (0..sends)
                        .map(|_| Ok((message.number()? as u32, message.bytes()?)))
                        .collect::<io::Result<_>>()?,
                    receives: (0..receives)
                        .map(|_| Ok((message.number()? as u32, message.number()?)))
                        .collect::<io::Result<_>>()?,
                }
            }
            3 => Self::Leave,
            _ => return Err(nonsense()),
        };
        Ok(request)
    }
}

impl Reply {
    pub(crate) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut message = Message::default();
        message.numbers(&[self.result as u64, self.payloads.len() as u64]);
        for payload in &self.payloads {
            message.bytes(payload);
        }
        message.write(to)
    }

    pub(crate) fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut message = Reader::read(from)?;
        let result = message.number()? as i32;
        let payloads = message.number()?;
        Ok(Self {
            result,
            payloads: (0..payloads)
                .map(|_| message.bytes())
                .collect::<io::Result<_>>()?,
        })
    }
}

#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn numbers(&mut self, numbers: &[u64]) {
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
        self.0.extend(bytes);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.numbers(&[bytes.len() as u64]);
        self.0.extend(bytes);
    }

    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        to.write_all(&(self.0.len() as u64).to_le_bytes())?;
        to.write_all(&self.0)
    }
}

struct Reader(std::vec::IntoIter<u8>);

impl Reader {
    fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut len = [0; 8];
        from.read_exact(&mut len)?;
        let len = u64::from_le_bytes(len);
        if len > LONGEST {
            return Err(nonsense());
        }
        let mut bytes = vec![0; len as usize];
        from.read_exact(&mut bytes)?;
        Ok(Self(bytes.into_iter()))
    }

    fn number(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        for byte in &mut bytes {
            *byte = self.0.next().ok_or_else(nonsense)?;
        }
        Ok(u64::from_le_bytes(bytes))
    }

    fn bytes(&mut self) -> io::Result<Vec<u8>> {
        let len = self.number()? as usize;
        if len > self.0.len() {
            return Err(nonsense());
        }
        Ok(self.0.by_ref().take(len).collect())
    }
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a message makes no sense")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let requests = [
            Request::Join { rank: 2, world: 3 },
            Request::Collective {
                operation: Operation::ReduceScatter,
                kind: 7,
                root: 1,
                payload: vec![1, 2, 3],
            },
            Request::Group {
                sends: vec![(1, vec![4; 9]), (0, Vec::new())],
                receives: vec![(2, 77)],
            },
            Request::Leave,
        ];
        for request in requests {
            let mut bytes = Vec::new();
            request.write(&mut bytes).unwrap();
            assert_eq!(Request::read(&mut &bytes[..]).unwrap(), request);
            assert!(Request::read(&mut &bytes[..bytes.len() - 1]).is_err());
        }
        let reply = Reply {
            result: 6,
            payloads: vec![vec![9; 5], Vec::new()],
        };
        let mut bytes = Vec::new();
        reply.write(&mut bytes).unwrap();
        assert_eq!(Reply::read(&mut &bytes[..]).unwrap(), reply);
    }
}
