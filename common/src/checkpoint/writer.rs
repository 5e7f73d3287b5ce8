//! Uploads a state as safetensors files and tells what the COMMIT must say.
//!
//! The state is never copied whole: a file's tensors are asked for, hashed and sent [`CHUNK_BYTES`] at a time.

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use super::manifest::{Manifest, StoredTensor, Training};
use super::share::{Part, Share, merge};
use super::state::{StateSource, sorted};
use super::{Error, TensorSpec, header};
use crate::ids::Generation;
use crate::storage::layout::Prefix;
use crate::storage::{FileEntry, Store, Upload, layout};

/// Tensors of one file, in bytes, at which the next file begins.
pub const PART_BYTES: usize = 256 << 20;
/// Bytes of the state that are asked for, hashed and sent at a time.
pub const CHUNK_BYTES: usize = 16 << 20;

/// A tensor to write: its index in the source, what it is, and its bytes.
type Tensor = (usize, TensorSpec, usize);

/// Writes every file of the checkpoint (stage, step, generation), and gives the manifest to commit.
///
/// `metrics` is the training curve so far, as JSON lines. Nothing counts before the manifest's bytes are
/// created under [`Manifest::commit_key`]. `state` must not change meanwhile.
pub async fn write(
    store: &Store,
    stage: &str,
    step: u64,
    generation: Generation,
    training: Training,
    state: &(dyn StateSource + Sync),
    metrics: Bytes,
) -> Result<Manifest, Error> {
    let folder = layout::checkpoint(stage, step, generation);
    let part = write_share(store, &folder, state, Share::WHOLE).await?;
    let metrics = write_metrics(store, &folder, metrics).await?;
    let manifest = Manifest {
        stage: stage.to_owned(),
        step,
        generation,
        training,
        files: Vec::new(),
        tensors: Vec::new(),
    };
    merge(manifest, vec![part], metrics, &state.tensors())
}

/// Writes the files of one rank's share of `state` into the checkpoint `folder`. They count once the manifest that
/// [`merge`] makes of all parts is committed.
pub async fn write_share(
    store: &Store,
    folder: &Prefix,
    state: &(dyn StateSource + Sync),
    share: Share,
) -> Result<Part, Error> {
    let all = sorted(state);
    let specs: Vec<TensorSpec> = all.iter().map(|(_, spec, _)| spec.clone()).collect();
    let own = share.of(&specs).into_iter();
    let own: Vec<Tensor> = own.map(|at| all[at].clone()).collect();
    let mut part = Part::default();
    for (number, group) in (0u32..).zip(files_of(&own)) {
        let key = match share.world {
            1 => layout::checkpoint_part(folder, number),
            _ => layout::checkpoint_share(folder, share.rank, number),
        };
        let mut upload = store.upload(&key);
        let tensors = write_file(&mut upload, state, group, part.files.len()).await?;
        part.tensors.extend(tensors);
        part.files.push(upload.finish().await?);
    }
    Ok(part)
}

/// Writes the training curve so far, as JSON lines.
pub async fn write_metrics(
    store: &Store,
    folder: &Prefix,
    metrics: Bytes,
) -> Result<FileEntry, Error> {
    let key = layout::checkpoint_metrics(folder);
    let entry = FileEntry::of(&key, &metrics);
    store.put(&key, metrics).await?;
    Ok(entry)
}

/// Sends a file with the tensors `group`, number `file` of its part; gives where they lie in it.
async fn write_file(
    upload: &mut Upload,
    state: &(dyn StateSource + Sync),
    group: &[Tensor],
    file: usize,
) -> Result<Vec<StoredTensor>, Error> {
    let head = header::build(group.iter().map(|(_, spec, bytes)| (spec, *bytes)));
    let mut offset = head.len() as u64;
    upload.write(head).await?;
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    let mut tensors = Vec::with_capacity(group.len());
    for (index, spec, bytes) in group {
        let unit = spec.dtype.bytes() as usize;
        let mut hash = Xxh3::new();
        let mut done = 0;
        while done < *bytes {
            let take = ((CHUNK_BYTES - chunk.len()) / unit * unit).min(bytes - done);
            if take == 0 {
                upload.write(full(&mut chunk)).await?;
                continue;
            }
            let start = chunk.len();
            chunk.resize(start + take, 0);
            state.copy(*index, done, &mut chunk[start..]);
            hash.update(&chunk[start..]);
            done += take;
        }
        tensors.push(StoredTensor {
            spec: spec.clone(),
            file,
            offset,
            len: *bytes as u64,
            xxh3: hash.digest(),
        });
        offset += *bytes as u64;
    }
    upload.write(chunk.into()).await?;
    Ok(tensors)
}

/// The bytes of `chunk`, which begins anew.
fn full(chunk: &mut Vec<u8>) -> Bytes {
    std::mem::replace(chunk, Vec::with_capacity(CHUNK_BYTES)).into()
}

/// Cuts the tensors, in order, where a file has [`PART_BYTES`]; a tensor is never cut.
fn files_of(tensors: &[Tensor]) -> Vec<&[Tensor]> {
    let mut files = Vec::new();
    let (mut first, mut held) = (0, 0);
    for (i, (_, _, bytes)) in tensors.iter().enumerate() {
        if i > first && held + bytes > PART_BYTES {
            files.push(&tensors[first..i]);
            (first, held) = (i, 0);
        }
        held += bytes;
    }
    if first < tensors.len() {
        files.push(&tensors[first..]);
    }
    files
}
