//! A ring of TCP connections: reduce-scatter, then all-gather, in pieces that overlap.
//!
//! Rank r sends to r + 1 and hears from r - 1. The buffer is cut into one part for each rank ([`Parts`]); part c starts at
//! rank c + 1 and gathers one addend at each rank it passes until it is finished at rank c, so the order of additions
//! depends on the parts alone, and every rank receives the finished part from where it was finished: the same bits
//! everywhere.
//!
//! One thread serves both connections, whichever is ready ([`pump`]). On the CPU values are sent from where the tensor
//! holds them and land there too; only what is added passes through a scratch that fits the cache. A rank forwards a
//! value as soon as it has added its own.

mod chain;
mod greeting;
mod handshake;
mod pump;
mod rounds;

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use self::chain::Chain;
use self::pump::{Label, Operation, Ring};
use self::rounds::{Rounds, Steps};
pub use super::Invitation;
use super::tree::{self, Partial};
use super::{Abort, Collective, Error, Parts, check_partials, check_text, leaves_of};
use crate::raw_tensor::{bytes_of, bytes_of_mut, f32_mut};

/// A place in a ring that is not formed yet.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
}

/// One member of a formed ring.
#[derive(Debug)]
pub struct TcpRing {
    rank: u32,
    world: u32,
    deadline: Duration,
    /// None in a ring of one.
    links: Option<Links>,
    operations: u64,
    /// Where values wait to be added.
    scratch: Vec<f32>,
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

impl Drop for TcpRing {
    /// Leaves the ring, also where somebody still holds what it is aborted with.
    fn drop(&mut self) {
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
        if let Some(links) = &links {
            pump::prepare(links).map_err(setup)?;
        }
        let for_aborter = links.as_ref().map(Links::try_clone).transpose();
        Ok(TcpRing {
            rank: invitation.rank,
            world,
            deadline: invitation.deadline,
            operations: 0,
            scratch: Vec::new(),
            aborter: Arc::new(Aborter {
                aborted: AtomicBool::new(false),
                links: for_aborter.map_err(setup)?,
            }),
            links,
        })
    }
}

impl TcpRing {
    /// Runs one operation on the ring; whatever breaks it ends both connections. Nothing happens in a ring of one.
    fn operate(
        &mut self,
        operation: Operation,
        detail: u32,
        len: usize,
        body: impl FnOnce(&Ring<'_>, &mut Vec<f32>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.aborter.aborted.load(Ordering::SeqCst) {
            return Err(Error::Aborted);
        }
        let Some(links) = &self.links else {
            return Ok(());
        };
        self.operations += 1;
        let ring = Ring {
            links,
            rank: self.rank,
            world: self.world,
            deadline: self.deadline,
            label: Label {
                operation,
                detail,
                number: self.operations,
                len: len as u64,
            },
        };
        let result = body(&ring, &mut self.scratch);
        if result.is_err() {
            links.shut();
            if self.aborter.aborted.load(Ordering::SeqCst) {
                return Err(Error::Aborted);
            }
        }
        result
    }

    /// An operation of `steps` on the values of `flat`.
    fn on_values(
        &mut self,
        operation: Operation,
        steps: Steps<'_>,
        flat: &mut Tensor,
    ) -> Result<(), Error> {
        check(flat);
        let detail = match steps {
            Steps::Broadcast { root } => root,
            Steps::Parts { parts, .. } => {
                parts.check(flat, self.world);
                parts.name()
            }
        };
        on_host(flat, |values| {
            self.operate(operation, detail, values.len(), |ring, scratch| {
                ring.run(&mut Rounds::new(
                    steps, ring.rank, ring.world, values, scratch,
                ))
            })
        })
    }
}

impl Collective for TcpRing {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn all_reduce_sum_in(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        self.on_values(Operation::AllReduce, Steps::reduce_and_gather(parts), flat)
    }

    fn all_reduce_fixed(
        &mut self,
        partial: Vec<Partial>,
        virtual_ranks: u32,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        check(out);
        let leaves = leaves_of(virtual_ranks, self.rank, self.world);
        check_partials(&partial, leaves, out);
        if self.links.is_none() {
            let sum = tree::fold(partial, virtual_ranks);
            tch::no_grad(|| out.copy_(&sum.view_as(out)));
            return self.operate(
                Operation::AllReduceFixed,
                virtual_ranks,
                out.numel(),
                |_, _| Ok(()),
            );
        }
        let mut own: Vec<(tree::Node, Tensor)> = partial
            .into_iter()
            .map(|partial| {
                (
                    partial.node(),
                    partial.values.to_device(Device::Cpu).contiguous(),
                )
            })
            .collect();
        on_host(out, |values| {
            let len = values.len();
            self.operate(
                Operation::AllReduceFixed,
                virtual_ranks,
                len,
                |ring, scratch| {
                    let own = own
                        .iter_mut()
                        .map(|(node, values)| (*node, f32_mut(values)));
                    let own = own.collect();
                    ring.run(&mut Chain::new(
                        ring.rank,
                        ring.world,
                        virtual_ranks,
                        own,
                        values,
                        scratch,
                    ))
                },
            )
        })
    }

    fn reduce_scatter_sum(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        self.on_values(Operation::ReduceScatter, Steps::reduce(parts), flat)
    }

    fn all_gather(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        self.on_values(Operation::AllGather, Steps::gather(parts), flat)
    }

    fn broadcast(&mut self, flat: &mut Tensor, root: u32) -> Result<(), Error> {
        assert!(root < self.world, "the root is a rank");
        self.on_values(Operation::Broadcast, Steps::Broadcast { root }, flat)
    }

    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        check_text(own)?;
        let (rank, world) = (self.rank as usize, self.world as usize);
        // Texts travel in the place of values, each in as many as hold it.
        let words = own.len().div_ceil(4);
        let mut room = vec![0f32; words * world];
        let texts = |word: usize| 4 * words * word..4 * words * word + own.len();
        bytes_of_mut(&mut room)[texts(rank)].copy_from_slice(own);
        let parts = Parts::even(room.len(), self.world);
        self.operate(Operation::Gather, 0, own.len(), |ring, scratch| {
            ring.run(&mut Rounds::new(
                Steps::gather(&parts),
                ring.rank,
                ring.world,
                &mut room,
                scratch,
            ))
        })?;
        let bytes = bytes_of(&room);
        Ok((0..world).map(|word| bytes[texts(word)].to_vec()).collect())
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        Arc::clone(&self.aborter) as Arc<dyn Abort>
    }
}

fn check(flat: &Tensor) {
    assert_eq!(flat.kind(), Kind::Float, "a ring sums f32");
    assert!(flat.is_contiguous(), "a group sums contiguous buffers");
}

/// Lends the values of `flat`: in place on the CPU, as a copy that is written back from a device.
fn on_host<T>(
    flat: &mut Tensor,
    body: impl FnOnce(&mut [f32]) -> Result<T, Error>,
) -> Result<T, Error> {
    if flat.device() == Device::Cpu {
        return body(f32_mut(flat));
    }
    let mut host = flat.to_device(Device::Cpu);
    let result = body(f32_mut(&mut host))?;
    tch::no_grad(|| flat.copy_(&host));
    Ok(result)
}
