//! The header of a safetensors file, read and checked without touching the tensors.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::Error;

/// Largest header that is read; SDXL's has 200 KiB.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// Number formats a safetensors file may hold and we can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// 64-bit integers, which no weight of ours has.
    I64,
}

impl StoredDtype {
    /// Bytes of an element.
    pub fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I64 => 8,
        }
    }

    fn parse(tag: &str) -> Option<Self> {
        match tag {
            "F32" => Some(Self::F32),
            "F16" => Some(Self::F16),
            "BF16" => Some(Self::Bf16),
            "I64" => Some(Self::I64),
            _ => None,
        }
    }
}

/// Where a tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its number format.
    pub dtype: StoredDtype,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its first byte, counted from the start of the file.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Reads the header of `path`: every tensor by name. The tensors must fill the file without hole or overlap.
///
/// # Errors
/// When the file is cut short, the header absurd, or a tensor's format, shape or place wrong.
pub fn read_header(path: &Path) -> Result<BTreeMap<String, Entry>, Error> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    let file_bytes = metadata.len();
    if file_bytes < 8 {
        return Err(Error::file(
            path,
            format!("has {file_bytes} bytes and is no safetensors file"),
        ));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES {
        let problem = format!(
            "claims a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read, the file is damaged or no safetensors file"
        );
        return Err(Error::file(path, problem));
    }
    if header_bytes + 8 > file_bytes {
        return Err(Error::file(
            path,
            format!("is cut short: its header has {header_bytes} bytes, the file {file_bytes}"),
        ));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(&mut header).map_err(io)?;
    let header: Map<String, Value> =
        serde_json::from_slice(&header).map_err(|source| Error::Json {
            path: path.to_owned(),
            source,
        })?;
    entries(path, &header, 8 + header_bytes, file_bytes)
}

fn entries(
    path: &Path,
    header: &Map<String, Value>,
    start: u64,
    end: u64,
) -> Result<BTreeMap<String, Entry>, Error> {
    let mut entries = BTreeMap::new();
    for (name, value) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let entry = parse(value, start).map_err(|problem| Error::tensor(path, name, problem))?;
        entries.insert(name.clone(), entry);
    }
    let mut order: Vec<_> = entries.iter().collect();
    order.sort_by_key(|(_, entry)| (entry.offset, entry.bytes));
    let mut reached = start;
    for (name, entry) in order {
        if entry.offset != reached {
            return Err(Error::tensor(
                path,
                name,
                format!(
                    "starts at byte {}, where byte {reached} was due",
                    entry.offset
                ),
            ));
        }
        reached += entry.bytes;
        if reached > end {
            return Err(Error::tensor(
                path,
                name,
                format!("ends at byte {reached}, but the file has only {end}; it is cut short"),
            ));
        }
    }
    if reached != end {
        return Err(Error::file(
            path,
            format!("has {end} bytes, but its tensors end at byte {reached}"),
        ));
    }
    Ok(entries)
}

fn parse(value: &Value, start: u64) -> Result<Entry, String> {
    let tag = value
        .get("dtype")
        .and_then(Value::as_str)
        .ok_or("has no dtype")?;
    let dtype = StoredDtype::parse(tag)
        .ok_or_else(|| format!("has dtype {tag}; supported: F32, F16, BF16"))?;
    let shape: Vec<i64> = value
        .get("shape")
        .and_then(Value::as_array)
        .and_then(|shape| shape.iter().map(Value::as_i64).collect())
        .ok_or("has no shape of whole numbers")?;
    let elements = shape.iter().try_fold(1u64, |product, &side| {
        product.checked_mul(u64::try_from(side).ok()?)
    });
    let bytes = elements
        .and_then(|elements| elements.checked_mul(dtype.size()))
        .ok_or_else(|| format!("has the absurd shape {shape:?}"))?;
    let offsets: Option<Vec<u64>> = value
        .get("data_offsets")
        .and_then(Value::as_array)
        .and_then(|offsets| offsets.iter().map(Value::as_u64).collect());
    let Some([begin, end]) = offsets.as_deref() else {
        return Err("has no pair of data offsets".into());
    };
    if end.checked_sub(*begin) != Some(bytes) {
        return Err(format!(
            "of shape {shape:?} and dtype {tag} needs {bytes} bytes, its offsets are {begin} and {end}"
        ));
    }
    let offset = start.checked_add(*begin).ok_or("has an absurd offset")?;
    offset.checked_add(bytes).ok_or("has an absurd offset")?;
    Ok(Entry {
        dtype,
        shape,
        offset,
        bytes,
    })
}
