//! A ring of TCP connections: reduce-scatter, then all-gather, in pieces that overlap.
//!
//! Rank r sends to r + 1 and hears from r - 1. The buffer is cut into one chunk for each rank; chunk c starts
//! at rank c and gathers one addend at each rank it passes, so the order of additions depends on the world
//! size alone, and every rank receives the finished chunk from where it was finished: the same bits everywhere.
//! A rank forwards a piece as soon as it has added its own values, while a thread of its own sends.

mod exchange;
mod handshake;

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use distillery_common::group::GroupId;
use tch::{Device, Kind, Tensor};

use self::exchange::{Exchange, Label, Operation};
use super::{Abort, Collective, Error};

/// Floats sent together: 64 KiB.
const PIECE: usize = 16 * 1024;

/// A place in a ring that is not formed yet.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
}

/// Who is to form a ring, as one member is told.
#[derive(Debug, Clone)]
pub struct Invitation<'a> {
    /// Which group and generation.
    pub group: &'a GroupId,
    /// This member's position.
    pub rank: u32,
    /// Where each rank listens (`host:port`), in rank order.
    pub peers: &'a [String],
    /// A secret of the run that every member knows; strangers do not.
    pub token: [u8; 32],
    /// How long to wait for a neighbour, now and in every later operation.
    pub deadline: Duration,
}

/// One member of a formed ring.
#[derive(Debug)]
pub struct TcpRing {
    rank: u32,
    world: u32,
    /// None in a ring of one.
    links: Option<Links>,
    operations: u64,
    /// Host copy of what is being reduced.
    staging: Vec<f32>,
    aborter: Arc<Aborter>,
}

/// The connections to both neighbours.
#[derive(Debug)]
struct Links {
    next: TcpStream,
    previous: TcpStream,
}

impl Links {
    /// Ends both connections, so that neighbours notice at once.
    fn shut(&self) {
        // A connection that is already gone is as shut as it can be.
        let _ = self.next.shutdown(Shutdown::Both);
        let _ = self.previous.shutdown(Shutdown::Both);
    }

    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            next: self.next.try_clone()?,
            previous: self.previous.try_clone()?,
        })
    }
}

#[derive(Debug)]
struct Aborter {
    aborted: AtomicBool,
    links: Option<Links>,
}

impl Abort for Aborter {
    fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
        if let Some(links) = &self.links {
            links.shut();
        }
    }
}

impl TcpRing {
    /// Opens a port of this host for a ring to come; the address is what the other members need.
    pub fn listen(host: IpAddr) -> io::Result<(Listener, SocketAddr)> {
        let socket = TcpListener::bind((host, 0))?;
        let address = socket.local_addr()?;
        Ok((Listener { socket }, address))
    }
}

impl Listener {
    /// Joins both neighbours; connections from strangers, other groups or generations are turned away.
    pub fn connect(self, invitation: &Invitation<'_>) -> Result<TcpRing, Error> {
        let world = invitation.peers.len() as u32;
        assert!(invitation.rank < world, "a rank lies in its world");
        let setup = |source: io::Error| Error::Setup {
            reason: source.to_string(),
        };
        let links = match world {
            1 => None,
            _ => Some(handshake::join(&self.socket, invitation)?),
        };
        let for_aborter = links.as_ref().map(Links::try_clone).transpose();
        Ok(TcpRing {
            rank: invitation.rank,
            world,
            operations: 0,
            staging: Vec::new(),
            aborter: Arc::new(Aborter {
                aborted: AtomicBool::new(false),
                links: for_aborter.map_err(setup)?,
            }),
            links,
        })
    }
}

impl TcpRing {
    /// Runs one operation on the ring; whatever breaks it ends both connections.
    fn operate<T>(
        &mut self,
        operation: Operation,
        len: usize,
        body: impl FnOnce(&mut Exchange<'_>, &mut [f32]) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        if self.aborter.aborted.load(Ordering::SeqCst) {
            return Err(Error::Aborted);
        }
        let Some(links) = &self.links else {
            return Ok(None);
        };
        self.operations += 1;
        let label = Label {
            operation,
            number: self.operations,
            len: len as u64,
        };
        let staging = &mut self.staging;
        let result = exchange::run(links, self.rank, self.world, label, |exchange| {
            body(exchange, staging)
        });
        if result.is_err() && self.aborter.aborted.load(Ordering::SeqCst) {
            return Err(Error::Aborted);
        }
        result.map(Some)
    }

    fn copy_in(&mut self, flat: &Tensor) {
        assert_eq!(flat.kind(), Kind::Float, "a group sums f32");
        assert!(flat.is_contiguous(), "a group sums contiguous buffers");
        self.staging.resize(flat.numel(), 0.0);
        let host = flat.to_device(Device::Cpu);
        host.copy_data(&mut self.staging, host.numel());
    }

    fn copy_out(&self, flat: &mut Tensor) {
        let sum = Tensor::from_slice(&self.staging);
        tch::no_grad(|| flat.copy_(&sum.view(&flat.size()[..])));
    }
}

impl Collective for TcpRing {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn all_reduce_sum(&mut self, flat: &mut Tensor) -> Result<(), Error> {
        self.copy_in(flat);
        let (rank, world, len) = (self.rank, self.world, flat.numel());
        let chunk = |index: u32| chunk(len, index % world, world);
        let done = self.operate(Operation::AllReduce, len, |exchange, values| {
            exchange.send(&values[chunk(rank)]);
            for hop in 1..world {
                let part = chunk(rank + world - hop);
                exchange.receive(&mut values[part], |own, piece| {
                    for (own, theirs) in own.iter_mut().zip(piece) {
                        *own += theirs;
                    }
                })?;
            }
            for hop in 1..world {
                let part = chunk(rank + world + 1 - hop);
                let keep = |own: &mut [f32], piece: &[f32]| own.copy_from_slice(piece);
                if hop + 1 < world {
                    exchange.receive(&mut values[part], keep)?;
                } else {
                    exchange.receive_last(&mut values[part], keep)?;
                }
            }
            Ok(())
        })?;
        if done.is_some() {
            self.copy_out(flat);
        }
        Ok(())
    }

    fn broadcast(&mut self, flat: &mut Tensor, root: u32) -> Result<(), Error> {
        self.copy_in(flat);
        let (rank, world) = (self.rank, self.world);
        let done = self.operate(Operation::Broadcast, flat.numel(), |exchange, values| {
            let keep = |own: &mut [f32], piece: &[f32]| own.copy_from_slice(piece);
            if rank == root {
                exchange.send(values);
                Ok(())
            } else if (rank + 1) % world == root {
                exchange.receive_last(values, keep)
            } else {
                exchange.receive(values, keep)
            }
        })?;
        if done.is_some() && rank != root {
            self.copy_out(flat);
        }
        Ok(())
    }

    fn agree(&mut self, digest: &[u8; 32]) -> Result<(), Error> {
        let (rank, world) = (self.rank, self.world);
        let odd = self.operate(Operation::Agree, digest.len(), |exchange, _| {
            exchange.send_bytes(digest);
            let mut odd = None;
            for hop in 1..world {
                let theirs: [u8; 32] = exchange.receive_bytes(hop + 1 < world)?;
                if theirs != *digest {
                    odd = odd.or(Some((rank + world - hop) % world));
                }
            }
            Ok(odd)
        })?;
        match odd.flatten() {
            Some(peer) => Err(Error::Disagree { rank, peer }),
            None => Ok(()),
        }
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        Arc::clone(&self.aborter) as Arc<dyn Abort>
    }
}

/// The part of `0..len` that starts its way at rank `index`.
fn chunk(len: usize, index: u32, world: u32) -> Range<usize> {
    let cut = |i: u32| len * i as usize / world as usize;
    cut(index)..cut(index + 1)
}
