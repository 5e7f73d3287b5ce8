//! Many named tensors as one contiguous f32 buffer.

use std::ops::Range;

use distillery_common::group::share_of;
use tch::{Device, Kind, Tensor};

use crate::collective::Parts;

/// Where each named tensor lies in a flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    places: Vec<Place>,
    len: usize,
}

/// One tensor's part of a flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The tensor's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its first element in the buffer.
    pub offset: usize,
    /// Its number of elements.
    pub len: usize,
}

impl Place {
    /// Its elements in a flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

impl Layout {
    /// The tensors' places in the order given.
    pub fn of(tensors: &[(String, Tensor)]) -> Self {
        let mut len = 0;
        let places = tensors
            .iter()
            .map(|(name, tensor)| {
                let place = Place {
                    name: name.clone(),
                    shape: tensor.size(),
                    offset: len,
                    len: tensor.numel(),
                };
                len += place.len;
                place
            })
            .collect();
        Self { places, len }
    }

    /// The places in buffer order.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// The elements of consecutive places.
    pub fn span(&self, places: &Range<usize>) -> Range<usize> {
        let start = |at: usize| self.places.get(at).map_or(self.len, |place| place.offset);
        start(places.start)..start(places.end).max(start(places.start))
    }

    /// The places that are the share of `rank` of `world`: consecutive, whole, and of about as many values for all.
    pub fn share(&self, rank: u32, world: u32) -> Range<usize> {
        let sizes: Vec<usize> = self.places.iter().map(|place| place.len).collect();
        share_of(&sizes, rank, world)
    }

    /// The values of all ranks' shares.
    pub fn parts(&self, world: u32) -> Parts {
        let end = |rank| self.span(&self.share(rank, world)).end;
        Parts::ending_at((0..world).map(end).collect())
    }

    /// Elements of the whole buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A student's trainable tensors and their f32 masters.
#[derive(Debug)]
pub struct Parameters {
    layout: Layout,
    compute: Vec<Tensor>,
    /// All masters, `[len]`, f32.
    pub(super) masters: Tensor,
}

impl Parameters {
    /// Takes the student's trainable tensors, in their compute format; masters start as their f32 values.
    ///
    /// The caller owes leaf tensors that require gradients, all on one device, in an order that is the same in
    /// every process (sorted names).
    pub fn new(tensors: Vec<(String, Tensor)>) -> Self {
        assert!(!tensors.is_empty(), "a student has something to train");
        let layout = Layout::of(&tensors);
        let masters = tch::no_grad(|| {
            let parts: Vec<Tensor> = tensors
                .iter()
                .map(|(_, tensor)| tensor.detach().to_kind(Kind::Float).flatten(0, -1))
                .collect();
            Tensor::cat(&parts, 0)
        });
        for (name, tensor) in &tensors {
            assert!(tensor.requires_grad(), "{name} does not require a gradient");
        }
        Self {
            layout,
            compute: tensors.into_iter().map(|(_, tensor)| tensor).collect(),
            masters,
        }
    }

    /// Where each tensor lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The tensors' device.
    pub fn device(&self) -> Device {
        self.masters.device()
    }

    /// Adds the gradient of `loss` to `flat` (f32, at least `len` long).
    ///
    /// Tensors the loss does not depend on add nothing.
    pub(super) fn add_gradient(&self, loss: &Tensor, flat: &Tensor) {
        let gradients = Tensor::run_backward(&[loss], &self.compute, false, false);
        tch::no_grad(|| {
            for (place, gradient) in self.layout.places().iter().zip(gradients) {
                if gradient.defined() {
                    let mut part = flat.narrow(0, place.offset as i64, place.len as i64);
                    part += gradient.to_kind(Kind::Float).flatten(0, -1);
                }
            }
        });
    }

    /// Writes `values` (flat, f32) into the student's own tensors, in their compute format.
    pub(super) fn write_compute(&mut self, values: &Tensor) {
        tch::no_grad(|| {
            for (place, tensor) in self.layout.places().iter().zip(&mut self.compute) {
                let part = values.narrow(0, place.offset as i64, place.len as i64);
                tensor.copy_(&part.view(&place.shape[..]));
            }
        });
    }
}
