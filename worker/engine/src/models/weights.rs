//! Tensors from and to safetensors files.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use distillery_common::teacher::{StoredDtype, Weights, read_header};
use tch::{Device, Kind, Tensor};

use super::parameters::Parameters;

/// Why tensors cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file does not hold what its header says, or cannot be reached.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no sound safetensors file.
    #[error(transparent)]
    Header(#[from] distillery_common::teacher::Error),
    /// A tensor is in a format that is neither read nor written.
    #[error("tensor {tensor:?} has the format {kind}; supported: F32, F16, BF16")]
    Format {
        /// Its name.
        tensor: String,
        /// Its format.
        kind: String,
    },
}

/// Reads all of `weights` as `kind` on `device`.
///
/// # Errors
/// When a file changed since it was checked, or cannot be read.
pub fn load(weights: &Weights, kind: Kind, device: Device) -> Result<Parameters, Error> {
    let mut files = BTreeMap::new();
    let mut parameters = Parameters::new();
    for (name, (path, entry)) in &weights.tensors {
        let read = |source| Error::Read {
            path: path.clone(),
            source,
        };
        if !files.contains_key(path) {
            files.insert(path, File::open(path).map_err(read)?);
        }
        let stored = stored_kind(name, entry.dtype)?;
        let mut bytes = vec![0; entry.bytes as usize];
        files[path]
            .read_exact_at(&mut bytes, entry.offset)
            .map_err(read)?;
        let tensor = Tensor::from_data_size(&bytes, &entry.shape, stored);
        parameters.insert(name.clone(), tensor.to_device(device).to_kind(kind));
    }
    Ok(parameters)
}

/// Reads every tensor of a safetensors file as it is stored, on the CPU.
///
/// # Errors
/// When the file is damaged or holds other formats.
pub fn read_safetensors(path: &Path) -> Result<Parameters, Error> {
    let tensors = read_header(path)?
        .into_iter()
        .map(|(name, entry)| (name, (path.to_owned(), entry)));
    let weights = Weights {
        files: vec![path.to_owned()],
        tensors: tensors.collect(),
    };
    let mut parameters = Parameters::new();
    for (name, place) in weights.tensors {
        let kind = stored_kind(&name, place.1.dtype)?;
        let one = Weights {
            files: vec![path.to_owned()],
            tensors: BTreeMap::from([(name, place)]),
        };
        parameters.extend(load(&one, kind, Device::Cpu)?);
    }
    Ok(parameters)
}

fn stored_kind(tensor: &str, dtype: StoredDtype) -> Result<Kind, Error> {
    match dtype {
        StoredDtype::F32 => Ok(Kind::Float),
        StoredDtype::F16 => Ok(Kind::Half),
        StoredDtype::Bf16 => Ok(Kind::BFloat16),
        StoredDtype::I64 => Err(Error::Format {
            tensor: tensor.to_owned(),
            kind: "I64".to_owned(),
        }),
    }
}

/// A safetensors file with `tensors` and `metadata`, as the reference writer lays it out: tensors by number format
/// (f32, bf16, f16), then by name; the header padded with spaces to a multiple of eight. The same input gives the
/// same bytes.
///
/// # Errors
/// When a tensor is neither f32, f16 nor bf16.
pub fn to_safetensors(
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, Error> {
    let mut order = Vec::new();
    for (name, tensor) in tensors {
        let (rank, tag, size) = match tensor.kind() {
            Kind::Float => (0, "F32", 4),
            Kind::BFloat16 => (1, "BF16", 2),
            Kind::Half => (2, "F16", 2),
            other => {
                return Err(Error::Format {
                    tensor: name.clone(),
                    kind: format!("{other:?}"),
                });
            }
        };
        order.push((rank, name, tag, size, tensor));
    }
    order.sort_by_key(|(rank, name, ..)| (*rank, *name));
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), serde_json::json!(metadata));
    }
    let mut end = 0;
    for (_, name, tag, size, tensor) in &order {
        let begin = end;
        end += tensor.numel() * size;
        let entry =
            serde_json::json!({"dtype": tag, "shape": tensor.size(), "data_offsets": [begin, end]});
        header.insert((*name).clone(), entry);
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.reserve_exact(header.len() + end);
    bytes.extend(header);
    for (_, _, _, size, tensor) in order {
        append(&mut bytes, tensor, size);
    }
    Ok(bytes)
}

/// Appends the elements of `tensor` in row order.
fn append(bytes: &mut Vec<u8>, tensor: &Tensor, element_bytes: usize) {
    let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
    let start = bytes.len();
    let elements = tensor.numel();
    bytes.resize(start + elements * element_bytes, 0);
    tensor.copy_data_u8(&mut bytes[start..], elements);
}
