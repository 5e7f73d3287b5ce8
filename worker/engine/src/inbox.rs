//! Commands from the worker, as the device thread meets them: one at a time between tasks, and a glance at what
//! has come between two blocks of work.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use distillery_common::group::GroupId;
use distillery_common::task::Lease;

use crate::link::Command;

/// Commands in the order in which they came, less those that an interruption has used up.
#[derive(Debug)]
pub struct Inbox {
    commands: Receiver<Command>,
    pending: VecDeque<Command>,
}

impl Inbox {
    /// Reads from `commands`.
    pub fn new(commands: Receiver<Command>) -> Self {
        Self {
            commands,
            pending: VecDeque::new(),
        }
    }

    /// The next command; none once the link has closed.
    pub fn next_command(&mut self) -> Option<Command> {
        self.pending
            .pop_front()
            .or_else(|| self.commands.recv().ok())
    }

    /// The first command within `patience` that `wanted` accepts; the others keep their place.
    pub fn next_matching(
        &mut self,
        patience: Duration,
        wanted: impl Fn(&Command) -> bool,
    ) -> Option<Command> {
        if let Some(found) = self.take(&wanted) {
            return Some(found);
        }
        loop {
            match self.commands.recv_timeout(patience) {
                Ok(command) if wanted(&command) => return Some(command),
                Ok(command) => self.pending.push_back(command),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// Whether the worker has taken `lease` back.
    pub fn cancelled(&mut self, lease: &Lease) -> bool {
        self.glance();
        self.take(&|command: &Command| matches!(command, Command::Cancel(l) if l == lease))
            .is_some()
    }

    /// Why `group` has been ended, if it has.
    pub fn aborted(&mut self, group: &GroupId) -> Option<String> {
        self.glance();
        let ended = |c: &Command| matches!(c, Command::Abort { group: g, .. } if g == group);
        match self.take(&ended)? {
            Command::Abort { reason, .. } => Some(reason),
            _ => unreachable!("only aborts were asked for"),
        }
    }

    /// Whether the worker wants this engine to end, and if so, whether with a checkpoint. The command stays.
    pub fn draining(&mut self) -> Option<bool> {
        self.glance();
        self.pending.iter().find_map(|command| match command {
            Command::Drain { checkpoint } => Some(*checkpoint),
            Command::Setup(_)
            | Command::Start(_)
            | Command::Cancel(_)
            | Command::Join(_)
            | Command::Peers { .. }
            | Command::Abort { .. } => None,
        })
    }

    fn glance(&mut self) {
        self.pending.extend(self.commands.try_iter());
    }

    fn take(&mut self, wanted: &dyn Fn(&Command) -> bool) -> Option<Command> {
        let at = self.pending.iter().position(wanted)?;
        self.pending.remove(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use distillery_common::ids::{Generation, Incarnation, Term};
    use distillery_common::task::TaskId;
    use std::sync::mpsc;

    fn lease(index: u64) -> Lease {
        Lease {
            term: Term(1),
            task: TaskId {
                stage: "trajectories".into(),
                index,
            },
            attempt: 1,
            incarnation: Incarnation(1),
        }
    }

    #[test]
    fn a_cancel_reaches_its_task_alone_and_others_keep_their_place() {
        let (send, receive) = mpsc::channel();
        let mut inbox = Inbox::new(receive);
        send.send(Command::Start(lease(2))).expect("open");
        send.send(Command::Cancel(lease(1))).expect("open");
        assert!(!inbox.cancelled(&lease(3)));
        assert!(inbox.cancelled(&lease(1)));
        assert!(!inbox.cancelled(&lease(1)), "a cancel counts once");
        assert_eq!(inbox.next_command(), Some(Command::Start(lease(2))));
        drop(send);
        assert_eq!(inbox.next_command(), None);
    }

    #[test]
    fn a_drain_is_seen_and_stays() {
        let (send, receive) = mpsc::channel();
        let mut inbox = Inbox::new(receive);
        assert_eq!(inbox.draining(), None);
        send.send(Command::Drain { checkpoint: true })
            .expect("open");
        assert_eq!(inbox.draining(), Some(true));
        assert_eq!(
            inbox.next_command(),
            Some(Command::Drain { checkpoint: true })
        );
    }

    #[test]
    fn an_abort_says_why() {
        let (send, receive) = mpsc::channel();
        let mut inbox = Inbox::new(receive);
        let group = GroupId {
            stage: "seg8".into(),
            generation: Generation(4),
        };
        let reason = String::from("rank 1 was lost");
        send.send(Command::Abort {
            group: group.clone(),
            reason: reason.clone(),
        })
        .expect("open");
        assert_eq!(inbox.aborted(&group), Some(reason));
        assert!(inbox.next_matching(Duration::ZERO, |_| true).is_none());
    }
}
