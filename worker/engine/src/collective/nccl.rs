//! NVIDIA's collectives, for groups whose engines each own a CUDA device.
//!
//! Works on libtorch's own stream (the legacy default one: the engine never changes streams), so a sum is
//! ordered like any other tensor operation and nothing waits on the host.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Device, Kind, Tensor};

use super::nccl_sys::{Communicator, Library};
use super::{Abort, Collective, Error};

/// Names the library's file where it is installed under another.
const LIBRARY_VARIABLE: &str = "DISTILLERY_NCCL";

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
    pub fn new() -> Result<Self, Error> {
        Ok(Self(open()?.unique_id()?))
    }
}

/// One member of an NCCL communicator.
pub struct Nccl {
    rank: u32,
    world: u32,
    device: Device,
    shared: Arc<Shared>,
}

struct Shared {
    communicator: Communicator,
    /// Set by whoever ends the communicator first; nobody uses it after.
    ended: AtomicBool,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nccl(rank {} of {})", self.rank, self.world)
    }
}

impl Abort for Shared {
    fn abort(&self) {
        if !self.ended.swap(true, Ordering::SeqCst) {
            // The group is over either way; the thread inside an operation reports what became of it.
            let _ = self.communicator.abort();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if !self.ended.swap(true, Ordering::SeqCst) {
            // At the end of a group nothing can be done about a refusal.
            let _ = self.communicator.destroy();
        }
    }
}

impl Nccl {
    /// Joins the communicator of `id` with `device`; returns once all `world` ranks have.
    pub fn join(id: &UniqueId, rank: u32, world: u32, device: Device) -> Result<Self, Error> {
        assert!(rank < world, "a rank lies in its world");
        let library = open()?;
        let Device::Cuda(_) = device else {
            return Err(Error::Setup {
                reason: format!("NCCL needs a CUDA device, this engine owns {device:?}"),
            });
        };
        // Makes libtorch's context current on this thread, which is the device that NCCL takes.
        let _ = Tensor::zeros([1], (Kind::Float, device)).double_value(&[0]);
        Ok(Self {
            rank,
            world,
            device,
            shared: Arc::new(Shared {
                communicator: library.join(id.0, rank, world)?,
                ended: AtomicBool::new(false),
            }),
        })
    }

    fn check(&self, flat: &Tensor) -> Result<(), Error> {
        assert_eq!(flat.kind(), Kind::Float, "a group sums f32");
        assert!(flat.is_contiguous(), "a group sums contiguous buffers");
        assert_eq!(flat.device(), self.device, "a group sums on its device");
        self.alive()
    }

    fn alive(&self) -> Result<(), Error> {
        if self.shared.ended.load(Ordering::SeqCst) {
            return Err(Error::Aborted);
        }
        Ok(())
    }
}

impl Collective for Nccl {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn all_reduce_sum(&mut self, flat: &mut Tensor) -> Result<(), Error> {
        self.check(flat)?;
        self.shared.communicator.all_reduce_sum(flat)?;
        self.alive()
    }

    fn broadcast(&mut self, flat: &mut Tensor, root: u32) -> Result<(), Error> {
        self.check(flat)?;
        self.shared.communicator.broadcast(flat, root)?;
        self.alive()
    }

    fn agree(&mut self, digest: &[u8; 32]) -> Result<(), Error> {
        let bytes: Vec<f32> = digest.iter().map(|&byte| f32::from(byte)).collect();
        let ours = Tensor::from_slice(&bytes).to_device(self.device);
        // Every rank's bytes in a row of their own; sums of one byte and zeros are exact.
        let all = Tensor::zeros([i64::from(self.world), 32], (Kind::Float, self.device));
        all.get(i64::from(self.rank)).copy_(&ours);
        let mut flat = all.view([-1]);
        self.all_reduce_sum(&mut flat)?;
        for peer in 0..self.world {
            if all.get(i64::from(peer)) != ours {
                return Err(Error::Disagree {
                    rank: self.rank,
                    peer,
                });
            }
        }
        self.alive()
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        Arc::clone(&self.shared) as Arc<dyn Abort>
    }
}

fn open() -> Result<Library, Error> {
    let named = std::env::var(LIBRARY_VARIABLE).ok();
    let names: Vec<String> = match named {
        Some(name) => vec![name],
        None => ["libnccl.so.2", "libnccl.so"].map(str::to_owned).to_vec(),
    };
    Library::open(&names)
}
