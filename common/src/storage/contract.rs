//! What a run relies on in a store, promise by promise, checked by trying.
//!
//! The same checks run against every backend in the tests and against a user's bucket (`coordinator doctor`). They
//! write below one folder of their own and remove it again.

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::layout::{self, Key, Prefix};
use super::{Created, Entry, Error, Store, chain, open};

/// Creations of one object at the same moment.
const RACERS: u8 = 16;
/// Objects that are raced for.
const RACES: u32 = 8;
/// Objects of a listing: more than any store gives in one answer.
const LISTED: u32 = 1100;
/// Requests in flight.
const AT_A_TIME: usize = 64;
/// Bytes of an upload in parts: more than goes in one request.
const UPLOADED: usize = 17 << 20;
/// How far the store's clock may be from ours, in seconds.
const SKEW: i64 = 300;

/// One thing that a run relies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    /// What was written is read back, in whole and in parts.
    ReadsWhatWasWritten,
    /// An object that is there cannot be created again.
    RefusesSecondCreation,
    /// Of many creations at the same moment exactly one wins, and everybody sees its bytes.
    OneWinnerOfARace,
    /// An object is in a listing as soon as its creation was acknowledged.
    ListsAtOnce,
    /// A listing of many objects leaves none out and names none twice.
    ListsEverything,
    /// An upload in parts cannot be seen before it is finished, nor when it was given up.
    HidesUnfinishedUploads,
    /// A deleted object is gone, and deleting it again is no error.
    DeletesOnce,
    /// The store's clock is near ours, which the age of abandoned objects is measured by.
    TellsTheTime,
}

impl Promise {
    /// Every promise, in the order in which they are checked.
    pub const ALL: [Self; 8] = [
        Self::ReadsWhatWasWritten,
        Self::RefusesSecondCreation,
        Self::OneWinnerOfARace,
        Self::ListsAtOnce,
        Self::ListsEverything,
        Self::HidesUnfinishedUploads,
        Self::DeletesOnce,
        Self::TellsTheTime,
    ];

    /// What a run could not do without it.
    pub fn needed_for(self) -> &'static str {
        match self {
            Self::ReadsWhatWasWritten => "a run can keep anything at all",
            Self::RefusesSecondCreation | Self::OneWinnerOfARace => {
                "each task is committed once and two coordinators never both write (create-if-absent, as S3's If-None-Match)"
            }
            Self::ListsAtOnce => {
                "a coordinator that takes over sees every record of the one before"
            }
            Self::ListsEverything => "a restart finds all that was done",
            Self::HidesUnfinishedUploads => "half a checkpoint is never taken for a whole one",
            Self::DeletesOnce => "old checkpoints are removed",
            Self::TellsTheTime => "`gc` judges age by it",
        }
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadsWhatWasWritten => "what was written is read back",
            Self::RefusesSecondCreation => "a second creation is refused",
            Self::OneWinnerOfARace => "of 16 creations at once one wins",
            Self::ListsAtOnce => "what was created is listed at once",
            Self::ListsEverything => "a listing of 1100 objects is whole",
            Self::HidesUnfinishedUploads => "an unfinished upload is invisible",
            Self::DeletesOnce => "a deletion deletes, and can be repeated",
            Self::TellsTheTime => "the store's clock is near this host's",
        })
    }
}

/// What became of one promise.
#[derive(Debug)]
pub struct Kept {
    /// Which.
    pub promise: Promise,
    /// Nothing, or what was seen instead.
    pub result: Result<(), Broken>,
}

/// A promise that the store does not keep.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// It did something else.
    #[error("{0}")]
    Seen(String),
    /// It failed.
    #[error(transparent)]
    Failed(#[from] Error),
    /// Nothing can be written and read back.
    #[error("not tried, since nothing can be written and read back")]
    Untried,
}

/// Checks every promise; `now` is this host's time in seconds since 1970. What it wrote is removed again, so far as the
/// store lets it.
pub async fn check(store: &Store, now: i64) -> Vec<Kept> {
    let trial = Trial {
        store: store.clone(),
        folder: layout::trial(&open::nonce()),
    };
    let mut kept: Vec<Kept> = Vec::new();
    for promise in Promise::ALL {
        // A store that cannot be written at all, for want of credentials say, keeps none: each try would take as long.
        if let [Kept { result: Err(_), .. }, ..] = kept[..] {
            let result = Err(Broken::Untried);
            kept.push(Kept { promise, result });
            continue;
        }
        let result = match promise {
            Promise::ReadsWhatWasWritten => trial.reads_what_was_written().await,
            Promise::RefusesSecondCreation => trial.refuses_a_second_creation().await,
            Promise::OneWinnerOfARace => trial.races_have_one_winner().await,
            Promise::ListsAtOnce => trial.lists_at_once().await,
            Promise::ListsEverything => trial.lists_everything().await,
            Promise::HidesUnfinishedUploads => trial.hides_unfinished_uploads().await,
            Promise::DeletesOnce => trial.deletes_once().await,
            Promise::TellsTheTime => trial.tells_the_time(now).await,
        };
        kept.push(Kept { promise, result });
    }
    if let Err(error) = trial.clean_up().await {
        tracing::warn!(
            error = chain(&error),
            "what the checks wrote could not all be removed"
        );
    }
    kept
}

/// How many seconds the store's clock is ahead of this host's, which says `now`; what it wrote for that is removed again.
pub async fn skew(store: &Store, now: i64) -> Result<i64, Error> {
    let key = layout::probe(&open::nonce());
    store.put(&key, Bytes::from_static(b"time")).await?;
    let found = store.head(&key).await;
    store.delete(&key).await?;
    remove_empty(store, &layout::probes());
    Ok(found?.modified - now)
}

/// Removes a folder of a store on disk, and the folders in it, where nothing else is left of it.
fn remove_empty(store: &Store, folder: &Prefix) {
    let Some(path) = store.local_folder(folder) else {
        return;
    };
    let inner = std::fs::read_dir(&path).into_iter().flatten().flatten();
    for entry in inner {
        // One that is not empty stays, and so does what is no folder.
        let _ = std::fs::remove_dir(entry.path());
    }
    let _ = std::fs::remove_dir(&path);
}

struct Trial {
    store: Store,
    folder: Prefix,
}

impl Trial {
    fn key(&self, name: &str) -> Key {
        layout::trial_object(&self.folder, name)
    }

    async fn reads_what_was_written(&self) -> Result<(), Broken> {
        let key = self.key("read");
        let body: Bytes = (0..50_000u32).flat_map(u32::to_le_bytes).collect();
        self.store.put(&key, body.clone()).await?;
        ensure(self.store.get(&key).await? == body, || {
            "the object read back is another".into()
        })?;
        let ranges = [0..4, 100_000..150_000, 199_996..200_000];
        let parts = self.store.get_ranges(&key, &ranges).await?;
        for (part, range) in parts.iter().zip(&ranges) {
            let expected = &body[range.start as usize..range.end as usize];
            ensure(part == expected, || {
                format!("bytes {range:?} read back are others")
            })?;
        }
        let len = self.store.head(&key).await?.len;
        ensure(len == 200_000, || {
            format!("its length is said to be {len} instead of 200000")
        })
    }

    async fn refuses_a_second_creation(&self) -> Result<(), Broken> {
        let key = self.key("create");
        let first = Bytes::from_static(b"first");
        let won = self.store.create(&key, first.clone()).await?;
        ensure(won == Created::Won, || {
            "a new object is said to have been there".into()
        })?;
        let again = self
            .store
            .create(&key, Bytes::from_static(b"second"))
            .await?;
        ensure(again == Created::Exists(first.clone()), || {
            "the second creation was not refused".into()
        })?;
        ensure(self.store.get(&key).await? == first, || {
            "the second creation replaced the first".into()
        })
    }

    async fn races_have_one_winner(&self) -> Result<(), Broken> {
        for race in 0..RACES {
            let key = self.key(&format!("race-{race}"));
            let creations = (0..RACERS).map(|racer| {
                let body = Bytes::from(vec![racer; 200]);
                self.store.create(&key, body)
            });
            let results = futures::future::try_join_all(creations).await?;
            let winners: Vec<_> = (0..RACERS)
                .zip(&results)
                .filter(|(_, created)| **created == Created::Won)
                .map(|(racer, _)| racer)
                .collect();
            let [winner] = winners[..] else {
                let n = winners.len();
                return Err(Broken::Seen(format!(
                    "{n} of {RACERS} creations of one object were told to have won"
                )));
            };
            let stored = self.store.get(&key).await?;
            ensure(stored == vec![winner; 200], || {
                "the stored object is not the winner's".into()
            })?;
        }
        Ok(())
    }

    async fn lists_at_once(&self) -> Result<(), Broken> {
        let folder = layout::trial_folder(&self.folder, "at-once");
        for n in 1..=8 {
            let key = layout::trial_object(&folder, &format!("{n}"));
            self.store.create(&key, Bytes::from_static(b"x")).await?;
            let found = self.store.list(&folder).await?.len();
            ensure(found == n, || {
                format!("a listing after {n} creations shows {found}")
            })?;
        }
        Ok(())
    }

    async fn lists_everything(&self) -> Result<(), Broken> {
        let folder = layout::trial_folder(&self.folder, "many");
        let key = |n: u32| layout::trial_object(&folder, &format!("{n:06}"));
        in_parallel((0..LISTED).map(|n| {
            let key = key(n);
            async move { self.store.put(&key, Bytes::from_static(b"x")).await }
        }))
        .await?;
        let listed = self.store.list(&folder).await?;
        let distinct: BTreeSet<_> = listed.iter().map(|entry| &entry.key).collect();
        ensure(
            listed.len() == LISTED as usize && distinct.len() == listed.len(),
            || {
                format!(
                    "it shows {} objects, {} of them distinct",
                    listed.len(),
                    distinct.len()
                )
            },
        )
    }

    async fn hides_unfinished_uploads(&self) -> Result<(), Broken> {
        let folder = layout::trial_folder(&self.folder, "upload");
        let body = Bytes::from(vec![7; UPLOADED]);
        let mut given_up = self
            .store
            .upload(&layout::trial_object(&folder, "given-up"));
        given_up.write(body.clone()).await?;
        let key = layout::trial_object(&folder, "finished");
        let mut finished = self.store.upload(&key);
        finished.write(body.clone()).await?;
        let early = self.store.list(&folder).await?.len();
        ensure(early == 0, || {
            format!("{early} uploads are listed before they are finished")
        })?;
        given_up.abort().await?;
        finished.finish().await?;
        let seen: Vec<Entry> = self.store.list(&folder).await?;
        let is_whole = seen.len() == 1 && seen[0].key == key && seen[0].len == UPLOADED as u64;
        ensure(is_whole, || {
            let seen: Vec<_> = seen
                .iter()
                .map(|e| format!("{} ({})", e.key, e.len))
                .collect();
            format!("after one finished upload there is {}", seen.join(", "))
        })
    }

    async fn deletes_once(&self) -> Result<(), Broken> {
        let key = self.key("delete");
        self.store.put(&key, Bytes::from_static(b"x")).await?;
        self.store.delete(&key).await?;
        self.store.delete(&key).await?;
        ensure(self.store.find(&key).await?.is_none(), || {
            "a deleted object is still there".into()
        })
    }

    async fn tells_the_time(&self, now: i64) -> Result<(), Broken> {
        let key = self.key("time");
        self.store.put(&key, Bytes::from_static(b"x")).await?;
        let skew = self.store.head(&key).await?.modified - now;
        ensure(skew.abs() <= SKEW, || {
            format!("the store's clock is {skew} s ahead of this host's")
        })
    }

    async fn clean_up(&self) -> Result<(), Error> {
        let listed = self.store.list(&self.folder).await?;
        in_parallel(
            listed
                .into_iter()
                .map(|entry| async move { self.store.delete(&entry.key).await }),
        )
        .await?;
        remove_empty(&self.store, &self.folder);
        remove_empty(&self.store, &layout::probes());
        Ok(())
    }
}

async fn in_parallel<F: Future<Output = Result<(), Error>>>(
    requests: impl Iterator<Item = F>,
) -> Result<(), Error> {
    stream::iter(requests)
        .buffer_unordered(AT_A_TIME)
        .try_collect()
        .await
}

fn ensure(holds: bool, seen: impl FnOnce() -> String) -> Result<(), Broken> {
    if holds {
        Ok(())
    } else {
        Err(Broken::Seen(seen()))
    }
}
