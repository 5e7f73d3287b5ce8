//! Uploads a snapshot as safetensors files and tells what the COMMIT must say.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::manifest::{Manifest, StoredTensor, Training};
use super::{Error, Snapshot, TensorSpec, header};
use crate::ids::Generation;
use crate::storage::{FileEntry, Store, layout};

/// Tensors of one file, in bytes, at which the next file begins.
pub const PART_BYTES: usize = 256 << 20;
/// Bytes that go to an upload at a time.
const CHUNK_BYTES: usize = 16 << 20;

/// Writes every file of the checkpoint (stage, step, generation), and gives the manifest to commit.
///
/// `metrics` is the training curve so far, as JSON lines. Nothing counts before the manifest's bytes are
/// created under [`Manifest::commit_key`]. The snapshot can be taken back with [`Arc::try_unwrap`] afterwards.
pub async fn write(
    store: &Store,
    stage: &str,
    step: u64,
    generation: Generation,
    training: Training,
    snapshot: &Arc<Snapshot>,
    metrics: Bytes,
) -> Result<Manifest, Error> {
    let folder = layout::checkpoint(stage, step, generation);
    let mut files = Vec::new();
    let mut tensors = Vec::new();
    for (part, group) in (0u32..).zip(parts(snapshot.tensors())) {
        let mut upload = store.upload(&layout::checkpoint_part(&folder, part));
        let head = header::build(group);
        let offset = head.len() as u64;
        upload.write(head).await?;
        let base = group.first().map_or(0, |(_, range)| range.start);
        let end = group.last().map_or(0, |(_, range)| range.end);
        let numbers = Bytes::from_owner(Shared(snapshot.clone())).slice(base..end);
        for start in (0..numbers.len()).step_by(CHUNK_BYTES) {
            let chunk = numbers.slice(start..(start + CHUNK_BYTES).min(numbers.len()));
            upload.write(chunk).await?;
        }
        for (spec, range) in group {
            tensors.push(StoredTensor {
                spec: spec.clone(),
                file: files.len(),
                offset: offset + (range.start - base) as u64,
                len: range.len() as u64,
                xxh3: xxh3_64(&snapshot.bytes()[range.clone()]),
            });
        }
        files.push(upload.finish().await?);
    }
    let metrics_key = layout::checkpoint_metrics(&folder);
    files.push(FileEntry::of(&metrics_key, &metrics));
    store.put(&metrics_key, metrics).await?;
    Ok(Manifest {
        stage: stage.to_owned(),
        step,
        generation,
        training,
        files,
        tensors,
    })
}

/// Lends a snapshot's bytes to an upload without copying them.
struct Shared(Arc<Snapshot>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// Cuts the tensors, in order, where a file has [`PART_BYTES`]; a tensor is never cut.
fn parts(tensors: &[(TensorSpec, Range<usize>)]) -> Vec<&[(TensorSpec, Range<usize>)]> {
    let mut parts = Vec::new();
    let mut first = 0;
    for i in 1..=tensors.len() {
        let full = tensors
            .get(i)
            .is_none_or(|(_, next)| next.end - tensors[first].1.start > PART_BYTES);
        if full {
            parts.push(&tensors[first..i]);
            first = i;
        }
    }
    parts
}
