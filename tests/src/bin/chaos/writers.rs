//! Writers that are killed: what they were told is stored must be there, and what is newest must be whole.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::checkpoint::{self, Checkpoint};
use distillery_common::commit::TaskCommit;
use distillery_common::seed::Stream;
use distillery_common::storage::layout;
use distillery_common::storage::{Store, verify};
use distillery_coordinator::journal;
use distillery_coordinator::scheduler::Record;

use super::{Context, Score, interrupted};

/// Kills in one folder, whose objects all stay: what an earlier life wrote must still be there.
const PER_FOLDER: u64 = 10;
/// Longest that a writer lives.
const LIFE_MS: u32 = 60;

/// SIGKILL of a writer, in memory and on disk in turn.
pub(crate) fn kills(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let mut acknowledged = 0;
    let mut number = 0;
    while !context.is_over(score.faults) {
        let disk = std::env::temp_dir();
        let base = if number % 2 == 0 {
            &context.base
        } else {
            &disk
        };
        let folder = tempfile::Builder::new().prefix("chaos-").tempdir_in(base)?;
        let mut stream = context.stream(number);
        number += 1;
        score.runs += 1;
        let mut all = Vec::new();
        for _ in 0..PER_FOLDER.min(context.number - score.faults) {
            let said = kill_one(folder.path(), &mut stream)?;
            score.faults += 1;
            acknowledged += said.len();
            all.extend(said);
            if interrupted() {
                return Ok(());
            }
            if let Err(error) = runtime.block_on(check(folder.path(), &all)) {
                score.violated(format!("{error:#}"));
            }
        }
    }
    score.note(format!("{acknowledged} acknowledged writes"));
    Ok(())
}

/// One life; gives what was acknowledged.
fn kill_one(folder: &Path, stream: &mut Stream) -> anyhow::Result<Vec<String>> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("writer")
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = child.stdout.take().context("its output is a pipe")?;
    let reader = std::thread::spawn(move || {
        let lines = BufReader::new(out).lines();
        lines.map_while(Result::ok).collect::<Vec<_>>()
    });
    let wait = 5_000 + u64::from(stream.below(LIFE_MS * 1000));
    std::thread::sleep(Duration::from_micros(wait));
    child.kill()?;
    let status = child.wait()?;
    anyhow::ensure!(
        status.code().is_none(),
        "a writer ended by itself with {status}"
    );
    reader.join().ok().context("the reader of a pipe panicked")
}

/// Everything acknowledged is there and whole, and so is whatever counts as newest.
async fn check(folder: &Path, acknowledged: &[String]) -> anyhow::Result<()> {
    if !folder.join("journal").is_dir() && acknowledged.is_empty() {
        return Ok(());
    }
    let store = Store::open(&folder.display().to_string())?;
    let folded = journal::read(&store).await.context("the journal")?;
    let records = journal::records(&store).await.context("the journal")?;
    for line in acknowledged {
        let (kind, what) = line.split_once(' ').context("a line of a writer")?;
        match kind {
            "term" => {
                let term: u64 = what.parse()?;
                anyhow::ensure!(
                    folded.durable.term.0 >= term,
                    "the claim of term {term} is lost"
                );
            }
            "record" => {
                let record = Record::StageStarted { stage: what.into() };
                let kept = records.contains(&record);
                anyhow::ensure!(kept, "the record {what} is lost");
            }
            "commit" => check_commit(&store, what).await.context("a COMMIT")?,
            "checkpoint" => {
                let checkpoint = Checkpoint::open(&store, what).await;
                checkpoint.with_context(|| format!("{what} is lost"))?;
            }
            other => anyhow::bail!("a writer said {other}"),
        }
    }
    check_heads(&store).await
}

/// Whatever has a COMMIT is whole, whether or not anybody heard of it.
async fn check_heads(store: &Store) -> anyhow::Result<()> {
    let newest = checkpoint::folders(store, "w").await?;
    for folder in newest
        .iter()
        .filter(|folder| folder.committed)
        .rev()
        .take(3)
    {
        let key = layout::commit(&layout::checkpoint("w", folder.step, folder.generation));
        let opened = Checkpoint::open(store, key.as_str()).await?;
        opened
            .load()
            .await
            .with_context(|| format!("{key} is no whole head"))?;
    }
    let dataset = layout::dataset(&super::writer::dataset().short());
    let entries = store.list(&dataset).await?;
    let commits = entries
        .iter()
        .filter(|e| e.key.as_str().ends_with("/COMMIT"));
    for entry in commits.rev().take(3) {
        check_commit(store, entry.key.as_str()).await?;
    }
    Ok(())
}

async fn check_commit(store: &Store, key: &str) -> anyhow::Result<()> {
    let key = layout::parse_commit(key)?;
    let index = layout::parse_task_commit(&key).context("a task's COMMIT")?;
    let folder = layout::shard(&layout::dataset(&super::writer::dataset().short()), index);
    let bytes = store.find(&key).await?;
    let bytes = bytes.with_context(|| format!("{key} is lost"))?;
    let commit = TaskCommit::from_bytes(&folder, &bytes)?;
    for file in &commit.files {
        verify(store, file).await?;
    }
    Ok(())
}
