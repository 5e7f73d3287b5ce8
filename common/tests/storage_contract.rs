//! One promise, every backend: what a run needs of a store holds in memory, on disk, on S3 and on Azure.

mod servers;

use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use distillery_common::ids::{Digest, Generation, Incarnation, Term};
use distillery_common::storage::contract::{self, Promise};
use distillery_common::storage::fault::{Fault, FaultStore, Mode};
use distillery_common::storage::layout::{self, Key, Prefix};
use distillery_common::storage::{Created, Damaged, Error, FileEntry, Store, VerifyError};
use distillery_common::storage::{get_verified, verify};
use distillery_common::task::{Lease, TaskId};
use distillery_common::telemetry;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

#[tokio::test]
async fn memory_keeps_the_contract() {
    suite(&Store::in_memory()).await;
}

#[tokio::test]
async fn a_disk_keeps_the_contract() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store =
        Store::open_or_create(&format!("file://{}/run", folder.path().display())).expect("a path");
    suite(&store).await;
}

#[test]
fn an_s3_server_keeps_the_contract() {
    let Some(program) = servers::program("DISTILLERY_MOTO") else {
        return;
    };
    let server = servers::moto(program, "contract");
    let endpoint = format!("http://127.0.0.1:{}", server.port);
    run_in_child(&[
        ("CONTRACT_URI", "s3://contract/some/run"),
        ("AWS_ENDPOINT_URL", &endpoint),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "planted-key"),
        ("AWS_SECRET_ACCESS_KEY", "planted-secret"),
    ]);
}

#[test]
fn an_azure_server_keeps_the_contract() {
    let Some(program) = servers::program("DISTILLERY_AZURITE") else {
        return;
    };
    let server = servers::azurite(program, "contract");
    let url = format!("http://127.0.0.1:{}", server.port);
    run_in_child(&[
        ("CONTRACT_URI", "az://contract/some/run"),
        ("AZURE_STORAGE_USE_EMULATOR", "true"),
        ("AZURITE_BLOB_STORAGE_URL", &url),
    ]);
}

/// Runs the suite in a process of its own, since the environment of this one is shared by all tests.
fn run_in_child(environment: &[(&str, &str)]) {
    let output = Command::new(std::env::current_exe().expect("a test has a program"))
        .args([
            "--exact",
            "the_named_store_keeps_the_contract",
            "--ignored",
            "--nocapture",
        ])
        .envs(environment.iter().copied())
        .output()
        .expect("a test can be started again");
    let said = [output.stdout, output.stderr]
        .map(|s| String::from_utf8_lossy(&s).into_owned())
        .concat();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
    assert!(
        !said.contains("planted-secret"),
        "a secret was shown: {said}"
    );
}

#[tokio::test]
#[ignore = "run by the tests of servers, which name its store"]
async fn the_named_store_keeps_the_contract() {
    let uri = std::env::var("CONTRACT_URI").expect("CONTRACT_URI names a store");
    let store = Store::open(&uri).expect("the environment has all it needs");
    println!("{store:?}");
    suite(&store).await;
}

async fn suite(store: &Store) {
    store.probe().await.expect("the store can hold a run");
    for kept in contract::check(store, telemetry::unix_seconds()).await {
        let promise = kept.promise;
        assert!(kept.result.is_ok(), "{promise}: {:?}", kept.result);
    }
    assert_eq!(store.list(&layout::probes()).await.expect("listed"), []);
    nothing_is_there(store).await;
    creation_has_one_winner(store).await;
    objects_are_read_as_written(store).await;
    listings_are_whole_and_sorted(store).await;
    uploads_have_their_digest(store).await;
    an_unfinished_upload_is_invisible(store).await;
    damage_is_found(store).await;
    faults_do_not_change_who_won(store).await;
}

fn folder(index: u64) -> Prefix {
    layout::shard(&layout::dataset("contract"), index)
}

fn lease(attempt: u32) -> Lease {
    Lease {
        term: Term(1),
        task: TaskId {
            stage: "trajectories".into(),
            index: 0,
        },
        attempt,
        incarnation: Incarnation(1),
    }
}

async fn nothing_is_there(store: &Store) {
    let key = layout::run_record();
    assert!(matches!(store.get(&key).await, Err(Error::NotFound { .. })));
    assert!(matches!(
        store.head(&key).await,
        Err(Error::NotFound { .. })
    ));
    assert_eq!(store.find(&key).await.expect("an answer"), None);
    assert_eq!(store.list(&folder(99)).await.expect("an answer"), []);
    let none = layout::dataset("none");
    assert_eq!(store.list(&none).await.expect("an answer"), []);
    store
        .delete(&key)
        .await
        .expect("what is not there is deleted");
    store.delete(&key).await.expect("twice");
}

async fn creation_has_one_winner(store: &Store) {
    for round in 0..10 {
        let key = layout::commit(&folder(1000 + round));
        let racers = (0..16u8).map(|racer| {
            let (store, key) = (store.clone(), key.clone());
            tokio::spawn(async move { store.create(&key, vec![racer; 200].into()).await })
        });
        let mut winners = Vec::new();
        let mut losers = Vec::new();
        for (racer, race) in (0u8..).zip(racers.collect::<Vec<_>>()) {
            match race.await.expect("no panic").expect("an answer") {
                Created::Won => winners.push(racer),
                Created::Exists(found) => losers.push(found),
            }
        }
        assert_eq!(winners.len(), 1, "round {round}");
        let stored = store.get(&key).await.expect("it was made");
        assert_eq!(stored, vec![winners[0]; 200]);
        assert!(losers.iter().all(|seen| *seen == stored));
        let again = store.create(&key, stored.clone()).await.expect("an answer");
        assert_eq!(again, Created::Won, "our own bytes are a win");
    }
}

async fn objects_are_read_as_written(store: &Store) {
    let key = layout::shard_rows(&folder(1), &lease(1));
    let body: Bytes = (0..100_000u32)
        .flat_map(u32::to_le_bytes)
        .collect::<Vec<_>>()
        .into();
    store.put(&key, body.clone()).await.expect("it is written");
    assert_eq!(store.get(&key).await.expect("it is there"), body);
    let head = store.head(&key).await.expect("it is there");
    assert_eq!((head.key, head.len), (key.clone(), 400_000));
    let ranges = [0..4, 399_990..400_000, 200_000..300_000, 4..4];
    let parts = store
        .get_ranges(&key, &ranges[..3])
        .await
        .expect("all lie inside");
    for (part, range) in parts.iter().zip(&ranges) {
        assert_eq!(part, &body[range.start as usize..range.end as usize]);
    }
    assert!(
        store.get_range(&key, 399_999..400_001).await.is_err(),
        "one byte too many"
    );
}

async fn listings_are_whole_and_sorted(store: &Store) {
    let dataset = layout::dataset("listing");
    let mut keys: Vec<Key> = (0..30)
        .flat_map(|i| {
            let shard = layout::shard(&dataset, i);
            [
                layout::shard_rows(&shard, &lease(2)),
                layout::commit(&shard),
            ]
        })
        .collect();
    for key in keys.iter().rev() {
        store
            .put(key, key.to_string().into())
            .await
            .expect("it is written");
    }
    keys.sort();
    let found = store.list(&dataset).await.expect("a listing");
    assert!(found.iter().map(|entry| &entry.key).eq(&keys));
    assert!(
        found
            .iter()
            .all(|entry| entry.len == entry.key.as_str().len() as u64)
    );
    assert!(found.iter().all(|entry| entry.modified > 1_600_000_000));
    store.delete(&keys[0]).await.expect("it is deleted");
    assert_eq!(store.list(&dataset).await.expect("a listing").len(), 59);
}

async fn uploads_have_their_digest(store: &Store) {
    const MIB: usize = 1 << 20;
    for (index, len) in [0, 5, 16 * MIB, 33 * MIB + 7].into_iter().enumerate() {
        let key = layout::shard_rows(&folder(20 + index as u64), &lease(1));
        let body: Bytes = (0..len)
            .map(|i| (i * 7 + i / 251) as u8)
            .collect::<Vec<_>>()
            .into();
        let mut upload = store.upload(&key);
        for start in (0..len).step_by(3 * MIB + 1) {
            let part = body.slice(start..(start + 3 * MIB + 1).min(len));
            upload.write(part).await.expect("it is written");
        }
        let entry = upload.finish().await.expect("it is written");
        assert_eq!(
            entry,
            FileEntry {
                key: key.clone(),
                len: len as u64,
                sha256: Digest::of(&body)
            }
        );
        verify(store, &entry).await.expect("it is whole");
        assert_eq!(
            get_verified(store, &entry).await.expect("it is whole"),
            body
        );
    }
}

async fn an_unfinished_upload_is_invisible(store: &Store) {
    let checkpoint = layout::checkpoint("seg8", 1, Generation(1));
    for part in 0..2 {
        let mut upload = store.upload(&layout::checkpoint_part(&checkpoint, part));
        upload
            .write(vec![1; 20 << 20].into())
            .await
            .expect("it is taken");
        if part == 0 {
            upload.abort().await.expect("it is given up");
        }
    }
    assert_eq!(store.list(&checkpoint).await.expect("a listing"), []);
}

async fn damage_is_found(store: &Store) {
    let key = layout::shard_rows(&folder(30), &lease(1));
    let entry = FileEntry::of(&key, b"whole");
    store
        .put(&key, Bytes::from_static(b"whola"))
        .await
        .expect("it is written");
    let changed = verify(store, &entry).await;
    assert!(
        matches!(changed, Err(VerifyError::Damaged(Damaged::Digest { .. }))),
        "{changed:?}"
    );
    let other = layout::shard_rows(&folder(30), &lease(2));
    store
        .put(&other, Bytes::from_static(b"whol"))
        .await
        .expect("it is written");
    let cut = get_verified(
        store,
        &FileEntry {
            key: other,
            ..entry
        },
    )
    .await;
    assert!(
        matches!(cut, Err(VerifyError::Damaged(Damaged::Length { .. }))),
        "{cut:?}"
    );
}

/// Every request of two creations fails in every way; whoever is told to have won has won, and one has.
async fn faults_do_not_change_who_won(store: &Store) {
    let mut case = 2000;
    for mode in Mode::ALL {
        for request in 0..4 {
            case += 1;
            let key = layout::commit(&folder(case));
            let mut handle = None;
            let faulty = store.wrapped(|inner| {
                let wrapped = FaultStore::new(inner, vec![Fault { request, mode }]);
                handle = Some(wrapped.clone());
                Arc::new(wrapped)
            });
            let ours = faulty
                .create(&key, Bytes::from_static(b"ours"))
                .await
                .expect("one fault is survived");
            assert_eq!(ours, Created::Won, "{mode:?} of request {request}");
            let theirs = faulty
                .create(&key, Bytes::from_static(b"theirs"))
                .await
                .expect("one fault is survived");
            assert_eq!(theirs, Created::Exists(Bytes::from_static(b"ours")));
            assert_eq!(store.get(&key).await.expect("it is there"), "ours");
            assert!(handle.expect("it was wrapped").requests() >= 3);
        }
    }
}

/// Breaks promises as real stores have been seen to.
#[derive(Debug)]
struct Unreliable {
    inner: Arc<dyn ObjectStore>,
    overwrites: bool,
    forgets: bool,
}

impl std::fmt::Display for Unreliable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Unreliable({})", self.inner)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Unreliable {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut opts: PutOptions,
    ) -> object_store::Result<PutResult> {
        if self.overwrites {
            opts.mode = PutMode::Overwrite;
        }
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(
        &self,
        location: &Path,
        options: GetOptions,
    ) -> object_store::Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let shown = if self.forgets { 5 } else { usize::MAX };
        self.inner.list(prefix).take(shown).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &Path,
        to: &Path,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[tokio::test]
async fn a_store_that_breaks_a_promise_is_found_out() {
    let broken_by = async |overwrites, forgets, skew| {
        let store = Store::in_memory().wrapped(|inner| {
            Arc::new(Unreliable {
                inner,
                overwrites,
                forgets,
            })
        });
        let kept = contract::check(&store, telemetry::unix_seconds() - skew).await;
        let broken = kept.into_iter().filter(|kept| kept.result.is_err());
        broken.map(|kept| kept.promise).collect::<Vec<_>>()
    };
    assert_eq!(broken_by(false, false, 0).await, []);
    assert_eq!(
        broken_by(true, false, 0).await,
        [Promise::RefusesSecondCreation, Promise::OneWinnerOfARace]
    );
    assert_eq!(
        broken_by(false, true, 0).await,
        [Promise::ListsAtOnce, Promise::ListsEverything]
    );
    assert_eq!(broken_by(false, false, 7200).await, [Promise::TellsTheTime]);
}
