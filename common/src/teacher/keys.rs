//! Reading configuration values by key, with complaints that name the file and the key.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::Error;

/// Largest configuration or tokenizer file that is read.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Largest width, count or side a configuration may name; keeps every product within an i64.
const MAX_DIMENSION: i64 = 1 << 20;

/// Most layers of a block of the denoiser or the autoencoder; SDXL's have 3.
pub(super) const MAX_LAYERS: i64 = 16;

/// Most layers of a transformer within a block; SDXL's deepest has 10.
pub(super) const MAX_DEPTH: i64 = 32;

/// Most layers of a text encoder; SDXL's larger one has 32.
pub(super) const MAX_TEXT_LAYERS: i64 = 128;

/// The bytes of a configuration or tokenizer file.
pub(super) fn read_bytes(path: &Path) -> Result<Vec<u8>, Error> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    if metadata.len() > MAX_JSON_BYTES {
        return Err(Error::file(
            path,
            format!("has {} bytes, too many for a configuration", metadata.len()),
        ));
    }
    std::fs::read(path).map_err(io)
}

/// A JSON object and the file it came from.
#[derive(Debug)]
pub(super) struct Keys {
    pub(super) path: PathBuf,
    map: Map<String, Value>,
}

impl Keys {
    /// Reads the JSON object in `path`.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let bytes = read_bytes(path)?;
        let value = serde_json::from_slice(&bytes).map_err(|source| Error::Json {
            path: path.to_owned(),
            source,
        })?;
        match value {
            Value::Object(map) => Ok(Self {
                path: path.to_owned(),
                map,
            }),
            _ => Err(Error::file(path, "must hold a JSON object")),
        }
    }

    pub(super) fn wrong(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::key(&self.path, key, problem)
    }

    /// All keys with their values.
    pub(super) fn map(&self) -> &Map<String, Value> {
        &self.map
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// The value, where `null` counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// A count, width or side: a whole number from 1.
    pub(super) fn dimension(&self, key: &str, default: i64) -> Result<i64, Error> {
        Ok(self.optional_dimension(key)?.unwrap_or(default))
    }

    pub(super) fn required_dimension(&self, key: &str) -> Result<i64, Error> {
        self.optional_dimension(key)?
            .ok_or_else(|| self.wrong(key, "is missing"))
    }

    pub(super) fn optional_dimension(&self, key: &str) -> Result<Option<i64>, Error> {
        self.get(key)
            .map(|value| self.as_dimension(key, value))
            .transpose()
    }

    /// A list of dimensions; a single number stands for `len` equal ones.
    pub(super) fn dimensions(
        &self,
        key: &str,
        default: i64,
        len: usize,
    ) -> Result<Vec<i64>, Error> {
        let list = match self.get(key) {
            None => return Ok(vec![default; len]),
            Some(Value::Array(list)) => list,
            Some(value) => return Ok(vec![self.as_dimension(key, value)?; len]),
        };
        if list.len() != len {
            return Err(self.wrong(key, format!("has {} entries instead of {len}", list.len())));
        }
        list.iter()
            .map(|value| self.as_dimension(key, value))
            .collect()
    }

    pub(super) fn required_dimension_list(&self, key: &str) -> Result<Vec<i64>, Error> {
        match self.get(key) {
            Some(Value::Array(list)) if !list.is_empty() && list.len() <= 16 => list
                .iter()
                .map(|value| self.as_dimension(key, value))
                .collect(),
            Some(_) => Err(self.wrong(key, "must be a list of 1 to 16 whole numbers")),
            None => Err(self.wrong(key, "is missing")),
        }
    }

    /// A number of layers. Each has tensors of its own, whose names are made before any is looked for, so that a few digits
    /// must not ask for many of them.
    pub(super) fn layers(&self, key: &str, default: i64, most: i64) -> Result<i64, Error> {
        let layers = self.dimension(key, default)?;
        self.at_most(key, layers, most)
    }

    /// Numbers of layers; see [`Self::layers`] and [`Self::dimensions`].
    pub(super) fn layer_list(
        &self,
        key: &str,
        default: i64,
        most: i64,
        len: usize,
    ) -> Result<Vec<i64>, Error> {
        let list = self.dimensions(key, default, len)?.into_iter();
        list.map(|layers| self.at_most(key, layers, most)).collect()
    }

    fn at_most(&self, key: &str, layers: i64, most: i64) -> Result<i64, Error> {
        match layers <= most {
            true => Ok(layers),
            false => Err(self.wrong(key, format!("is {layers}; at most {most} layers are read"))),
        }
    }

    fn as_dimension(&self, key: &str, value: &Value) -> Result<i64, Error> {
        value
            .as_i64()
            .filter(|number| (1..=MAX_DIMENSION).contains(number))
            .ok_or_else(|| {
                self.wrong(
                    key,
                    format!("must be a whole number from 1 to {MAX_DIMENSION}, not {value}"),
                )
            })
    }

    pub(super) fn integer(&self, key: &str, default: i64) -> Result<i64, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_i64()
                .filter(|number| number.abs() <= MAX_DIMENSION)
                .ok_or_else(|| self.wrong(key, format!("must be a whole number, not {value}"))),
        }
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|number| number.is_finite())
                .ok_or_else(|| self.wrong(key, format!("must be a number, not {value}"))),
        }
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let list = value.as_array().filter(|list| list.len() <= 100_000);
        list.and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<_>>>())
            .map(Some)
            .ok_or_else(|| self.wrong(key, "must be a list of numbers"))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.wrong(key, format!("must be true or false, not {value}"))),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.wrong(key, format!("must be a text, not {value}"))),
        }
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_str).collect())
            .map(Some)
            .ok_or_else(|| self.wrong(key, "must be a list of texts"))
    }

    /// Complains unless `key` is absent or has one of the values that our networks compute.
    pub(super) fn only(&self, key: &str, supported: &[Value]) -> Result<(), Error> {
        let Some(value) = self.get(key) else {
            return Ok(());
        };
        let same = |wanted: &Value| match (wanted.as_f64(), value.as_f64()) {
            (Some(wanted), Some(value)) => wanted == value,
            _ => wanted == value,
        };
        if supported.iter().any(same) {
            return Ok(());
        }
        let supported: Vec<_> = supported.iter().map(Value::to_string).collect();
        Err(self.wrong(
            key,
            format!("is {value}; supported: {}", supported.join(" or ")),
        ))
    }

    /// Complains unless the component is of class `name`, where the file says one.
    pub(super) fn class(&self, name: &str) -> Result<(), Error> {
        self.only("_class_name", &[name.into()])
    }
}
