//! The weight files of one component: found, their headers read, and every tensor compared with what the
//! configuration calls for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::header::{Entry, StoredDtype, read_header};
use super::keys::Keys;
use super::{Error, Shapes};

/// Most complaints of one kind in one message.
const MAX_NAMED: usize = 5;

/// Most files one index may name.
const MAX_SHARDS: usize = 1000;

/// The checked weight files of one component.
#[derive(Debug, Clone)]
pub struct Weights {
    /// The index, if any, and the weight files.
    pub files: Vec<PathBuf>,
    /// For each tensor the configuration calls for, by its present name: the file and its place in it.
    pub tensors: BTreeMap<String, (PathBuf, Entry)>,
}

impl Weights {
    /// Bytes of all tensors as stored.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|(_, entry)| entry.bytes).sum()
    }

    /// Finds `<stem>[.variant].safetensors`, or its index, in `folder` and checks it against `expected`.
    /// `rename` turns a stored name into the present one, or into none for tensors to ignore.
    pub(super) fn open(
        folder: &Path,
        stem: &str,
        variant: Option<&str>,
        expected: &Shapes,
        rename: fn(&str) -> Option<String>,
        warnings: &mut Vec<String>,
    ) -> Result<Self, Error> {
        let found = find(folder, stem, variant, warnings)?;
        let mut weights = Self {
            files: found
                .index
                .iter()
                .cloned()
                .chain(found.shards.clone())
                .collect(),
            tensors: BTreeMap::new(),
        };
        let mut unexpected = BTreeSet::new();
        for shard in &found.shards {
            for (stored, entry) in read_header(shard)? {
                found.check_place(shard, &stored)?;
                let Some(name) = rename(&stored) else {
                    continue;
                };
                let Some(shape) = expected.get(&name) else {
                    unexpected.insert(stored);
                    continue;
                };
                check(shard, &stored, &entry, shape)?;
                if weights
                    .tensors
                    .insert(name, (shard.clone(), entry))
                    .is_some()
                {
                    return Err(Error::tensor(shard, &stored, "is there twice"));
                }
            }
        }
        let missing: BTreeSet<_> = expected
            .keys()
            .filter(|name| !weights.tensors.contains_key(*name))
            .cloned()
            .collect();
        let place = found
            .shards
            .first()
            .filter(|_| found.shards.len() == 1)
            .map_or(folder, PathBuf::as_path);
        complain(place, &missing, "missing: the configuration calls for it")?;
        complain(
            place,
            &unexpected,
            "unexpected: the configuration has no place for it",
        )?;
        Ok(weights)
    }
}

fn complain(place: &Path, names: &BTreeSet<String>, problem: &str) -> Result<(), Error> {
    let Some(first) = names.first() else {
        return Ok(());
    };
    let others: Vec<_> = names
        .iter()
        .skip(1)
        .take(MAX_NAMED - 1)
        .map(String::as_str)
        .collect();
    let problem = match names.len() {
        1 => format!("is {problem}"),
        n if n <= MAX_NAMED => format!("is {problem} (as are {})", others.join(", ")),
        n => format!(
            "is {problem} (as are {} and {} more)",
            others.join(", "),
            n - MAX_NAMED
        ),
    };
    Err(Error::tensor(place, first, problem))
}

fn check(path: &Path, name: &str, entry: &Entry, shape: &[i64]) -> Result<(), Error> {
    if entry.dtype == StoredDtype::I64 {
        return Err(Error::tensor(
            path,
            name,
            "has dtype I64; supported: F32, F16, BF16",
        ));
    }
    if entry.shape != shape {
        let problem = format!(
            "has shape {:?}, but the configuration calls for {shape:?}",
            entry.shape
        );
        return Err(Error::tensor(path, name, problem));
    }
    Ok(())
}

/// What `find` found.
struct Found {
    index: Option<PathBuf>,
    map: Option<BTreeMap<String, String>>,
    shards: Vec<PathBuf>,
}

impl Found {
    /// Complains when the index puts tensor `name` elsewhere than into `shard`.
    fn check_place(&self, shard: &Path, name: &str) -> Result<(), Error> {
        let Some(map) = &self.map else { return Ok(()) };
        match map.get(name) {
            Some(file) if shard.ends_with(file) => Ok(()),
            Some(file) => Err(Error::tensor(
                shard,
                name,
                format!("is here, but the index says {file}"),
            )),
            None => Err(Error::tensor(shard, name, "is not in the index")),
        }
    }
}

fn find(
    folder: &Path,
    stem: &str,
    variant: Option<&str>,
    warnings: &mut Vec<String>,
) -> Result<Found, Error> {
    let variants = variant
        .into_iter()
        .map(|variant| format!(".{variant}"))
        .chain([String::new()]);
    for suffix in variants {
        let single = folder.join(format!("{stem}{suffix}.safetensors"));
        let index = folder.join(format!("{stem}.safetensors.index{suffix}.json"));
        let found = if single.exists() {
            Found {
                index: None,
                map: None,
                shards: vec![single],
            }
        } else if index.exists() {
            sharded(folder, index)?
        } else {
            continue;
        };
        if let (Some(variant), true) = (variant, suffix.is_empty()) {
            warnings.push(format!(
                "{}: no {variant} variant of the weights, the plain ones are used",
                folder.display()
            ));
        }
        return Ok(found);
    }
    let pickled = ["bin", "ckpt", "pt", "pth"]
        .into_iter()
        .map(|end| folder.join(format!("{stem}.{end}")));
    let pytorch = folder.join("pytorch_model.bin");
    if let Some(path) = pickled.chain([pytorch]).find(|path| path.exists()) {
        return Err(Error::file(
            &path,
            "is a pickle, which can run code; convert the weights to safetensors",
        ));
    }
    Err(Error::file(
        folder,
        format!("has no {stem}.safetensors and no index of shards"),
    ))
}

fn sharded(folder: &Path, index: PathBuf) -> Result<Found, Error> {
    let keys = Keys::read(&index)?;
    let Some(Value::Object(entries)) = keys.get("weight_map") else {
        return Err(keys.wrong("weight_map", "must be an object from tensor to file"));
    };
    let mut map = BTreeMap::new();
    for (tensor, file) in entries {
        let file = file
            .as_str()
            .filter(|file| is_plain_file_name(file))
            .ok_or_else(|| {
                Error::tensor(
                    &index,
                    tensor,
                    format!("lies in {file}, which is not the plain name of a .safetensors file"),
                )
            })?;
        map.insert(tensor.clone(), file.to_owned());
    }
    let files: BTreeSet<_> = map.values().cloned().collect();
    if files.is_empty() || files.len() > MAX_SHARDS {
        return Err(keys.wrong(
            "weight_map",
            format!("names {} files; 1 to {MAX_SHARDS} are read", files.len()),
        ));
    }
    let shards = files.iter().map(|file| folder.join(file)).collect();
    Ok(Found {
        index: Some(index),
        map: Some(map),
        shards,
    })
}

/// Whether `name` stays in its folder: no separators, no parents, no drive letters, no hidden files.
fn is_plain_file_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    name.len() <= 255
        && name.chars().all(plain)
        && !name.starts_with('.')
        && name.ends_with(".safetensors")
}

/// Names of UNet tensors are what they are.
pub(super) fn keep(name: &str) -> Option<String> {
    Some(name.to_owned())
}

/// Attention of old autoencoder files: `query`, `key`, `value`, `proj_attn`.
pub(super) fn present_vae_name(name: &str) -> Option<String> {
    let Some((before, after)) = name.split_once(".attentions.0.") else {
        return keep(name);
    };
    let Some((layer, kind)) = after.rsplit_once('.') else {
        return keep(name);
    };
    let layer = match layer {
        "query" => "to_q",
        "key" => "to_k",
        "value" => "to_v",
        "proj_attn" => "to_out.0",
        other => other,
    };
    Some(format!("{before}.attentions.0.{layer}.{kind}"))
}

/// Text encoders with or without `text_model.`; the position ids of old files hold no weight.
pub(super) fn present_text_name(name: &str) -> Option<String> {
    let name = name.strip_prefix("text_model.").unwrap_or(name);
    (name != "embeddings.position_ids").then(|| name.to_owned())
}
