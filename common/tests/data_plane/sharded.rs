//! A state that several ranks write comes back whole, for any number of readers.

use std::collections::BTreeMap;

use bytes::Bytes;
use distillery_common::checkpoint::{
    self, Checkpoint, Dtype, Kind, Manifest, Part, Share, StateSource, TensorSpec, merge,
    write_metrics, write_share,
};
use distillery_common::ids::{Digest, Generation};
use distillery_common::storage::layout;
use distillery_common::storage::{Created, Store};

use crate::fixture::{self, training, value};

/// Tensors of very different sizes, in no order, one of more than a chunk and one without a number.
struct State;

const SHAPES: [(Kind, &str, Dtype, &[u64]); 9] = [
    (Kind::AdamV, "b", Dtype::F32, &[2_000_000]),
    (Kind::Student, "b", Dtype::F32, &[700]),
    (Kind::Student, "a", Dtype::Bf16, &[3, 5, 7]),
    (Kind::Student, "large", Dtype::F32, &[4_400, 1_001]),
    (Kind::AdamM, "b", Dtype::F32, &[2_000_000]),
    (Kind::Student, "c", Dtype::I64, &[11]),
    (Kind::Student, "none", Dtype::F32, &[0, 4]),
    (Kind::Ema, "b", Dtype::F32, &[2_000_000]),
    (Kind::Ema, "scalar", Dtype::F32, &[]),
];

impl StateSource for State {
    fn tensors(&self) -> Vec<TensorSpec> {
        let spec = |(kind, name, dtype, shape): (Kind, &str, Dtype, &[u64])| TensorSpec {
            kind,
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        };
        SHAPES.map(spec).to_vec()
    }

    fn copy(&self, index: usize, start: usize, out: &mut [u8]) {
        out.copy_from_slice(&whole(index)[start..start + out.len()]);
    }
}

/// The bytes of tensor `index`.
fn whole(index: usize) -> Vec<u8> {
    let bytes = State.tensors()[index].bytes().expect("it fits");
    value(bytes as usize, index as u64, 0, 9)
}

/// Every tensor of the state by kind and name.
fn expected() -> BTreeMap<(Kind, String), Vec<u8>> {
    let tensors = State.tensors().into_iter().enumerate();
    tensors
        .map(|(index, spec)| ((spec.kind, spec.name), whole(index)))
        .collect()
}

fn bare() -> Manifest {
    Manifest {
        stage: "seg4".into(),
        step: 250,
        generation: Generation(3),
        training: training(),
        files: Vec::new(),
        tensors: Vec::new(),
    }
}

/// What each of `world` ranks tells of the part that it has written.
async fn parts(store: &Store, world: u32) -> Vec<Vec<u8>> {
    let mut told = Vec::new();
    for rank in 0..world {
        let part = write_share(store, &bare().folder(), &State, Share { rank, world }).await;
        told.push(part.expect("it is written").to_bytes());
    }
    let longest = told.iter().map(Vec::len).max().unwrap_or(0);
    for bytes in &mut told {
        let part = Part::from_bytes(&bare().folder(), bytes).expect("its own words");
        *bytes = part.to_padded_bytes(longest);
        assert_eq!(bytes.len(), longest);
    }
    told
}

/// A committed checkpoint that `world` ranks wrote.
async fn commit(store: &Store, world: u32) -> Manifest {
    let told = parts(store, world).await;
    let parts = told
        .iter()
        .map(|bytes| Part::from_bytes(&bare().folder(), bytes).expect("its own words"));
    let metrics = write_metrics(store, &bare().folder(), Bytes::from_static(b"{}\n")).await;
    let metrics = metrics.expect("it is written");
    let manifest = merge(bare(), parts.collect(), metrics, &State.tensors()).expect("all is there");
    let created = store
        .create(&manifest.commit_key(), manifest.to_bytes())
        .await;
    assert_eq!(created.expect("an answer"), Created::Won);
    manifest
}

#[tokio::test]
async fn what_four_ranks_saved_is_read_by_any_number() {
    let store = Store::in_memory();
    let made = commit(&store, 4).await;
    let opened = Checkpoint::open(&store, made.commit_key().as_str()).await;
    let opened = opened.expect("it is committed");
    opened.verify().await.expect("it is whole");
    let order: Vec<TensorSpec> = made.tensors.iter().map(|t| t.spec.clone()).collect();
    for world in [1, 2, 3] {
        let mut found = BTreeMap::new();
        for rank in 0..world {
            let own = Share { rank, world }.of(&order);
            let read = opened.read(
                |spec| own.iter().any(|&at| order[at] == *spec),
                |spec, bytes| {
                    let twice = found.insert((spec.kind, spec.name.clone()), bytes.to_vec());
                    assert_eq!(twice, None);
                    Ok::<_, checkpoint::Error>(())
                },
            );
            read.await.expect("it is whole");
        }
        assert!(found == expected(), "read by {world}");
    }
    assert_eq!(opened.metrics().await.expect("it is there"), "{}\n");
}

#[tokio::test]
async fn the_number_of_writers_changes_the_files_and_nothing_else() {
    let described = |manifest: &Manifest| -> Vec<_> {
        let tensors = manifest.tensors.iter();
        tensors.map(|t| (t.spec.clone(), t.len, t.xxh3)).collect()
    };
    let alone = commit(&Store::in_memory(), 1).await;
    assert_eq!(alone.files.len(), 2);
    for world in [2, 3, 4, 20] {
        let together = commit(&Store::in_memory(), world).await;
        assert_eq!(described(&together), described(&alone));
        assert!(together.files.len() > alone.files.len());
        let keys: std::collections::BTreeSet<_> = together.files.iter().map(|f| &f.key).collect();
        assert_eq!(keys.len(), together.files.len());
    }
}

/// The file of the fixture's checkpoint, put together by hand (safetensors header and bytes) outside this program.
const BY_HAND: (u64, &str) = (
    486,
    "2c9de0d06676e6f6135c9e5b71a73a4d0237a9fa1284ff60fca37e14fb71008f",
);

#[tokio::test]
async fn one_writer_writes_what_it_always_wrote() {
    let store = Store::in_memory();
    let manifest = fixture::commit_checkpoint(&store, 250, 3).await;
    let file = &manifest.files[0];
    assert_eq!(file.key, layout::checkpoint_part(&manifest.folder(), 0));
    assert_eq!((file.len, &*file.sha256.to_string()), BY_HAND);
    let stored = store.get(&file.key).await.expect("it is there");
    assert_eq!(file.sha256, Digest::of(&stored));
}

#[tokio::test]
async fn a_part_that_is_missing_or_comes_twice_makes_no_manifest() {
    let store = Store::in_memory();
    let folder = bare().folder();
    let told = parts(&store, 3).await;
    let metrics = write_metrics(&store, &folder, Bytes::from_static(b"{}\n")).await;
    let metrics = metrics.expect("it is written");
    for ranks in [&[0, 1][..], &[0, 2, 2], &[0, 1, 2, 0], &[]] {
        let parts = ranks
            .iter()
            .map(|&rank: &usize| Part::from_bytes(&folder, &told[rank]).expect("its own words"));
        let merged = merge(bare(), parts.collect(), metrics.clone(), &State.tensors());
        let error = merged.expect_err("not the state").to_string();
        assert!(error.contains("each once"), "{error}");
    }
}

#[tokio::test]
async fn a_part_names_files_of_its_checkpoint_and_tensors_within_them() {
    let store = Store::in_memory();
    let told = String::from_utf8(parts(&store, 2).await.remove(0)).expect("JSON");
    let elsewhere = layout::checkpoint("seg2", 250, Generation(3));
    let error = Part::from_bytes(&elsewhere, told.as_bytes()).expect_err("foreign files");
    assert!(error.to_string().contains("seg4"), "{error}");
    for (from, to) in [
        ("\"file\":0", "\"file\":7"),
        ("\"offset\":", "\"offset\":99999999"),
    ] {
        let changed = told.replacen(from, to, 1);
        assert_ne!(changed, told);
        Part::from_bytes(&bare().folder(), changed.as_bytes()).expect_err("it cannot be true");
    }
}
