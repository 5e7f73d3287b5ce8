//! A group of one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::Tensor;

use super::tree::{self, Partial};
use super::{Abort, Collective, Error, Parts, check_partials, check_text};

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

    fn all_reduce_sum_in(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        parts.check(flat, 1);
        self.check()
    }

    fn broadcast(&mut self, _flat: &mut Tensor, _root: u32) -> Result<(), Error> {
        self.check()
    }

    fn all_reduce_fixed(
        &mut self,
        partial: Vec<Partial>,
        virtual_ranks: u32,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        self.check()?;
        check_partials(&partial, 0..virtual_ranks, out);
        let sum = tree::fold(partial, virtual_ranks);
        tch::no_grad(|| out.copy_(&sum.view_as(out)));
        Ok(())
    }

    fn reduce_scatter_sum(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        parts.check(flat, 1);
        self.check()
    }

    fn all_gather(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        parts.check(flat, 1);
        self.check()
    }

    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        check_text(own)?;
        self.check().map(|()| vec![own.to_vec()])
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        Arc::clone(&self.aborted) as Arc<dyn Abort>
    }
}
