//! Errors of the store, as the machine knows them: what may pass, and what will not.

use distillery_common::checkpoint;
use distillery_common::commit;
use distillery_common::latents;
use distillery_common::storage::{self, chain};

use crate::scheduler::Trouble;

fn sorted_trouble(is_transient: bool, error: &dyn std::error::Error) -> Trouble {
    if is_transient {
        Trouble::Transient(chain(error))
    } else {
        Trouble::Permanent(chain(error))
    }
}

pub(super) fn trouble(error: storage::Error) -> Trouble {
    sorted_trouble(error.is_transient(), &error)
}

pub(super) fn commit_trouble(error: commit::Error) -> Trouble {
    let is_transient = matches!(&error, commit::Error::Storage(e) if e.is_transient());
    sorted_trouble(is_transient, &error)
}

pub(super) fn checkpoint_trouble(error: checkpoint::Error) -> Trouble {
    let is_transient = matches!(&error, checkpoint::Error::Storage(e) if e.is_transient());
    sorted_trouble(is_transient, &error)
}

pub(super) fn latents_trouble(error: latents::Error) -> Trouble {
    let is_transient = matches!(&error, latents::Error::Storage(e) if e.is_transient());
    sorted_trouble(is_transient, &error)
}
