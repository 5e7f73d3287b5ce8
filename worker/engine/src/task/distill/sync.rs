//! Before a group steps, all members hold one state: the newest that any of them still has in memory, copied from
//! that member over the group's own connections; from the store only when nobody has one. Where moments are shared out
//! nobody ever claims to hold a state, and each member reads its moments from the store itself.
//!
//! What is compared and copied: the flat buffers of the trainer, its position, and the curves so far. Must never
//! know how the group's members are connected.

use std::time::Duration;

use distillery_common::curves::{from_jsonl, to_jsonl};
use distillery_common::group::{self, Held, Membership};
use distillery_common::storage::layout;
use distillery_common::task::FailureClass;
use tch::Tensor;
use tokio::time::MissedTickBehavior;

use super::Broken;
use super::stage::StageWork;
use crate::collective::{self, Collective};
use crate::task::{Fault, OrFault as _};
use crate::train::snapshot::Position;
use crate::workbench::Workbench;

/// Numbers of a buffer that travel at a time: 64 MiB. A copy never needs more memory than that.
const PIECE: i64 = 16 << 20;

/// How often a rank that reads a state, or its share of one, tells the others that it still does.
const SIGN: Duration = Duration::from_secs(2);
/// Its signs: not yet, and done, or nothing to read.
const LOADING: u8 = 0;
const LOADED: u8 = 1;

/// What a rank says it holds, before anything is copied.
const HELD_BYTES: usize = 17;
/// What the source says of its state: position, and the length of its curves.
const HEADER_BYTES: usize = 40;

/// Makes the state of every member the same, and gives back whether it came from a member's memory.
pub(super) fn sync(
    bench: &Workbench,
    stage: &mut StageWork,
    membership: &Membership,
    ring: &mut dyn Collective,
) -> Result<bool, Broken> {
    let base = base(membership)?;
    let own = stage.held.filter(|held| held.continues(base));
    let held: Vec<Option<Held>> = ring
        .gather(&to_bytes(own))?
        .iter()
        .map(|bytes| from_bytes(bytes))
        .collect();
    let newest = group::source(&held);
    let root = newest.unwrap_or(0);
    if newest.is_none() {
        let is_root = membership.rank == root;
        match (is_root, stage.shares_moments()) {
            (true, _) => bench
                .io
                .wait(load(stage.load(bench, membership), SIGN, ring))?,
            (false, true) => {
                bench
                    .io
                    .wait(load(stage.load_moments(bench, membership), SIGN, ring))?
            }
            (false, false) => wait_for_load(ring)?,
        }
    }
    let wanted = newest.map(|root| held[root as usize]);
    let all_have_it = wanted.is_some_and(|wanted| held.iter().all(|one| *one == wanted));
    if !all_have_it {
        let part = match (membership.rank == root, wanted == Some(own)) {
            (true, _) => Part::Source,
            (false, true) => Part::Holder,
            (false, false) => Part::Copier,
        };
        copy(stage, root, part, ring)?;
    }
    let fingerprint = stage.trainer.fingerprint();
    ring.agree(&fingerprint)?;
    stage.hold(Held {
        step: stage.trainer.position().step,
        generation: membership.group.generation,
    });
    Ok(newest.is_some())
}

/// Reads by way of `reading`, until all who read have done so. The others hear a sign of life every `sign`: what takes long
/// to read is not what their deadline is for. When the group is given up meanwhile, so is the reading.
async fn load(
    reading: impl Future<Output = Result<(), Fault>>,
    sign: Duration,
    ring: &mut dyn Collective,
) -> Result<(), Broken> {
    tokio::pin!(reading);
    let mut signs = tokio::time::interval(sign);
    signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            read = &mut reading => {
                read?;
                return Ok(wait_for_load(ring)?);
            }
            _ = signs.tick() => {
                ring.gather(&[LOADING])?;
            }
        }
    }
}

/// Waits until all ranks that read have done so.
fn wait_for_load(ring: &mut dyn Collective) -> Result<(), collective::Error> {
    while ring.gather(&[LOADED])?.iter().any(|sign| *sign != [LOADED]) {}
    Ok(())
}

/// What a rank has to do with a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The state is its own.
    Source,
    /// It has the state already, and only passes it on.
    Holder,
    /// It lacks the state.
    Copier,
}

/// Copies the state of rank `root` to every rank that does not have it.
fn copy(
    stage: &mut StageWork,
    root: u32,
    part: Part,
    ring: &mut dyn Collective,
) -> Result<(), Broken> {
    if part == Part::Copier {
        // Half a copy is no state.
        stage.spoil();
    }
    let own_curves = to_jsonl(&stage.curves);
    let headers = ring.gather(&header(stage.trainer.position(), own_curves.len()))?;
    let (position, curves_len) = parse_header(&headers[root as usize])?;
    for (_, flat) in stage.trainer.common_state() {
        broadcast(&flat, root, part, ring)?;
    }
    let mut curves = own_curves;
    curves.resize(curves_len.next_multiple_of(4), b'\n');
    let text = Tensor::from_slice(&words(&curves)).to_device(stage.trainer.device());
    broadcast(&text, root, part, ring)?;
    if part == Part::Copier {
        let text = text.to_device(tch::Device::Cpu);
        let words = Vec::<f32>::try_from(text).or_fault(FailureClass::Collective)?;
        let mut bytes: Vec<u8> = words.into_iter().flat_map(f32::to_le_bytes).collect();
        bytes.truncate(curves_len);
        stage.curves = from_jsonl(&bytes).or_fault(FailureClass::Collective)?;
        stage.trainer.resume(position);
    }
    Ok(())
}

/// Fills `flat` `[len]` (f32) with that of rank `root`, a piece at a time.
fn broadcast(
    flat: &Tensor,
    root: u32,
    part: Part,
    ring: &mut dyn Collective,
) -> Result<(), Broken> {
    let len = flat.numel() as i64;
    for start in (0..len).step_by(PIECE as usize) {
        let piece = flat.narrow(0, start, PIECE.min(len - start));
        let mut place = match part {
            Part::Source | Part::Copier => piece,
            // What a holder passes on should be what it has. If it is not, the comparison that follows must see it.
            Part::Holder => piece.copy(),
        };
        ring.broadcast(&mut place, root)?;
    }
    Ok(())
}

/// Bytes as numbers that are only ever copied.
fn words(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|word| f32::from_le_bytes(word.try_into().expect("chunks of four")))
        .collect()
}

/// The newest checkpoint, as a state that somebody may go on from.
pub(super) fn base(membership: &Membership) -> Result<Option<Held>, Fault> {
    let Some(key) = membership.base_checkpoint.as_deref() else {
        return Ok(None);
    };
    let named = layout::parse_checkpoint_commit(key);
    let (_, step, generation) = named.ok_or_else(|| {
        let message =
            format!("{key} is no COMMIT of a checkpoint, yet training is to start from it");
        Fault::new(FailureClass::Schema, message)
    })?;
    Ok(Some(Held { step, generation }))
}

fn to_bytes(held: Option<Held>) -> [u8; HELD_BYTES] {
    let mut bytes = [0; HELD_BYTES];
    if let Some(held) = held {
        bytes[0] = 1;
        bytes[1..9].copy_from_slice(&held.step.to_le_bytes());
        bytes[9..].copy_from_slice(&held.generation.0.to_le_bytes());
    }
    bytes
}

fn from_bytes(bytes: &[u8]) -> Option<Held> {
    let (says, rest) = bytes.split_first()?;
    let (step, generation) = (word(rest, 0)?, word(rest, 1)?);
    (*says == 1).then_some(Held {
        step,
        generation: distillery_common::ids::Generation(generation),
    })
}

fn header(position: Position, curves: usize) -> [u8; HEADER_BYTES] {
    let words = [
        position.step,
        position.applied,
        position.skipped,
        u64::from(position.skipped_in_a_row),
        curves as u64,
    ];
    let mut bytes = [0; HEADER_BYTES];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn parse_header(bytes: &[u8]) -> Result<(Position, usize), Fault> {
    let parsed = || {
        let position = Position {
            step: word(bytes, 0)?,
            applied: word(bytes, 1)?,
            skipped: word(bytes, 2)?,
            skipped_in_a_row: u32::try_from(word(bytes, 3)?).ok()?,
        };
        let curves = usize::try_from(word(bytes, 4)?).ok()?;
        (curves <= MAX_CURVES).then_some((position, curves))
    };
    parsed().ok_or_else(|| {
        Fault::new(
            FailureClass::Collective,
            "a member described its state in a way that makes no sense",
        )
    })
}

/// Longest curves that a peer is believed to have: a gibibyte is millions of steps.
const MAX_CURVES: usize = 1 << 30;

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at * 8..at * 8 + 8)?.first_chunk()?;
    Some(u64::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::collective::tests::on_ring;
    use crate::io::Io;

    const SHORT: Duration = Duration::from_millis(500);

    /// Rank 0 reads with `reading`, the others wait for it.
    fn read_by<F>(reading: impl Fn() -> F + Sync) -> Vec<Result<(), Broken>>
    where
        F: Future<Output = Result<(), Fault>>,
    {
        on_ring(3, SHORT, |mut ring| {
            if ring.rank() > 0 {
                return wait_for_load(&mut ring).map_err(Broken::from);
            }
            let io = Io::start().unwrap();
            io.wait(load(reading(), SHORT / 10, &mut ring))
        })
    }

    #[test]
    fn a_state_may_take_longer_to_read_than_members_wait_for_each_other() {
        let ended = read_by(|| async {
            tokio::time::sleep(SHORT * 3).await;
            Ok(())
        });
        assert!(ended.iter().all(Result::is_ok), "{ended:?}");
    }

    /// Each reads for another time, so that some are done while others read on.
    #[test]
    fn all_ranks_wait_for_the_last_that_reads() {
        let done = AtomicU32::new(0);
        let seen = on_ring(3, SHORT, |mut ring| {
            let rank = ring.rank();
            let reading = async {
                tokio::time::sleep(SHORT * rank).await;
                done.fetch_add(1, Ordering::SeqCst);
                Ok(())
            };
            let io = Io::start().unwrap();
            io.wait(load(reading, SHORT / 10, &mut ring)).unwrap();
            done.load(Ordering::SeqCst)
        });
        assert_eq!(seen, [3; 3]);
    }

    #[test]
    fn a_state_that_cannot_be_read_is_its_readers_fault() {
        let ended = read_by(|| async { Err(Fault::config("no such state")) });
        assert!(matches!(&ended[0], Err(Broken::Own(_))), "{ended:?}");
        assert!(
            ended[1..]
                .iter()
                .all(|ended| matches!(ended, Err(Broken::Group(_)))),
            "{ended:?}"
        );
    }

    #[test]
    fn reading_ends_with_the_group() {
        let ended = on_ring(2, SHORT, |mut ring| {
            if ring.rank() > 0 {
                return wait_for_load(&mut ring).map_err(Broken::from);
            }
            ring.aborter().abort();
            let io = Io::start().unwrap();
            io.wait(load(std::future::pending(), SHORT / 10, &mut ring))
        });
        assert!(
            ended
                .iter()
                .all(|ended| matches!(ended, Err(Broken::Group(_)))),
            "{ended:?}"
        );
    }
}
