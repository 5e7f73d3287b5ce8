//! The header of a safetensors file: a length, then JSON that says where every tensor lies.

use std::ops::Range;

use bytes::Bytes;
use safetensors::SafeTensors;
use serde_json::{Map, json};

use super::{Dtype, TensorSpec};

/// The largest header that is parsed.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// The first bytes of a file that holds `tensors`, each with its length in bytes, one after the other behind them.
pub(super) fn build<'a>(tensors: impl Iterator<Item = (&'a TensorSpec, usize)>) -> Bytes {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for (spec, bytes) in tensors {
        let start = end;
        end += bytes;
        let described = json!({
            "dtype": spec.dtype.name(),
            "shape": spec.shape,
            "data_offsets": [start, end],
        });
        map.insert(spec.stored_name(), described);
    }
    let mut json = serde_json::to_vec(&map).expect("text and numbers become JSON");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes.into()
}

/// A tensor as a file's own header describes it, with the place of its numbers in the file.
pub(super) struct Described {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<u64>,
    pub(super) place: Range<u64>,
}

/// Reads the header of a verified file.
pub(super) fn parse(file: &[u8]) -> Result<Vec<Described>, String> {
    let length = file
        .first_chunk::<8>()
        .map(|bytes| u64::from_le_bytes(*bytes));
    let length = length.ok_or("it is shorter than a header")?;
    if length > MAX_HEADER_BYTES {
        return Err(format!("its header of {length} bytes is too large"));
    }
    let (_, header) = SafeTensors::read_metadata(file).map_err(|error| error.to_string())?;
    let data = 8 + length;
    let mut tensors: Vec<Described> = header
        .tensors()
        .into_iter()
        .map(|(name, info)| Described {
            name,
            dtype: info.dtype.to_string(),
            shape: info.shape.iter().map(|&size| size as u64).collect(),
            place: data + info.data_offsets.0 as u64..data + info.data_offsets.1 as u64,
        })
        .collect();
    tensors.sort_by_key(|tensor| (tensor.place.start, tensor.name.clone()));
    Ok(tensors)
}

/// Whether `found` is the tensor `spec` at `place`.
pub(super) fn same(found: &Described, spec: &TensorSpec, place: &Range<u64>) -> Result<(), String> {
    let name = spec.stored_name();
    if found.name != name {
        return Err(format!("it holds {} where {name} is expected", found.name));
    }
    if Dtype::parse(&found.dtype) != Some(spec.dtype) {
        return Err(format!(
            "{name} is {}, expected is {}",
            found.dtype,
            spec.dtype.name()
        ));
    }
    if found.shape != spec.shape {
        return Err(format!(
            "{name} has shape {:?}, expected is {:?}",
            found.shape, spec.shape
        ));
    }
    if found.place != *place {
        return Err(format!(
            "{name} lies at {:?}, expected is {place:?}",
            found.place
        ));
    }
    Ok(())
}
