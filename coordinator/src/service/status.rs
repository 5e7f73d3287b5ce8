//! The answer to whoever asks how a run is, in wire types.

use distillery_common::proto::{to_wire, wire};

use super::Identity;
use crate::driver::Snapshot;
use crate::scheduler::{StageView, WorkerView};

/// What `status`, `workers` and an attaching `run` are told.
pub(super) fn status_reply(identity: &Identity, snapshot: &Snapshot) -> wire::StatusReply {
    wire::StatusReply {
        run_id: identity.run_id.clone(),
        run_uri: identity.run_uri.clone(),
        name: identity.name.clone(),
        term: snapshot.view.term.0,
        state: snapshot.view.state.clone(),
        stages: snapshot.view.stages.iter().map(stage_status).collect(),
        workers: snapshot.view.workers.iter().map(worker_status).collect(),
        decisions: snapshot.decisions.clone(),
        failures: snapshot
            .failures
            .iter()
            .map(|failure| wire::FailureReport {
                worker: failure.worker.clone(),
                what: failure.what.clone(),
                message: failure.message.clone(),
                output: failure.output.clone(),
                ago_ms: snapshot.elapsed.saturating_sub(failure.at).as_millis() as u64,
            })
            .collect(),
        note: snapshot.view.note.clone().unwrap_or_default(),
        elapsed_ms: snapshot.elapsed.as_millis() as u64,
    }
}

fn stage_status(stage: &StageView) -> wire::StageStatus {
    wire::StageStatus {
        name: stage.name.clone(),
        kind: stage.kind.as_str().into(),
        state: stage.state.into(),
        done: stage.done,
        total: stage.total,
        group: stage.group.as_ref().map(to_wire::group_progress),
        world: stage.world,
    }
}

fn worker_status(worker: &WorkerView) -> wire::WorkerStatus {
    wire::WorkerStatus {
        name: worker.name.clone(),
        incarnation: worker.incarnation.0,
        state: worker.state.into(),
        doing: worker.doing.clone(),
        rss_bytes: worker.rss_bytes,
        silent_ms: worker.silent.as_millis() as u64,
        host: worker.host.clone(),
        device: worker.device.clone(),
        detail: worker.detail.clone(),
        age_ms: worker.age.as_millis() as u64,
    }
}
