//! The group that the device thread is in, and how the link's thread ends it from outside.

use std::sync::{Arc, Mutex};

use distillery_common::group::GroupId;

use crate::collective::{Abort, Ended};

/// What the link's thread ends a group with while the device thread waits for a peer.
#[derive(Debug, Clone, Default)]
pub struct Current(Arc<Mutex<Option<InGroup>>>);

struct InGroup {
    group: GroupId,
    /// None while the group forms.
    aborter: Option<Arc<dyn Abort>>,
    ended: Ended,
}

impl std::fmt::Debug for InGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InGroup")
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

impl Current {
    /// Ends the collective of `group`, if it is the one this engine is in.
    pub fn abort(&self, group: &GroupId) {
        let current = self.0.lock().expect("no holder of this lock can panic");
        if let Some(current) = current.as_ref().filter(|current| current.group == *group) {
            current.ended.set();
            if let Some(aborter) = &current.aborter {
                aborter.abort();
            }
        }
    }

    /// The device thread joins `group`; what it gets back tells whether it was ended.
    pub(super) fn enter(&self, group: &GroupId) -> Ended {
        let ended = Ended::default();
        let entered = InGroup {
            group: group.clone(),
            aborter: None,
            ended: ended.clone(),
        };
        *self.0.lock().expect("no holder of this lock can panic") = Some(entered);
        ended
    }

    /// The group has formed: what ends it from now on. One that was ended meanwhile ends at once.
    pub(super) fn formed(&self, aborter: Arc<dyn Abort>) {
        let mut current = self.0.lock().expect("no holder of this lock can panic");
        if let Some(current) = current.as_mut() {
            if current.ended.is_set() {
                aborter.abort();
            }
            current.aborter = Some(aborter);
        }
    }

    /// It no longer does.
    pub(super) fn leave(&self) {
        *self.0.lock().expect("no holder of this lock can panic") = None;
    }
}
