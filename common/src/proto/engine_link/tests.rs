use std::time::Duration;

use super::*;
use crate::ids::{Digest, Generation, Term};
use crate::storage::layout;
use crate::task::TaskId;

fn some_lease() -> Lease {
    Lease {
        term: Term(1),
        task: TaskId {
            stage: "trajectories".into(),
            index: 4,
        },
        attempt: 1,
        incarnation: Incarnation::new(Term(1), 1),
    }
}

/// A worker's end of the socket, and a link to it.
async fn pair() -> (UnixStream, Link, mpsc::Receiver<Command>, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("engine");
    let listener = tokio::net::UnixListener::bind(&path).expect("binds");
    let (link, commands) = Link::connect(&path).expect("connects");
    let (worker, _) = listener.accept().await.expect("accepts");
    (worker, link, commands, folder)
}

/// Lets the IO thread live on after the test: a closed socket would end the test's own process.
fn keep_open(worker: UnixStream) {
    std::mem::forget(worker);
}

#[tokio::test]
async fn commands_arrive_in_order() {
    let (mut worker, _link, commands, _folder) = pair().await;
    let start = wire::to_engine::Message::Start(to_wire::lease(&some_lease()));
    let drain = wire::to_engine::Message::Drain(wire::EngineDrain { checkpoint: true });
    for message in [start, drain] {
        let message = wire::ToEngine {
            message: Some(message),
        };
        framing::write(&mut worker, &message).await.expect("writes");
    }
    let received = tokio::task::spawn_blocking(move || {
        let wait = Duration::from_secs(20);
        [commands.recv_timeout(wait), commands.recv_timeout(wait)]
    });
    assert_eq!(
        received.await.expect("no panic"),
        [
            Ok(Command::Start(some_lease())),
            Ok(Command::Drain { checkpoint: true })
        ]
    );
    keep_open(worker);
}

#[tokio::test]
async fn a_commit_gets_its_own_answer() {
    let (mut worker, link, _commands, _folder) = pair().await;
    let request = |index: u64| CommitRequest {
        key: layout::commit(&layout::shard(&layout::dataset("d"), index)),
        body: Bytes::from(format!("body {index}")),
        what: Committed::Task(some_lease()),
        rows: index,
        bytes: 10,
    };
    let asked: Vec<_> = (0..2)
        .map(|index| {
            let (link, request) = (link.clone(), request(index));
            tokio::task::spawn_blocking(move || (index, link.commit(request)))
        })
        .collect();
    let mut commits = Vec::new();
    for _ in 0..2 {
        let message = framing::read::<_, wire::FromEngine>(&mut worker).await;
        match message.expect("whole").and_then(|message| message.message) {
            Some(wire::from_engine::Message::Commit(commit)) => commits.push(commit),
            other => panic!("{other:?} is no commit"),
        }
    }
    // Answered in the opposite order: shard 0 wins, shard 1 loses.
    for commit in commits.iter().rev() {
        use wire::commit_outcome::Outcome;
        let outcome = if commit.rows == 0 {
            Outcome::Won
        } else {
            Outcome::Lost
        };
        let message = wire::to_engine::Message::CommitOutcome(wire::CommitOutcome {
            id: commit.id,
            outcome: outcome.into(),
            message: String::new(),
        });
        let message = wire::ToEngine {
            message: Some(message),
        };
        framing::write(&mut worker, &message).await.expect("writes");
    }
    for answer in asked {
        let (index, outcome) = answer.await.expect("no panic");
        let expected = [CommitOutcome::Won, CommitOutcome::Lost];
        assert_eq!(outcome, expected[index as usize]);
    }
    keep_open(worker);
}

#[tokio::test]
async fn progress_is_left_out_when_nobody_reads_and_the_rest_is_kept() {
    let (mut worker, link, _commands, _folder) = pair().await;
    let progress = |done| Event::Progress {
        lease: some_lease(),
        done,
        total: 100_000,
    };
    for done in 0..100_000 {
        link.send(progress(done));
    }
    let failure = Failure {
        class: crate::task::FailureClass::Io,
        message: "disk".into(),
    };
    link.send(Event::TaskFailed {
        lease: some_lease(),
        failure: failure.clone(),
    });
    let mut seen = 0;
    loop {
        let message = framing::read::<_, wire::FromEngine>(&mut worker).await;
        match message.expect("whole").and_then(|message| message.message) {
            Some(wire::from_engine::Message::Progress(_)) => seen += 1,
            Some(wire::from_engine::Message::TaskFailed(failed)) => {
                assert_eq!(from_wire::failure(failed.failure), Ok(failure));
                break;
            }
            other => panic!("{other:?} was not sent"),
        }
    }
    assert!(seen < 100_000, "the queue has no bound");
    keep_open(worker);
}

#[test]
fn a_checkpoint_is_asked_for_as_it_is() {
    let checkpoint = CheckpointCommitted {
        group: GroupId {
            stage: "seg4".into(),
            generation: Generation(3),
        },
        step: 250,
        key: "checkpoints/seg4/0000000250-g3/COMMIT".into(),
        digest: Digest::of(b"body"),
        bytes: 4,
        is_final: true,
    };
    let request = CommitRequest {
        key: layout::commit(&layout::checkpoint("seg4", 250, Generation(3))),
        body: Bytes::from_static(b"body"),
        what: Committed::Checkpoint(checkpoint.clone()),
        rows: 0,
        bytes: 4,
    };
    let wire::from_engine::Message::Commit(commit) = commit_to_wire(5, request) else {
        panic!("a request becomes a commit");
    };
    assert_eq!(commit.id, 5);
    let Some(wire::commit_request::What::Checkpoint(wired)) = commit.what else {
        panic!("a checkpoint stays a checkpoint");
    };
    assert_eq!(from_wire::checkpoint_committed(wired), Ok(checkpoint));
}
