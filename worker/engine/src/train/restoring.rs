//! A trainer's state as it comes from elsewhere, tensor by tensor: nothing is held but the trainer's own buffers and one
//! tensor.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Kind, Tensor};

use super::flat::Place;
use super::snapshot::{Error, Part, Position};
use super::trainer::Trainer;

/// A trainer that is being filled. Dropped before [`Restoring::finish`] it leaves a trainer that is half filled: throw that
/// away.
#[derive(Debug)]
pub struct Restoring<'a> {
    trainer: &'a mut Trainer,
    /// The places of the student's tensors by name.
    places: BTreeMap<String, Place>,
    /// The tensors of each part that have not come, by name.
    missing: BTreeSet<(&'static str, String)>,
}

impl<'a> Restoring<'a> {
    /// Begins to fill `trainer`.
    pub fn new(trainer: &'a mut Trainer) -> Self {
        let places: BTreeMap<String, Place> = trainer
            .layout()
            .places()
            .iter()
            .map(|place| (place.name.clone(), place.clone()))
            .collect();
        let mut missing = BTreeSet::new();
        for part in Part::ALL {
            if trainer.part_mut(part).is_some() {
                missing.extend(places.keys().map(|name| (part.prefix(), name.clone())));
            }
        }
        Self {
            trainer,
            places,
            missing,
        }
    }

    /// Takes in the tensor `name` of `part`: `values` in row order, f32, of any shape. One that the trainer has no place for
    /// is left alone, as the average is where none is kept.
    pub fn take(&mut self, part: Part, name: &str, values: &Tensor) -> Result<(), Error> {
        assert_eq!(values.kind(), Kind::Float, "state is f32");
        let (Some(place), Some(buffer)) = (self.places.get(name), self.trainer.part_mut(part))
        else {
            return Ok(());
        };
        if values.numel() != place.len {
            return Err(Error::Size {
                name: format!("{}/{name}", part.prefix()),
                found: values.numel(),
                expected: place.len,
            });
        }
        let mut own = buffer.narrow(0, place.offset as i64, place.len as i64);
        tch::no_grad(|| own.copy_(&values.view([-1])));
        self.missing.remove(&(part.prefix(), name.to_owned()));
        Ok(())
    }

    /// Goes on at `position`, bit for bit as the trainer did whose state this is.
    ///
    /// Refuses a state of which a tensor has not come.
    pub fn finish(self, position: Position) -> Result<(), Error> {
        if let Some((part, name)) = self.missing.first() {
            return Err(Error::Missing {
                name: format!("{part}/{name}"),
            });
        }
        self.trainer.resume(position);
        Ok(())
    }
}
