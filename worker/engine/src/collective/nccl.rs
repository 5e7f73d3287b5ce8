//! NVIDIA's collectives, for groups whose engines each own a CUDA device.
//!
//! Works on libtorch's own stream (the legacy default one: the engine never changes streams), so a sum is
//! ordered like any other tensor operation.
//!
//! No call of NCCL blocks: the communicator is non-blocking, and every operation ends with a wait of our own that looks
//! whether it is done, whether a peer is lost ([`NcclFault`]), whether another thread has ended the group, and
//! whether the deadline has passed. The trainer reads the norm of the gradient right after the sum, so that the wait
//! costs nothing that it would not wait for anyway.
//!
//! [`UniqueId`] and ranks are all that NCCL knows of a group; that only members hold the id is its protection.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::nccl_sys::{Communicator, Driver, Library};
use super::tree::{self, Partial, cover};
use super::{
    Abort, Collective, Ended, Error, NcclFault, Parts, check_partials, check_text, leaves_of,
};

/// What the root makes and every rank needs to join: 128 bytes, written as hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
pub struct UniqueId([u8; 128]);

impl fmt::Display for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UniqueId({self})")
    }
}

impl FromStr for UniqueId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let malformed = || Error::Setup {
            reason: format!("`{text}` is no NCCL id of 256 hexadecimal digits"),
        };
        if text.len() != 256 || !text.is_ascii() {
            return Err(malformed());
        }
        let mut id = [0; 128];
        for (byte, at) in id.iter_mut().zip((0..256).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| malformed())?;
        }
        Ok(Self(id))
    }
}

impl UniqueId {
    /// A new id, made by rank 0 and handed to the others.
    pub fn new(library: &Nvidia) -> Result<Self, Error> {
        Ok(Self(library.0.unique_id()?))
    }
}

/// An NCCL library, opened for as long as the process lives.
#[derive(Clone, Copy)]
pub struct Nvidia(Library);

impl fmt::Debug for Nvidia {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.0.works_on_host_memory();
        write!(f, "Nvidia(host memory: {host})")
    }
}

impl Nvidia {
    /// Opens the library in the file `named`, or that of the name under which it is installed.
    pub fn open(named: Option<&str>) -> Result<Self, Error> {
        let names: Vec<String> = match named {
            Some(name) => vec![name.to_owned()],
            None => ["libnccl.so.2", "libnccl.so"].map(str::to_owned).to_vec(),
        };
        Library::open(&names).map(Self)
    }

    /// Fails unless the library can serve `device`. NCCL serves CUDA devices; a library that says of itself that it
    /// works on host memory, as the one of the tests does, serves the CPU and nothing else.
    pub fn check_serves(&self, device: Device) -> Result<(), Error> {
        let needed = match (self.0.works_on_host_memory(), device) {
            (false, Device::Cuda(_)) | (true, Device::Cpu) => return Ok(()),
            (false, _) => "a CUDA device",
            (true, _) => "the CPU, since it works on host memory",
        };
        Err(Error::Setup {
            reason: format!("this NCCL library needs {needed}; the engine owns {device:?}"),
        })
    }
}

/// One member of an NCCL communicator.
pub struct Nccl {
    rank: u32,
    world: u32,
    device: Device,
    deadline: Duration,
    /// Ends a wait that the communicator's own abort cannot end yet.
    ended: Ended,
    /// Says whether the device has done its work; none where the library works on host memory.
    driver: Option<Driver>,
    shared: Arc<Shared>,
}

/// The communicator until somebody ends it. Calls hold the lock, and none blocks, so that an abort need not wait.
struct Shared(Mutex<Option<Communicator>>);

impl Shared {
    fn call<T>(&self, body: impl FnOnce(&Communicator) -> Result<T, Error>) -> Result<T, Error> {
        let live = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        live.as_ref().ok_or(Error::Aborted).and_then(body)
    }

    fn take(&self) -> Option<Communicator> {
        let mut live = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        live.take()
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nccl(rank {} of {})", self.rank, self.world)
    }
}

impl Abort for Shared {
    fn abort(&self) {
        if let Some(communicator) = self.take() {
            // The group is over either way; the thread inside an operation reports what became of it.
            let _ = communicator.abort();
        }
    }
}

impl Drop for Nccl {
    /// Takes leave of the others where the group is whole; at the end of one nothing can be done about a refusal.
    fn drop(&mut self) {
        let Some(communicator) = self.shared.take() else {
            return;
        };
        let mut patience = Patience::new(self.deadline.min(LONGEST_FAREWELL));
        let mut settled = communicator.finalize().map(|()| false);
        while let Ok(false) = settled {
            if !patience.wait() {
                break;
            }
            settled = communicator.is_settled();
        }
        let _ = match settled {
            Ok(true) => communicator.destroy(),
            Ok(false) | Err(_) => communicator.abort(),
        };
    }
}

/// How long a member that leaves waits for the communicator to come to rest.
const LONGEST_FAREWELL: Duration = Duration::from_secs(5);

/// Looks again and again until a deadline, first at once, then less and less often.
struct Patience {
    looks: u32,
    slept: Duration,
    deadline: Duration,
}

impl Patience {
    /// Looks that only give way to other threads.
    const EAGER: u32 = 200;
    /// The pause after them, and where it stops growing.
    const SHORT: Duration = Duration::from_micros(50);
    const LONG: Duration = Duration::from_millis(1);

    fn new(deadline: Duration) -> Self {
        Self {
            looks: 0,
            slept: Duration::ZERO,
            deadline,
        }
    }

    /// Pauses before the next look; false when the deadline has passed.
    fn wait(&mut self) -> bool {
        self.looks += 1;
        if self.looks <= Self::EAGER {
            std::thread::yield_now();
            return true;
        }
        if self.slept >= self.deadline {
            return false;
        }
        let pause = (Self::SHORT * (1 + (self.looks - Self::EAGER) / 64)).min(Self::LONG);
        std::thread::sleep(pause);
        self.slept += pause;
        true
    }
}

impl Nccl {
    /// Joins the communicator of `id` with `device`; returns once all `world` ranks have, or fails at the deadline or
    /// when `ended` is set, both of which hold for every later operation too.
    pub fn join(
        library: &Nvidia,
        id: &UniqueId,
        rank: u32,
        world: u32,
        device: Device,
        deadline: Duration,
        ended: &Ended,
    ) -> Result<Self, Error> {
        assert!(rank < world, "a rank lies in its world");
        library.check_serves(device)?;
        let driver = match device {
            Device::Cuda(_) => {
                // Makes libtorch's context current on this thread, which is the device that NCCL takes.
                let _ = Tensor::zeros([1], (Kind::Float, device)).double_value(&[0]);
                Some(Driver::open()?)
            }
            _ => None,
        };
        let communicator = library.0.join(id.0, rank, world)?;
        let nccl = Self {
            rank,
            world,
            device,
            deadline,
            ended: ended.clone(),
            driver,
            shared: Arc::new(Shared(Mutex::new(Some(communicator)))),
        };
        match nccl.settle() {
            Ok(()) => Ok(nccl),
            Err(Error::Nccl {
                fault: NcclFault::Timeout,
                ..
            }) => Err(Error::Setup {
                reason: format!(
                    "the {world} ranks of the NCCL communicator did not all join within {deadline:?}"
                ),
            }),
            Err(error) => Err(error),
        }
    }

    /// Begins an operation and waits for its end; whatever breaks it ends the communicator, so that no buffer is
    /// written to after this returns.
    fn operate(&self, body: impl FnOnce(&Communicator) -> Result<(), Error>) -> Result<(), Error> {
        let begun = self.shared.call(body);
        begun
            .and_then(|()| self.settle())
            .inspect_err(|_| self.shared.abort())
    }

    /// Waits until nothing is under way; ends the communicator where that does not come.
    fn settle(&self) -> Result<(), Error> {
        let mut patience = Patience::new(self.deadline);
        loop {
            if self.ended.is_set() {
                self.shared.abort();
                return Err(Error::Aborted);
            }
            let settled = self.shared.call(Communicator::is_settled);
            let idle = settled.and_then(|settled| match self.driver {
                Some(driver) if settled => driver.is_idle(),
                _ => Ok(settled),
            });
            match idle {
                Ok(true) => return self.shared.call(|_| Ok(())),
                Ok(false) if patience.wait() => {}
                Ok(false) => {
                    self.shared.abort();
                    return Err(Error::Nccl {
                        call: "wait",
                        fault: NcclFault::Timeout,
                        message: format!(
                            "rank {} heard nothing within {:?}",
                            self.rank, self.deadline
                        ),
                    });
                }
                Err(error) => {
                    self.shared.abort();
                    return Err(error);
                }
            }
        }
    }

    fn check(&self, flat: &Tensor) {
        let kinds = [Kind::Float, Kind::BFloat16, Kind::Half];
        assert!(kinds.contains(&flat.kind()), "NCCL sums f32, bf16 or f16");
        assert!(flat.is_contiguous(), "a group sums contiguous buffers");
        assert_eq!(flat.device(), self.device, "a group sums on its device");
    }

    /// This rank's part of an even buffer.
    fn own(&self, flat: &Tensor, parts: &Parts) -> Tensor {
        narrow(flat, parts.of(self.rank))
    }

    /// Does one operation after the other, one for every rank's part of `flat`: NCCL's own collectives want parts of one
    /// size. Each keeps all connections busy, so that only latency is lost.
    fn for_each_part(
        &self,
        flat: &Tensor,
        parts: &Parts,
        call: impl Fn(&Communicator, &mut Tensor, u32) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for rank in (0..self.world).filter(|&rank| !parts.of(rank).is_empty()) {
            let mut part = narrow(flat, parts.of(rank));
            self.operate(|communicator| call(communicator, &mut part, rank))?;
        }
        self.shared.call(|_| Ok(()))
    }

    /// Fills row `rank` of `[world, len]` bytes from every rank's own.
    fn gather_bytes(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let (world, len) = (i64::from(self.world), own.len() as i64);
        let mut all = Tensor::zeros([world * len], (Kind::Uint8, self.device));
        let mine = Tensor::from_slice(own).to_device(self.device);
        if len > 0 {
            self.operate(|communicator| communicator.all_gather(&mine, &mut all))?;
        }
        let all = Vec::<u8>::try_from(all.to_device(Device::Cpu)).expect("bytes are bytes");
        let row = |rank: usize| all[rank * own.len()..(rank + 1) * own.len()].to_vec();
        Ok((0..self.world as usize).map(row).collect())
    }
}

impl Collective for Nccl {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn all_reduce_sum_in(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        self.check(flat);
        parts.check(flat, self.world);
        self.operate(|communicator| match flat.numel() {
            0 => Ok(()),
            _ => communicator.all_reduce_sum(flat),
        })
    }

    /// Every rank gets its part of every node, adds them up along the tree, and gives out its part of the sum: for
    /// powers of two 2N (W - 1) / W per rank, as any all-reduce, and room for one part of each node.
    fn all_reduce_fixed(
        &mut self,
        partial: Vec<Partial>,
        virtual_ranks: u32,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        self.check(out);
        let leaves = |rank| leaves_of(virtual_ranks, rank, self.world);
        check_partials(&partial, leaves(self.rank), out);
        let parts = Parts::even(out.numel(), self.world);
        let mine = parts.of(self.rank);
        let mut nodes: Vec<(u32, Partial)> = (0..self.world)
            .flat_map(|rank| {
                cover(leaves(rank))
                    .into_iter()
                    .map(move |node| (rank, node))
            })
            .map(|(rank, node)| {
                let values = Tensor::zeros([mine.len() as i64], (Kind::Float, self.device));
                let (start, level) = (node.start, node.level);
                (
                    rank,
                    Partial {
                        start,
                        level,
                        values,
                    },
                )
            })
            .collect();
        let own = nodes.iter_mut().filter(|(rank, _)| *rank == self.rank);
        for ((_, to), from) in std::iter::zip(own, &partial) {
            tch::no_grad(|| to.values.copy_(&narrow(&from.values, mine.clone())));
        }
        self.operate(|communicator| {
            communicator.grouped(|| {
                for peer in (0..self.world).filter(|&peer| peer != self.rank) {
                    let theirs = parts.of(peer);
                    for node in partial.iter().filter(|_| !theirs.is_empty()) {
                        communicator.send(&narrow(&node.values, theirs.clone()), peer)?;
                    }
                }
                for (peer, node) in nodes.iter_mut().filter(|_| !mine.is_empty()) {
                    if *peer != self.rank {
                        communicator.receive(&mut node.values, *peer)?;
                    }
                }
                Ok(())
            })
        })?;
        let nodes = nodes.into_iter().map(|(_, node)| node).collect();
        let sum = tree::fold(nodes, virtual_ranks);
        tch::no_grad(|| narrow(out, mine).copy_(&sum));
        self.all_gather(out, &parts)
    }

    fn reduce_scatter_sum(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        self.check(flat);
        parts.check(flat, self.world);
        if flat.numel() == 0 || !parts.is_even() {
            return self.for_each_part(flat, parts, Communicator::reduce_sum);
        }
        let mut own = self.own(flat, parts);
        self.operate(|communicator| communicator.reduce_scatter_sum(flat, &mut own))
    }

    fn all_gather(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        self.check(flat);
        parts.check(flat, self.world);
        if flat.numel() == 0 || !parts.is_even() {
            return self.for_each_part(flat, parts, Communicator::broadcast);
        }
        let own = self.own(flat, parts);
        self.operate(|communicator| communicator.all_gather(&own, flat))
    }

    fn broadcast(&mut self, flat: &mut Tensor, root: u32) -> Result<(), Error> {
        self.check(flat);
        assert!(root < self.world, "the root is a rank");
        self.operate(|communicator| match flat.numel() {
            0 => Ok(()),
            _ => communicator.broadcast(flat, root),
        })
    }

    /// NCCL would wait for ever where lengths differ: they are compared first.
    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        check_text(own)?;
        let length = (own.len() as u32).to_le_bytes();
        for (peer, theirs) in (0..).zip(self.gather_bytes(&length)?) {
            if theirs != length {
                let words = |bytes: &[u8]| format!("gathering of length, little endian, {bytes:?}");
                return Err(Error::OutOfStep {
                    rank: self.rank,
                    peer,
                    ours: words(&length),
                    theirs: words(&theirs),
                });
            }
        }
        self.gather_bytes(own)
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        Arc::clone(&self.shared) as Arc<dyn Abort>
    }
}

/// The values of a contiguous buffer at `range`.
fn narrow(flat: &Tensor, range: Range<usize>) -> Tensor {
    let flat = flat.view([-1]);
    flat.narrow(0, range.start as i64, range.len() as i64)
}
