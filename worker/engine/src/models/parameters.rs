//! Named tensors, handed out while a network is put together.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::Tensor;

/// Tensors by name. Clones handed out share storage and gradient with the ones kept here.
pub type Parameters = BTreeMap<String, Tensor>;

/// A low-rank adapter beside the weight of one module: `scale * up(down(x))` is added to what it gives.
#[derive(Debug)]
pub struct Adapter {
    /// `[r, in]`, or `[r, in, k, k]` beside a convolution.
    pub down: Tensor,
    /// `[out, r]`, or `[out, r, 1, 1]` beside a convolution.
    pub up: Tensor,
    /// `lora_alpha / lora_rank`.
    pub scale: f64,
    /// Shared by all adapters of a network.
    pub switch: Arc<AtomicBool>,
}

impl Adapter {
    /// A clone that shares the tensors and the switch.
    pub fn shallow_clone(&self) -> Self {
        Self {
            down: self.down.shallow_clone(),
            up: self.up.shallow_clone(),
            scale: self.scale,
            switch: Arc::clone(&self.switch),
        }
    }

    /// Whether it takes part.
    pub fn is_on(&self) -> bool {
        self.switch.load(Ordering::Relaxed)
    }
}

/// Where a network under construction takes its tensors from.
#[derive(Debug)]
pub(super) struct Source<'a> {
    parameters: &'a Parameters,
    adapters: &'a BTreeMap<String, Adapter>,
    taken: Cell<usize>,
}

impl<'a> Source<'a> {
    pub(super) fn new(parameters: &'a Parameters, adapters: &'a BTreeMap<String, Adapter>) -> Self {
        Self {
            parameters,
            adapters,
            taken: Cell::new(0),
        }
    }

    pub(super) fn root(&self) -> Scope<'_> {
        Scope {
            source: self,
            prefix: String::new(),
        }
    }

    /// Asserts that the network took every tensor: the expected names and the construction say the same.
    pub(super) fn finish(&self) {
        assert_eq!(
            self.taken.get(),
            self.parameters.len(),
            "a network takes every tensor that its configuration calls for"
        );
    }
}

/// A place in the tree of modules.
#[derive(Debug, Clone)]
pub(super) struct Scope<'a> {
    source: &'a Source<'a>,
    prefix: String,
}

impl Scope<'_> {
    /// The module `name` below this one.
    pub(super) fn at(&self, name: impl std::fmt::Display) -> Self {
        let prefix = match self.prefix.is_empty() {
            true => name.to_string(),
            false => format!("{}.{name}", self.prefix),
        };
        Self {
            source: self.source,
            prefix,
        }
    }

    /// The tensor `name` of this module, if there is one.
    pub(super) fn optional(&self, name: &str) -> Option<Tensor> {
        let tensor = self
            .source
            .parameters
            .get(&format!("{}.{name}", self.prefix))?;
        self.source.taken.set(self.source.taken.get() + 1);
        Some(tensor.shallow_clone())
    }

    /// The tensor `name` of this module, which the loader has checked to be there.
    pub(super) fn tensor(&self, name: &str) -> Tensor {
        self.optional(name).unwrap_or_else(|| {
            panic!(
                "{}.{name} is among the tensors that the configuration calls for",
                self.prefix
            )
        })
    }

    pub(super) fn adapter(&self) -> Option<Adapter> {
        self.source
            .adapters
            .get(&self.prefix)
            .map(Adapter::shallow_clone)
    }
}
