//! One message of each kind that workers and coordinators send, as bytes.

use distillery_common::proto::wire::{self, coordinator_message, report, worker_message};
use prost::Message as _;

fn lease() -> Option<wire::Lease> {
    Some(wire::Lease {
        term: 1,
        task: Some(wire::TaskId {
            stage: "trajectories".into(),
            index: 7,
        }),
        attempt: 1,
        incarnation: 1 << 32 | 1,
    })
}

fn group() -> Option<wire::GroupId> {
    Some(wire::GroupId {
        stage: "seg4".into(),
        generation: 3,
    })
}

/// What workers report, and repeat until it is acknowledged.
fn reports() -> [report::Report; 5] {
    use report::Report;
    let failure = Some(wire::Failure {
        class: 1,
        message: "broken".into(),
    });
    [
        Report::TaskCommitted(wire::TaskCommitted {
            lease: lease(),
            commit: Some(wire::CommitSummary {
                key: "trajectories/x/COMMIT".into(),
                rows: 8,
                bytes: 1000,
                digest: vec![7; 32],
            }),
            won: true,
        }),
        Report::TaskFailed(wire::TaskFailed {
            lease: lease(),
            failure: failure.clone(),
        }),
        Report::GroupReady(wire::GroupReady {
            group: group(),
            rank: 1,
            address: "127.0.0.1:4000".into(),
        }),
        Report::Checkpoint(wire::CheckpointCommitted {
            group: group(),
            step: 40,
            key: "checkpoints/seg4/0000000040-g3/COMMIT".into(),
            digest: vec![7; 32],
            bytes: 1000,
            r#final: true,
        }),
        Report::GroupFailed(wire::GroupFailed {
            group: group(),
            rank: 1,
            failure,
        }),
    ]
}

/// What workers say.
pub(super) fn of_workers() -> Vec<Vec<u8>> {
    use worker_message::Message;
    let reports = reports().map(|report| {
        let report = Some(report);
        Message::Report(wire::Report { seq: 1, report })
    });
    let hello = Message::Hello(wire::Hello {
        protocol_version: 1,
        name: "worker".into(),
        host: "host".into(),
        leases: lease().into_iter().collect(),
        group: group(),
        ..wire::Hello::default()
    });
    let beat = Message::Beat(wire::Beat {
        seq: 9,
        tasks: vec![wire::TaskProgress {
            lease: lease(),
            done: 1,
            total: 8,
        }],
        group: Some(wire::GroupProgress {
            group: group(),
            phase: 3,
            step: 10,
            total_steps: 40,
            loss: 0.5,
            samples_per_second: 10.0,
            step_ms: 100.0,
        }),
        ..wire::Beat::default()
    });
    let goodbye = Message::Goodbye(wire::Goodbye {
        reason: "done".into(),
    });
    let mut all = vec![hello, beat, goodbye];
    all.extend(reports);
    let whole = all.into_iter().map(|message| wire::WorkerMessage {
        message: Some(message),
    });
    whole.map(|message| message.encode_to_vec()).collect()
}

/// What coordinators say.
pub(super) fn of_coordinators() -> Vec<Vec<u8>> {
    use coordinator_message::Message;
    let all = [
        Message::Grant(wire::Grant { lease: lease() }),
        Message::Revoke(wire::Revoke {
            lease: lease(),
            reason: "late".into(),
        }),
        Message::GroupJoin(wire::GroupJoin {
            group: group(),
            rank: 1,
            world: 2,
            base_step: 10,
            base_checkpoint: "checkpoints/seg4/0000000010-g1/COMMIT".into(),
            parent_checkpoint: String::new(),
            term: 1,
        }),
        Message::GroupPeers(wire::GroupPeers {
            group: group(),
            addresses: vec![b"127.0.0.1:4000".to_vec().into(); 2],
        }),
        Message::GroupAbort(wire::GroupAbort {
            group: group(),
            reason: "a member was lost".into(),
        }),
        Message::Drain(wire::Drain {
            checkpoint: true,
            reason: "asked".into(),
            returns: true,
        }),
    ];
    let whole = all.map(|message| wire::CoordinatorMessage {
        message: Some(message),
    });
    whole.iter().map(prost::Message::encode_to_vec).collect()
}

/// What engines say to their worker.
pub(super) fn of_engines() -> Vec<Vec<u8>> {
    use wire::commit_request::What;
    use wire::from_engine::Message;
    let failure = Some(wire::Failure {
        class: 1,
        message: "broken".into(),
    });
    let commit = |key: &str, what| {
        Message::Commit(wire::CommitRequest {
            id: 1,
            key: key.into(),
            body: b"{}".to_vec(),
            what: Some(what),
            rows: 8,
            bytes: 1000,
        })
    };
    let checkpoint = "checkpoints/seg4/0000000040-g3/COMMIT";
    let all = [
        Message::Ready(wire::EngineReady {
            device: "cpu".into(),
            device_name: "cpu".into(),
            libtorch_version: "2".into(),
        }),
        Message::Progress(wire::EngineProgress {
            lease: lease(),
            done: 1,
            total: 8,
        }),
        commit(
            "trajectories/x/shard-000007/a1-1/COMMIT",
            What::Task(lease().unwrap_or_default()),
        ),
        commit(
            checkpoint,
            What::Checkpoint(wire::CheckpointCommitted {
                group: group(),
                step: 40,
                key: checkpoint.into(),
                digest: vec![7; 32],
                bytes: 1000,
                r#final: true,
            }),
        ),
        Message::TaskFailed(wire::EngineTaskFailed {
            lease: lease(),
            failure: failure.clone(),
        }),
        Message::GroupReady(wire::EngineGroupReady {
            group: group(),
            rank: 1,
            address: "127.0.0.1:4000".into(),
        }),
        Message::GroupFailed(wire::EngineGroupFailed {
            group: group(),
            rank: 1,
            failure,
        }),
    ];
    all.map(|message| {
        framed(&wire::FromEngine {
            message: Some(message),
        })
    })
    .into()
}

/// What workers say to their engine.
pub(super) fn to_engines() -> Vec<Vec<u8>> {
    use wire::to_engine::Message;
    let all = [
        Message::Setup(wire::EngineSetup {
            run_uri: "file:///run".into(),
            worker: "worker".into(),
            incarnation: 1,
            group_secret: vec![7; 32],
        }),
        Message::Start(lease().unwrap_or_default()),
        Message::Join(wire::GroupJoin {
            group: group(),
            rank: 1,
            world: 2,
            base_step: 10,
            base_checkpoint: "checkpoints/seg4/0000000010-g1/COMMIT".into(),
            parent_checkpoint: String::new(),
            term: 1,
        }),
        Message::Peers(wire::GroupPeers {
            group: group(),
            addresses: vec![b"127.0.0.1:4000".to_vec().into(); 2],
        }),
        Message::Abort(wire::GroupAbort {
            group: group(),
            reason: "a member was lost".into(),
        }),
        Message::Drain(wire::EngineDrain { checkpoint: true }),
        Message::CommitOutcome(wire::CommitOutcome {
            id: 1,
            outcome: 4,
            message: "the store is away".into(),
        }),
    ];
    all.map(|message| {
        framed(&wire::ToEngine {
            message: Some(message),
        })
    })
    .into()
}

/// A message as it goes over an engine's socket, behind its length.
fn framed(message: &impl prost::Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}
