//! A group whose operations are timed, for the curves: nothing follows from it.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use distillery_common::telemetry::Stopwatch;
use tch::Tensor;

use crate::collective::tree::Partial;
use crate::collective::{Abort, Collective, Error, Parts};

/// Does what the group inside does, and adds the time of it up: what a rank waits for others is in it.
pub(super) struct Timed<'a> {
    inside: &'a mut dyn Collective,
    spent: Rc<Cell<Duration>>,
}

impl<'a> Timed<'a> {
    /// Adds to `spent`.
    pub(super) fn new(inside: &'a mut dyn Collective, spent: Rc<Cell<Duration>>) -> Self {
        Self { inside, spent }
    }

    fn time<T>(&mut self, body: impl FnOnce(&mut dyn Collective) -> T) -> T {
        let stopwatch = Stopwatch::start();
        let result = body(self.inside);
        self.spent.set(self.spent.get() + stopwatch.elapsed());
        result
    }
}

impl Collective for Timed<'_> {
    fn rank(&self) -> u32 {
        self.inside.rank()
    }

    fn world(&self) -> u32 {
        self.inside.world()
    }

    fn all_reduce_sum_in(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        self.time(|group| group.all_reduce_sum_in(flat, parts))
    }

    fn all_reduce_fixed(
        &mut self,
        partial: Vec<Partial>,
        virtual_ranks: u32,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        self.time(|group| group.all_reduce_fixed(partial, virtual_ranks, out))
    }

    fn reduce_scatter_sum(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        self.time(|group| group.reduce_scatter_sum(flat, parts))
    }

    fn all_gather(&mut self, flat: &mut Tensor, parts: &Parts) -> Result<(), Error> {
        self.time(|group| group.all_gather(flat, parts))
    }

    fn broadcast(&mut self, flat: &mut Tensor, root: u32) -> Result<(), Error> {
        self.time(|group| group.broadcast(flat, root))
    }

    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.time(|group| group.gather(own))
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        self.inside.aborter()
    }
}
