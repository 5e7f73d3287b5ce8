//! Whatever happens to a stored byte is found before the byte is used, and nothing panics.

use std::collections::BTreeSet;

use crate::fixture::{self, commit_checkpoint, commit_shard, dataset_digest, folder, schema};
use bytes::Bytes;
use distillery_common::checkpoint::{self, Checkpoint, newest};
use distillery_common::ids::{Digest, Generation};
use distillery_common::latents::manifest::{self, DatasetManifest};
use distillery_common::latents::{Dataset, Error, Options, Staging};
use distillery_common::storage::layout::{self, Key};
use distillery_common::storage::{FileEntry, Store};

async fn dataset() -> (Store, DatasetManifest) {
    let store = Store::in_memory();
    commit_shard(&store, &schema(&[1, 2, 2]), 0, 1, 0..2, 3).await;
    let sealed = manifest::seal(&store, &folder(), dataset_digest(), 1, &BTreeSet::new()).await;
    (store, sealed.expect("it is whole").0)
}

/// Every file cut at every length, and with one bit flipped in every byte.
fn mutations(bytes: &Bytes) -> impl Iterator<Item = Bytes> {
    let cuts = (0..bytes.len()).map(|end| bytes.slice(..end));
    let flips = (0..bytes.len()).map(|at| {
        let mut copy = bytes.to_vec();
        copy[at] ^= 1 << (at % 8);
        Bytes::from(copy)
    });
    cuts.chain(flips)
}

#[tokio::test]
async fn every_damaged_byte_of_a_dataset_is_found_before_use() {
    let (store, made) = dataset().await;
    for file in [&made.shards[0].rows_file, &made.shards[0].embeddings_file] {
        let whole = store.get(&file.key).await.expect("it is there");
        for damaged in mutations(&whole) {
            store
                .put(&file.key, damaged)
                .await
                .expect("memory takes it");
            let opened = Dataset::new(store.clone(), made.clone(), Options::default())
                .open_all()
                .await;
            assert!(matches!(opened, Err(Error::Damaged(_))), "{opened:?}");
        }
        store.put(&file.key, whole).await.expect("memory takes it");
    }
    Dataset::new(store, made, Options::default())
        .open_all()
        .await
        .expect("it is whole again");
}

/// A manifest may be forged with the file. The parser then meets the bytes; it must neither panic nor give
/// values that are not in the file as its hashes say.
#[tokio::test]
async fn a_forged_digest_does_not_make_the_parser_panic() {
    let (store, mut made) = dataset().await;
    let file = made.shards[0].rows_file.clone();
    let whole = store.get(&file.key).await.expect("it is there");
    std::panic::set_hook(Box::new(|_| {}));
    let (mut refused, mut read) = (0, 0);
    for forged in mutations(&whole) {
        made.shards[0].rows_file = FileEntry::of(&file.key, &forged);
        store.put(&file.key, forged).await.expect("memory takes it");
        let dataset = Dataset::new(store.clone(), made.clone(), Options::default());
        let mut staging = Staging::default();
        match dataset.read_rows(&[0, 1, 2, 3, 4, 5], &mut staging).await {
            Ok(()) => read += 1,
            Err(_) => refused += 1,
        }
    }
    drop(std::panic::take_hook());
    assert!(
        refused > whole.len(),
        "{refused} of {} were refused, {read} read",
        2 * whole.len()
    );
}

/// After the digest was checked, a disk may still lose a bit: each row carries its own hash.
#[tokio::test]
async fn a_bit_lost_after_opening_is_found_in_its_row() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(&place.path().display().to_string()).expect("a path");
    commit_shard(&store, &schema(&[1, 2, 2]), 0, 1, 0..2, 3).await;
    let sealed = manifest::seal(&store, &folder(), dataset_digest(), 1, &BTreeSet::new()).await;
    let made = sealed.expect("it is whole").0;
    let path = store
        .local_file(&made.shards[0].rows_file.key)
        .expect("a file");
    let whole = std::fs::read(&path).expect("it is there");
    let wanted = fixture::value(8, 1, 2, 0);
    let at = whole
        .windows(8)
        .position(|window| window == wanted)
        .expect("the row lies in the file");
    let dataset = Dataset::new(store, made, Options::default());
    let mut staging = Staging::default();
    dataset
        .read_rows(&[5], &mut staging)
        .await
        .expect("it is whole");
    for bit in 0..64 {
        let mut damaged = whole.clone();
        damaged[at + bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, damaged).expect("it is written");
        let read = dataset.read_rows(&[5], &mut staging).await;
        assert!(
            matches!(
                read,
                Err(Error::DamagedRow {
                    row: 5,
                    part: "latent",
                    ..
                })
            ),
            "{read:?}"
        );
        dataset
            .read_rows(&[4], &mut staging)
            .await
            .expect("its neighbour is whole");
    }
}

#[tokio::test]
async fn a_manifest_that_cannot_be_true_is_refused_with_its_reason() {
    let (_, made) = dataset().await;
    let bytes = made.to_bytes();
    let text = String::from_utf8(bytes.to_vec()).expect("JSON is text");
    let rows_key = made.shards[0].rows_file.key.as_str();
    let other = rows_key.replace("shard-00000000", "shard-00000001");
    let length = format!("\"bytes\":{}", made.shards[0].rows_file.len);
    let digest = made.shards[0].rows_file.sha256.to_string();
    let cases = [
        ("\"format_version\":1", "\"format_version\":2", "version 2"),
        (
            "\"rows\":6,\"shards\"",
            "\"rows\":7,\"shards\"",
            "says it has 7 rows",
        ),
        (
            "\"rows\":6,\"commit\"",
            "\"rows\":18446744073709551615,\"commit\"",
            "cannot be in a file",
        ),
        (
            "\"rows\":6,\"commit\"",
            "\"rows\":0,\"commit\"",
            "cannot be in a file",
        ),
        (
            "\"end_ordinal\":2",
            "\"end_ordinal\":0",
            "cannot be in a file",
        ),
        ("rows-1;", "rows-9;", "unknown schema"),
        ("f16:1x2x2", "f16:1x2x4000000000000", "unknown schema"),
        ("f16:1x2x2", "f16:1x2x4000000", "cannot be in a file"),
        (rows_key, "/etc/passwd", "does not lie below"),
        (
            rows_key,
            "trajectories/../../etc/passwd",
            "does not lie below",
        ),
        (rows_key, "run.json", "does not lie below"),
        (rows_key, other.as_str(), "does not lie below"),
        (&length, "\"bytes\":1", "cannot be in a file"),
        (&length, "\"bytes\":-1", "not readable"),
        (&digest, "00", "64 hex digits"),
        ("{\"format", "[\"format", "not readable"),
        ("\"dataset\":\"", "\"dataset\":\"zz", "which is none"),
        ("\"index\":0", "\"index\":0,\"extra\":1", "not readable"),
    ];
    for (from, to, part) in cases {
        assert!(text.contains(from), "{from}");
        let forged = text.replacen(from, to, 1);
        let error = DatasetManifest::from_bytes(&folder(), forged.as_bytes()).expect_err(to);
        assert!(error.to_string().contains(part), "{to}: {error}");
    }
    for end in 0..bytes.len() - 1 {
        assert!(
            DatasetManifest::from_bytes(&folder(), &bytes[..end]).is_err(),
            "cut at {end}"
        );
    }
}

#[tokio::test]
async fn a_whole_file_of_another_kind_is_refused_with_its_reason() {
    let (store, made) = dataset().await;
    let key = made.shards[0].rows_file.key.clone();
    let (other_shape, _) = fixture::shard(&schema(&[1, 4, 4]), 0..2, 3);
    let (more_rows, embeddings) = fixture::shard(&schema(&[1, 2, 2]), 0..2, 4);
    let (other_trajectories, _) = fixture::shard(&schema(&[1, 2, 2]), 7..9, 3);
    let absurd_footer = [
        b"PAR1".as_slice(),
        &[0; 300],
        &u32::MAX.to_le_bytes(),
        b"PAR1",
    ]
    .concat();
    let long_footer = [
        b"PAR1".as_slice(),
        &[0; 300],
        &400u32.to_le_bytes(),
        b"PAR1",
    ]
    .concat();
    let cases: [(Bytes, &str); 8] = [
        (other_shape, "does not hold values of 8 bytes"),
        (more_rows, "8 rows, the manifest says 6"),
        (embeddings, "its columns are"),
        (other_trajectories, "holds trajectory 7"),
        (absurd_footer.into(), "too large"),
        (long_footer.into(), "larger than itself"),
        (
            Bytes::from_static(b"PK\x03\x04, a zip file and long enough"),
            "does not end like",
        ),
        (Bytes::from_static(b"tiny"), "shorter than a footer"),
    ];
    for (bytes, part) in cases {
        let mut made = made.clone();
        made.shards[0].rows_file = FileEntry::of(&key, &bytes);
        store.put(&key, bytes).await.expect("memory takes it");
        let opened = Dataset::new(store.clone(), made, Options::default())
            .open_all()
            .await;
        let error = opened.expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
        assert!(error.contains(key.as_str()), "{error}");
    }
}

fn part_key() -> Key {
    layout::checkpoint_part(&layout::checkpoint("seg4", 250, Generation(3)), 0)
}

#[tokio::test]
async fn a_checkpoint_comes_back_as_it_was_captured() {
    let store = Store::in_memory();
    let made = commit_checkpoint(&store, 250, 3).await;
    let opened = Checkpoint::open(&store, made.commit_key().as_str())
        .await
        .expect("it is there");
    assert_eq!(*opened.manifest(), made);
    let loaded = opened.load().await.expect("it is whole");
    let snapshot = checkpoint::Snapshot::capture(&fixture::State, None);
    assert_eq!(loaded.tensors.len(), 5);
    for ((spec, bytes), (own, range)) in loaded.tensors.iter().zip(snapshot.tensors()) {
        assert_eq!(spec, own);
        assert_eq!(*bytes, snapshot.bytes()[range.clone()]);
    }
    assert_eq!(loaded.metrics, "{\"step\":1}\n");
    let file = store.get(&part_key()).await.expect("it is there");
    let public = safetensors::SafeTensors::deserialize(&file).expect("every tool can read it");
    assert_eq!(
        public
            .tensor("student.conv.weight")
            .expect("it is there")
            .shape(),
        [2, 3]
    );
}

#[tokio::test]
async fn every_damaged_byte_of_a_checkpoint_is_found_before_use() {
    let store = Store::in_memory();
    let made = commit_checkpoint(&store, 250, 3).await;
    let older = commit_checkpoint(&store, 200, 3).await;
    for file in &made.files {
        let whole = store.get(&file.key).await.expect("it is there");
        for damaged in mutations(&whole) {
            store
                .put(&file.key, damaged)
                .await
                .expect("memory takes it");
            let opened = Checkpoint::open(&store, made.commit_key().as_str())
                .await
                .expect("it is there");
            let loaded = opened.load().await;
            assert!(
                matches!(loaded, Err(checkpoint::Error::Damaged(_))),
                "{loaded:?}"
            );
        }
        let found = newest(&store, "seg4", |_, _| true)
            .await
            .expect("the store answers");
        assert_eq!(
            found.expect("an older one is whole").manifest().step,
            older.step
        );
        store.put(&file.key, whole).await.expect("memory takes it");
    }
    let found = newest(&store, "seg4", |_, _| true)
        .await
        .expect("the store answers");
    assert_eq!(found.expect("it is whole again").manifest().step, 250);
}

#[tokio::test]
async fn the_newest_checkpoint_is_of_the_lineage_committed_and_whole() {
    let store = Store::in_memory();
    assert!(
        newest(&store, "seg4", |_, _| true)
            .await
            .expect("the store answers")
            .is_none()
    );
    let made = commit_checkpoint(&store, 100, 1).await;
    commit_checkpoint(&store, 150, 1).await;
    let zombie = |step, generation| step <= 100 || generation > Generation(1);
    let found = newest(&store, "seg4", zombie)
        .await
        .expect("the store answers");
    assert_eq!(found.expect("one counts").manifest().step, 100);
    let uncommitted = commit_checkpoint(&store, 300, 2).await;
    store
        .delete(&uncommitted.commit_key())
        .await
        .expect("it is deleted");
    let missing_file = commit_checkpoint(&store, 400, 2).await;
    store
        .delete(&missing_file.files[0].key)
        .await
        .expect("it is deleted");
    let found = newest(&store, "seg4", zombie)
        .await
        .expect("the store answers");
    assert_eq!(
        found.expect("one counts").manifest().commit_key(),
        made.commit_key()
    );
    let folders = checkpoint::folders(&store, "seg4")
        .await
        .expect("the store answers");
    assert_eq!(folders.len(), 4);
    for folder in folders {
        checkpoint::delete(&store, "seg4", folder)
            .await
            .expect("it is deleted");
    }
    assert_eq!(
        store
            .list(&layout::checkpoints("seg4"))
            .await
            .expect("a listing"),
        []
    );
}

#[tokio::test]
async fn a_commit_of_a_checkpoint_that_cannot_be_true_is_refused_with_its_reason() {
    let store = Store::in_memory();
    let made = commit_checkpoint(&store, 250, 3).await;
    let key = made.commit_key();
    let text = String::from_utf8(made.to_bytes().to_vec()).expect("JSON is text");
    let file = part_key();
    let cases = [
        ("\"format_version\":1", "\"format_version\":7", "version 7"),
        ("\"step\":250", "\"step\":251", "its place says step 250"),
        ("\"generation\":3", "\"generation\":4", "its place says"),
        (
            file.as_str(),
            "checkpoints/seg4/0000000200-g3/s0000.safetensors",
            "does not lie below",
        ),
        (file.as_str(), "../../etc/passwd", "does not lie below"),
        ("\"dtype\":\"BF16\"", "\"dtype\":\"F64\"", "unknown dtype"),
        (
            "\"dtype\":\"BF16\"",
            "\"dtype\":\"F32\"",
            "cannot have 10 bytes",
        ),
        ("\"shape\":[5]", "\"shape\":[6]", "cannot have 10 bytes"),
        (
            "\"shape\":[5]",
            "\"shape\":[4294967296,4294967296,4294967296]",
            "cannot have 10 bytes",
        ),
        ("\"len\":10", "\"len\":18446744073709551615", "ends beyond"),
        ("\"kind\":\"ema\"", "\"kind\":\"adam\"", "unknown kind"),
        ("\"kind\":\"adam_m\"", "\"kind\":\"adam_v\"", "twice"),
        ("\"file\":0", "\"file\":9", "not there"),
        ("\"xxh3\":\"", "\"xxh3\":\"x", "which is none"),
        ("\"seed\":42", "\"seed\":42,\"more\":1", "unknown field"),
    ];
    for (from, to, part) in cases {
        assert!(text.contains(from), "{from}");
        let forged = text.replacen(from, to, 1);
        store
            .put(&key, forged.into())
            .await
            .expect("memory takes it");
        let error = Checkpoint::open(&store, key.as_str())
            .await
            .expect_err(to)
            .to_string();
        assert!(error.contains(part), "{to}: {error}");
        assert!(error.contains(key.as_str()), "{error}");
    }
    let foreign = Checkpoint::open(&store, "checkpoints/../run.json")
        .await
        .expect_err("no key");
    assert!(
        foreign.to_string().contains("no key of a checkpoint"),
        "{foreign}"
    );
}

/// Files whose digest is right and whose content is not what the manifest says.
#[tokio::test]
async fn a_header_that_differs_from_the_manifest_is_refused_with_its_reason() {
    let store = Store::in_memory();
    let made = commit_checkpoint(&store, 250, 3).await;
    let whole = store.get(&part_key()).await.expect("it is there");
    let replaced = |from: &str, to: &str| {
        let (from, to) = (from.as_bytes(), to.as_bytes());
        assert_eq!(from.len(), to.len());
        let at = whole
            .windows(from.len())
            .position(|window| window == from)
            .expect("it is there");
        [&whole[..at], to, &whole[at + from.len()..]].concat()
    };
    let mut last_flipped = whole.to_vec();
    *last_flipped.last_mut().expect("it has bytes") ^= 1;
    let absurd = [&(1u64 << 60).to_le_bytes()[..], &whole[8..]].concat();
    let cases = [
        (
            replaced("student.conv.bias", "student.conv.bios"),
            "where student.conv.bias is expected",
        ),
        (replaced("\"BF16\"", "\"F16\" "), "is F16, expected is BF16"),
        (
            replaced("\"shape\":[2,3]", "\"shape\":[3,2]"),
            "has shape [3, 2], expected is [2, 3]",
        ),
        (last_flipped, "the hash of adam_v.conv.weight differs"),
        (absurd, "too large"),
        (whole[..4].to_vec(), "shorter than a header"),
    ];
    for (bytes, part) in cases {
        let mut forged = made.clone();
        forged.files[0].sha256 = Digest::of(&bytes);
        let short = (bytes.len() as u64) < forged.files[0].len;
        if short {
            forged.files[0].len = bytes.len() as u64;
            forged.tensors.iter_mut().for_each(|tensor| {
                tensor.offset = 0;
                tensor.len = 0;
                tensor.spec.shape = vec![0];
            });
        }
        store
            .put(&part_key(), bytes.into())
            .await
            .expect("memory takes it");
        store
            .put(&made.commit_key(), forged.to_bytes())
            .await
            .expect("memory takes it");
        let opened = Checkpoint::open(&store, made.commit_key().as_str())
            .await
            .expect("it parses");
        let error = opened.load().await.expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
        assert!(error.contains("s0000.safetensors"), "{error}");
    }
}
