//! A group of one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::Tensor;

use super::{Abort, Collective, Error};

/// The only member of its group.
#[derive(Debug, Default)]
pub struct Solo {
    aborted: Arc<Flag>,
}

#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Abort for Flag {
    fn abort(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Solo {
    fn check(&self) -> Result<(), Error> {
        if self.aborted.0.load(Ordering::SeqCst) {
            return Err(Error::Aborted);
        }
        Ok(())
    }
}

impl Collective for Solo {
    fn rank(&self) -> u32 {
        0
    }

    fn world(&self) -> u32 {
        1
    }

    fn all_reduce_sum(&mut self, _flat: &mut Tensor) -> Result<(), Error> {
        self.check()
    }

    fn broadcast(&mut self, _flat: &mut Tensor, _root: u32) -> Result<(), Error> {
        self.check()
    }

    fn agree(&mut self, _digest: &[u8; 32]) -> Result<(), Error> {
        self.check()
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        Arc::clone(&self.aborted) as Arc<dyn Abort>
    }
}
