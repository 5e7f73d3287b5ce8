//! The objects of a run, listed once and read through `object_store` alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt as _};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// Objects read at a time.
const IN_FLIGHT: usize = 32;

/// A file as a COMMIT or manifest names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) key: String,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

impl Named {
    /// Reads `{"key", "bytes", "sha256"}`.
    pub(crate) fn read(value: &Value) -> anyhow::Result<Self> {
        let text = |name: &str| {
            let found = value[name].as_str().map(str::to_owned);
            found.with_context(|| format!("a file without {name}: {value}"))
        };
        Ok(Self {
            key: text("key")?,
            bytes: value["bytes"].as_u64().context("a file without bytes")?,
            sha256: text("sha256")?,
        })
    }

    /// Reads a list of them.
    pub(crate) fn read_all(value: &Value) -> anyhow::Result<Vec<Self>> {
        let list = value.as_array().context("no list of files")?;
        list.iter().map(Self::read).collect()
    }
}

/// Every object of a run by key, with its length.
pub(crate) struct Tree {
    store: Arc<dyn ObjectStore>,
    objects: BTreeMap<String, u64>,
}

impl Tree {
    pub(crate) async fn open(uri: &str) -> anyhow::Result<Self> {
        let store = open(uri)?;
        let objects: BTreeMap<String, u64> = store
            .list(None)
            .map_ok(|meta| (meta.location.to_string(), meta.size))
            .try_collect()
            .await?;
        Ok(Self { store, objects })
    }

    /// Keys that begin with `prefix`, with what follows it.
    pub(crate) fn below<'t>(&'t self, prefix: &'t str) -> impl Iterator<Item = (&'t str, &'t str)> {
        self.objects
            .range(prefix.to_owned()..)
            .map_while(move |(key, _)| Some((key.as_str(), key.strip_prefix(prefix)?)))
    }

    pub(crate) fn len_of(&self, key: &str) -> Option<u64> {
        self.objects.get(key).copied()
    }

    pub(crate) async fn get(&self, key: &str) -> anyhow::Result<Bytes> {
        let path = Path::parse(key)?;
        let found = self.store.get(&path).await?;
        Ok(found.bytes().await?)
    }

    /// The object as JSON, and its digest.
    pub(crate) async fn json(&self, key: &str) -> anyhow::Result<(Value, String)> {
        let bytes = self.get(key).await.with_context(|| key.to_owned())?;
        let value = serde_json::from_slice(&bytes).with_context(|| format!("{key} is no JSON"))?;
        Ok((value, sha256(&bytes)))
    }

    /// All these objects as JSON, in order; an error stands where one is none.
    pub(crate) async fn jsons(&self, keys: &[String]) -> Vec<anyhow::Result<(Value, String)>> {
        futures::stream::iter(keys)
            .map(|key| self.json(key))
            .buffered(IN_FLIGHT)
            .collect()
            .await
    }

    /// What is wrong with each of these files; `look` sees the bytes of those that are whole.
    pub(crate) async fn verify(
        &self,
        files: Vec<Named>,
        look: impl Fn(&Named, Bytes) -> Option<String>,
    ) -> Vec<Option<String>> {
        futures::stream::iter(files)
            .map(|file| async move {
                let Some(len) = self.len_of(&file.key) else {
                    return Err(format!("{} is named and not there", file.key));
                };
                if len != file.bytes {
                    let Named { key, bytes, .. } = &file;
                    return Err(format!("{key} has {len} bytes, named are {bytes}"));
                }
                let bytes = self.get(&file.key).await;
                let bytes = bytes.map_err(|error| format!("{}: {error:#}", file.key))?;
                if sha256(&bytes) != file.sha256 {
                    return Err(format!("{} has another SHA-256 than named", file.key));
                }
                Ok((file, bytes))
            })
            .buffered(IN_FLIGHT)
            .map(|found| match found {
                Ok((file, bytes)) => look(&file, bytes),
                Err(wrong) => Some(wrong),
            })
            .collect()
            .await
    }
}

/// SHA-256 in hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn open(uri: &str) -> anyhow::Result<Arc<dyn ObjectStore>> {
    let folder = match uri.strip_prefix("file://") {
        Some(path) => path,
        None if uri.contains("://") => return open_cloud(uri),
        None => uri,
    };
    let folder = std::fs::canonicalize(folder)?;
    Ok(Arc::new(LocalFileSystem::new_with_prefix(folder)?))
}

fn open_cloud(uri: &str) -> anyhow::Result<Arc<dyn ObjectStore>> {
    // Which cryptography TLS uses is the process's choice; a failure means that it has been made.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let url = url::Url::parse(uri)?;
    let options = std::env::vars().map(|(name, value)| (name.to_ascii_lowercase(), value));
    let (store, path) = object_store::parse_url_opts(&url, options)?;
    Ok(Arc::new(PrefixStore::new(store, path)))
}
