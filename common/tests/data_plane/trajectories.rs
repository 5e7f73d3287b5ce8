//! Trajectories come back as they were written, from any store, however they were cut into shards.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::fixture::{
    self, commit_shard, cond_id, dataset_digest, folder, schema, uncond_id, value,
};
use distillery_common::latents::loader::{Loader, Order, Spec};
use distillery_common::latents::schema::{Element, RowSchema, TrajectoryRow, Value};
use distillery_common::latents::{
    Dataset, Error, Options, ShardWriter, Staging, manifest, row_hash,
};
use distillery_common::storage::{Created, Store};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::reader::FileReader as _;
use parquet::file::serialized_reader::SerializedFileReader;

const NONE: BTreeSet<u64> = BTreeSet::new();

async fn sealed(
    store: &Store,
    schema: &RowSchema,
    shards: u64,
    each: u64,
) -> manifest::DatasetManifest {
    for index in 0..shards {
        let ordinals = index * each..(index + 1) * each;
        assert_eq!(
            commit_shard(store, schema, index, 1, ordinals, 9).await,
            Created::Won
        );
    }
    let sealed = manifest::seal(store, &folder(), dataset_digest(), shards, &NONE).await;
    sealed.expect("all shards are committed").0
}

/// Reads all rows backwards and compares each with what was written.
async fn check_all_rows(store: &Store, schema: &RowSchema, options: Options) {
    let manifest = sealed(store, schema, 3, 4).await;
    let dataset = Dataset::new(store.clone(), manifest, options);
    assert_eq!(dataset.rows(), 3 * 4 * 9);
    let rows: Vec<u64> = (0..dataset.rows()).rev().collect();
    let mut staging = Staging::default();
    dataset
        .read_rows(&rows, &mut staging)
        .await
        .expect("all rows are whole");
    let wide = schema.row_bytes();
    for (i, row) in rows.into_iter().enumerate() {
        let (trajectory, step) = (row / 9, (row % 9) as u16);
        assert_eq!((staging.traj_ord[i], staging.step[i]), (trajectory, step));
        assert_eq!(staging.timestep[i], 999 - 100 * i32::from(step));
        assert_eq!((staging.segment[i], staging.segments[i]), (8 - step, 9));
        assert_eq!(
            (staging.cond_id[i], staging.uncond_id[i]),
            (cond_id(trajectory), uncond_id())
        );
        let bytes = i * wide..(i + 1) * wide;
        assert!(
            staging.latent[bytes.clone()] == value(wide, trajectory, step, 0),
            "row {row}"
        );
        assert!(
            staging.eps_w[bytes] == value(wide, trajectory, step, 1),
            "row {row}"
        );
    }
    for id in [cond_id(0), cond_id(1), cond_id(2), uncond_id()] {
        let found = dataset
            .embedding(&id)
            .await
            .expect("every id has an embedding");
        assert_eq!(found.ctx, id.repeat(8)[..schema.ctx.bytes()]);
        assert_eq!(found.pooled.as_deref(), Some(&id[..6]));
    }
    assert!(matches!(
        dataset.embedding(&[7; 16]).await,
        Err(Error::NoEmbedding { .. })
    ));
    let beyond = dataset.read_rows(&[108], &mut staging).await;
    assert!(matches!(
        beyond,
        Err(Error::NoRow {
            row: 108,
            rows: 108
        })
    ));
}

#[tokio::test]
async fn small_rows_come_back_from_memory_from_ranges_and_from_disk() {
    let schema = schema(&[4, 8, 8]);
    check_all_rows(&Store::in_memory(), &schema, Options::default()).await;
    check_all_rows(&Store::in_memory(), &schema, Options { keep_bytes: 0 }).await;
    let place = tempfile::tempdir().expect("a temporary folder");
    let disk = Store::open(&place.path().display().to_string()).expect("a path");
    check_all_rows(&disk, &schema, Options::default()).await;
}

#[tokio::test]
async fn large_rows_come_back_from_ranges_and_from_disk() {
    let schema = schema(&[4, 128, 128]);
    check_all_rows(&Store::in_memory(), &schema, Options { keep_bytes: 0 }).await;
    let place = tempfile::tempdir().expect("a temporary folder");
    let disk = Store::open(&place.path().display().to_string()).expect("a path");
    check_all_rows(&disk, &schema, Options::default()).await;
}

#[tokio::test]
async fn the_shape_of_shards_does_not_change_the_rows() {
    let schema = schema(&[4, 8, 8]);
    let mut hashes = BTreeSet::new();
    for (shards, each) in [(1, 12), (3, 4), (12, 1)] {
        let store = Store::in_memory();
        let manifest = sealed(&store, &schema, shards, each).await;
        let dataset = Dataset::new(store, manifest, Options::default());
        hashes.insert(row_hash(&dataset).await.expect("all rows are whole"));
    }
    assert_eq!(hashes.len(), 1);
}

#[test]
fn two_attempts_write_equal_bytes_in_any_pieces() {
    let schema = schema(&[4, 16, 16]);
    let (rows, embeddings) = fixture::shard(&schema, 0..5, 9);
    assert_eq!((rows, embeddings), fixture::shard(&schema, 0..5, 9));
}

#[test]
fn a_row_group_holds_whole_trajectories_near_8_mib_and_parquet_can_read_it() {
    let (rows, _) = fixture::shard(&schema(&[4, 128, 128]), 0..10, 9);
    let file = SerializedFileReader::new(rows.clone()).expect("a Parquet file");
    let groups: Vec<i64> = file
        .metadata()
        .row_groups()
        .iter()
        .map(|group| group.num_rows())
        .collect();
    assert_eq!(groups, [36, 36, 18]);
    let reader = ParquetRecordBatchReaderBuilder::try_new(rows).expect("a Parquet file");
    let latent = reader
        .schema()
        .field_with_name("latent")
        .expect("a column")
        .clone();
    assert_eq!(
        latent.metadata().get("tensor.shape").map(|s| s.as_str()),
        Some("[4, 128, 128]")
    );
    let batches = reader
        .build()
        .expect("a Parquet file")
        .map(|batch| batch.expect("it decodes").num_rows());
    assert_eq!(batches.sum::<usize>(), 90);
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let schema = schema(&[1, 2, 2]);
    let good = [0u8; 8];
    let id = [0; 16];
    let row = TrajectoryRow {
        traj_id: id,
        traj_ord: 5,
        prompt_id: id,
        seed: 0,
        guidance: 1.0,
        step: 1,
        n_steps: 3,
        timestep: 0,
        segment: 0,
        segments: 1,
        mode: "alg1",
        cond_id: id,
        uncond_id: id,
        latent: &good,
        eps_w: &good,
    };
    let mut writer = ShardWriter::new(&schema, &fixture::origin()).expect("the schema is sound");
    writer.push(&row).expect("it fits");
    let mut refused = |row: TrajectoryRow<'_>, part: &str| {
        let error = writer.push(&row).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(row, "came before");
    refused(TrajectoryRow { step: 0, ..row }, "came before");
    refused(TrajectoryRow { traj_ord: 4, ..row }, "came before");
    refused(TrajectoryRow { step: 3, ..row }, "has 3 steps");
    refused(
        TrajectoryRow {
            latent: &good[1..],
            ..row
        },
        "latent has 7 bytes",
    );
    refused(TrajectoryRow { eps_w: &[], ..row }, "eps_w has 0 bytes");
}

#[tokio::test]
async fn a_seal_is_made_once_and_only_of_whole_datasets() {
    let store = Store::in_memory();
    let schema = schema(&[1, 2, 2]);
    let seal = async |count, quarantined: BTreeSet<u64>| {
        manifest::seal(&store, &folder(), dataset_digest(), count, &quarantined).await
    };
    commit_shard(&store, &schema, 0, 1, 0..4, 2).await;
    let unfinished = seal(2, NONE).await;
    assert!(
        matches!(unfinished, Err(Error::Storage(_))),
        "{unfinished:?}"
    );
    let second = commit_shard(&store, &schema, 1, 1, 4..8, 2).await;
    assert_eq!(second, Created::Won);
    let late = commit_shard(&store, &schema, 1, 2, 4..8, 2).await;
    assert!(
        matches!(late, Created::Exists(_)),
        "a second attempt cannot win"
    );
    commit_shard(&store, &schema, 2, 1, 9..12, 2).await;
    let gap = seal(3, NONE)
        .await
        .expect_err("trajectory 8 is missing")
        .to_string();
    assert!(gap.contains("expected was 8"), "{gap}");
    assert_eq!(
        manifest::find(&store, &folder()).await.expect("an answer"),
        None
    );

    let (made, bytes) = seal(2, NONE).await.expect("two shards are whole");
    assert_eq!((made.rows, made.shards.len()), (16, 2));
    assert_eq!(seal(2, NONE).await.expect("the same again").1, bytes);
    assert_eq!(
        manifest::find(&store, &folder()).await.expect("an answer"),
        Some(made)
    );
    let other = seal(3, [1].into())
        .await
        .expect_err("it is sealed")
        .to_string();
    assert!(other.contains("sealed before"), "{other}");
}

#[tokio::test]
async fn a_quarantined_shard_leaves_a_gap() {
    let store = Store::in_memory();
    let schema = schema(&[1, 2, 2]);
    for index in [0, 2] {
        commit_shard(&store, &schema, index, 1, index * 4..index * 4 + 4, 2).await;
    }
    let sealed = manifest::seal(&store, &folder(), dataset_digest(), 3, &[1].into()).await;
    let (made, _) = sealed.expect("shard 1 is set aside");
    let dataset = Dataset::new(store, made, Options::default());
    let mut staging = Staging::default();
    dataset
        .read_rows(&[7, 8], &mut staging)
        .await
        .expect("all rows are whole");
    assert_eq!(staging.traj_ord, [3, 8]);
}

#[tokio::test]
async fn the_loader_gives_every_rank_its_share_in_order() {
    let store = Store::in_memory();
    let made = sealed(&store, &schema(&[1, 2, 2]), 3, 4).await;
    let dataset = Arc::new(Dataset::new(store, made, Options::default()));
    let order = Order {
        seed: 42,
        stage: 1,
        rows: dataset.rows(),
        global_batch: 10,
        virtual_ranks: None,
    };
    for world in 1..=3 {
        let mut seen = vec![Vec::new(); 20];
        for rank in 0..world {
            let spec = Spec {
                order,
                rank,
                world,
                steps: 5..20,
                ahead: 4,
            };
            let mut loader = Loader::start(dataset.clone(), spec);
            let mut expected = 5;
            while let Some(batch) = loader.next().await.expect("all rows are whole") {
                assert_eq!(batch.step, expected);
                expected += 1;
                let rows = batch.rows();
                let found = (0..rows.len()).map(|i| rows.traj_ord[i] * 9 + u64::from(rows.step[i]));
                seen[batch.step as usize].extend(found);
            }
            assert_eq!((expected, loader.stats().batches), (20, 15));
        }
        for step in 5..20u64 {
            let expected: Vec<u64> = (step * 10..step * 10 + 10)
                .map(|p| order.row_at(p))
                .collect();
            assert_eq!(seen[step as usize], expected, "world {world}, step {step}");
        }
    }
}

#[tokio::test]
async fn a_hole_in_the_dataset_reaches_the_trainer_as_an_error() {
    let store = Store::in_memory();
    let made = sealed(&store, &schema(&[1, 2, 2]), 2, 4).await;
    store
        .delete(&made.shards[1].rows_file.key)
        .await
        .expect("it is deleted");
    let dataset = Arc::new(Dataset::new(store, made, Options::default()));
    let order = Order {
        seed: 1,
        stage: 0,
        rows: dataset.rows(),
        global_batch: 72,
        virtual_ranks: None,
    };
    let spec = Spec {
        order,
        rank: 0,
        world: 1,
        steps: 0..1,
        ahead: 1,
    };
    let failed = Loader::start(dataset, spec).next().await;
    let message = failed.expect_err("half of it is gone").to_string();
    assert!(message.contains("shard-00000001"), "{message}");
}

#[test]
fn a_value_beyond_all_bounds_has_no_schema() {
    let huge = Value::new(Element::F32, &[1 << 20, 1 << 20]);
    let id = RowSchema {
        latent: huge,
        ..schema(&[1, 2, 2])
    }
    .id();
    assert_eq!(RowSchema::parse(&id), None);
}
