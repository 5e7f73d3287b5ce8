//! Where the ranks of one communicator meet: a thread in the process that made the id.
//!
//! It hears all ranks, carries out a collective when every rank has asked for it, hands on what is sent between two, and
//! tells everybody when one is gone without having taken leave.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use crate::message::{Operation, Reply, Request};
use crate::values;

/// `ncclSuccess`.
pub(crate) const SUCCESS: i32 = 0;
/// `ncclInvalidArgument`.
pub(crate) const INVALID_ARGUMENT: i32 = 4;
/// `ncclRemoteError`.
pub(crate) const REMOTE_ERROR: i32 = 6;

/// Serves one communicator until all of its ranks are gone.
pub(crate) fn serve(listener: &UnixListener) -> io::Result<()> {
    let (events, heard) = channel();
    let mut streams: Vec<Option<UnixStream>> = Vec::new();
    while streams.is_empty() || streams.iter().any(Option::is_none) {
        let (mut stream, _) = listener.accept()?;
        let Ok(Request::Join { rank, world }) = Request::read(&mut stream) else {
            continue;
        };
        streams.resize_with(streams.len().max(world as usize), || None);
        let events = events.clone();
        let mut reader = stream.try_clone()?;
        thread::spawn(move || hear(rank, &mut reader, &events));
        if let Some(place) = streams.get_mut(rank as usize) {
            *place = Some(stream);
        }
    }
    drop(events);
    let streams: Vec<UnixStream> = streams.into_iter().flatten().collect();
    let mut hub = Hub {
        pending: streams.iter().map(|_| None).collect(),
        left: vec![false; streams.len()],
        streams,
        mail: HashMap::new(),
    };
    for rank in 0..hub.streams.len() {
        hub.reply(rank, SUCCESS, Vec::new());
    }
    hub.run(&heard);
    Ok(())
}

/// What a rank asks, and none at its end.
type Event = (u32, Option<Request>);

fn hear(rank: u32, stream: &mut UnixStream, events: &Sender<Event>) {
    while let Ok(request) = Request::read(stream) {
        if events.send((rank, Some(request))).is_err() {
            return;
        }
    }
    // Nobody listens any more when all are gone.
    let _ = events.send((rank, None));
}

struct Hub {
    streams: Vec<UnixStream>,
    /// What each rank waits for.
    pending: Vec<Option<Request>>,
    /// Who has taken leave.
    left: Vec<bool>,
    /// What was sent and not received, by sender and receiver.
    mail: HashMap<(u32, u32), VecDeque<Vec<u8>>>,
}

impl Hub {
    fn run(&mut self, heard: &Receiver<Event>) {
        for (rank, request) in heard {
            let at = rank as usize;
            match request {
                None if self.left[at] => {}
                None => {
                    // As far as the others are concerned this is the end: whatever they ask for, they hear it.
                    for other in (0..self.streams.len()).filter(|&other| other != at) {
                        self.reply(other, REMOTE_ERROR, Vec::new());
                    }
                    return;
                }
                Some(Request::Leave) => {
                    self.left[at] = true;
                    self.reply(at, SUCCESS, Vec::new());
                }
                Some(Request::Group { sends, receives }) => {
                    for (peer, payload) in sends {
                        self.mail
                            .entry((rank, peer))
                            .or_default()
                            .push_back(payload);
                    }
                    let sends = Vec::new();
                    self.pending[at] = Some(Request::Group { sends, receives });
                    self.deliver();
                }
                Some(request) => {
                    self.pending[at] = Some(request);
                    self.combine();
                }
            }
        }
    }

    fn reply(&mut self, rank: usize, result: i32, payloads: Vec<Vec<u8>>) {
        self.pending[rank] = None;
        // A rank that is gone is heard of as such.
        let _ = Reply { result, payloads }.write(&mut self.streams[rank]);
    }

    /// Answers every group whose receives have all come.
    fn deliver(&mut self) {
        for rank in 0..self.streams.len() {
            let Some(Request::Group { receives, .. }) = &self.pending[rank] else {
                continue;
            };
            let receives = receives.clone();
            let mut wanted: HashMap<u32, usize> = HashMap::new();
            for (peer, _) in &receives {
                *wanted.entry(*peer).or_default() += 1;
            }
            let there = |peer: u32| self.mail.get(&(peer, rank as u32)).map_or(0, VecDeque::len);
            if wanted.iter().any(|(&peer, &number)| there(peer) < number) {
                continue;
            }
            let mut result = SUCCESS;
            let mut payloads = Vec::new();
            for (peer, bytes) in receives {
                let mail = self.mail.get_mut(&(peer, rank as u32));
                let payload = mail.and_then(VecDeque::pop_front).unwrap_or_default();
                if payload.len() as u64 != bytes {
                    result = INVALID_ARGUMENT;
                }
                payloads.push(payload);
            }
            self.reply(rank, result, payloads);
        }
    }

    /// Carries out a collective once every rank has asked for one.
    fn combine(&mut self) {
        let mut asked = Vec::new();
        for pending in &self.pending {
            match pending {
                Some(Request::Collective {
                    operation,
                    kind,
                    root,
                    payload,
                }) => asked.push((*operation, *kind, *root, payload)),
                _ => return,
            }
        }
        let (operation, kind, root, first) = asked[0];
        let same = |other: &(Operation, i32, u32, &Vec<u8>)| {
            other.0 == operation
                && other.1 == kind
                && other.2 == root
                && other.3.len() == first.len()
        };
        if !asked.iter().all(same) {
            // NCCL would wait for ever or mix bytes up; here everybody hears of it.
            for rank in 0..self.streams.len() {
                self.reply(rank, INVALID_ARGUMENT, Vec::new());
            }
            return;
        }
        let payloads: Vec<&Vec<u8>> = asked.iter().map(|asked| asked.3).collect();
        let answers = answers(operation, kind, root as usize, &payloads);
        for (rank, answer) in answers.into_iter().enumerate() {
            self.reply(rank, SUCCESS, vec![answer]);
        }
    }
}

/// What each rank receives.
fn answers(operation: Operation, kind: i32, root: usize, payloads: &[&Vec<u8>]) -> Vec<Vec<u8>> {
    let world = payloads.len();
    let sum = || {
        let mut sum = payloads[0].clone();
        for payload in &payloads[1..] {
            values::add(kind, &mut sum, payload);
        }
        sum
    };
    match operation {
        Operation::AllReduce => vec![sum(); world],
        Operation::Reduce => {
            let mut answers = vec![Vec::new(); world];
            answers[root] = sum();
            answers
        }
        Operation::Broadcast => vec![payloads[root].clone(); world],
        Operation::ReduceScatter => {
            let sum = sum();
            let size = sum.len() / world;
            (0..world)
                .map(|rank| sum[rank * size..(rank + 1) * size].to_vec())
                .collect()
        }
        Operation::AllGather => {
            let all: Vec<u8> = payloads
                .iter()
                .flat_map(|payload| payload.iter().copied())
                .collect();
            vec![all; world]
        }
    }
}
