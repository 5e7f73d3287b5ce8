//! How two neighbours make sure that they are meant for each other.
//!
//! ```text
//! caller                                    listener
//!        ◀── magic, 32 random bytes ──────            for this caller alone
//!        ─── greeting, 32 random bytes ──▶            sealed over both
//!        ◀── greeting ────────────────────            sealed over both
//! ```
//!
//! A greeting names its sender's place and carries a seal that only a holder of the group's secret can make. The secret
//! itself is never sent. A seal is of no use on any other connection: whoever listened on the way and says the same again,
//! in the same generation or another, is answered with other random bytes.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::greeting::{
    Direction, FIXED, Greeting, Nonce, challenge_bytes, nonce, read_challenge, stage_len,
};
use super::{Error, Invitation, Links};

/// Callers that may be in the middle of their greeting; the one that has called first makes room for another.
const MOST_CALLERS: usize = 64;

/// How often a listener looks for its neighbour.
const LOOK: Duration = Duration::from_millis(2);

/// Calls that count as much of the deadline as one look: a listener that is flooded must not wait for ever.
const CALLS_OF_A_LOOK: u64 = 64;

/// How often a member that waits for an answer looks whether the group was given up.
const GLANCE: Duration = Duration::from_millis(50);

/// How long one try to reach a neighbour may take before the group is looked at again.
const LONGEST_CALL: Duration = Duration::from_secs(1);

/// Calls the next rank, hears from the previous one, and checks both. Both at once, since everybody waits for the one it
/// calls, in a ring.
pub(super) fn join(listener: &TcpListener, invitation: &Invitation<'_>) -> Result<Links, Error> {
    let world = invitation.peers.len() as u32;
    let next_rank = (invitation.rank + 1) % world;
    let previous_rank = (invitation.rank + world - 1) % world;
    let watched = Watched {
        invitation,
        hopeless: AtomicBool::new(false),
    };
    let (next, previous) = thread::scope(|scope| {
        let calling = scope.spawn(|| reach(&watched, next_rank));
        let previous = wait_for(listener, &watched, previous_rank);
        if previous.is_err() {
            watched.give_up();
        }
        let next = calling.join();
        (
            next.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            previous,
        )
    });
    match (next, previous) {
        (Ok(next), Ok(previous)) => Ok(Links { next, previous }),
        // It was only told to stop: what the other says is the reason.
        (Err(error), Err(Error::Aborted)) => Err(error),
        // Who listens can say who else called.
        (_, Err(error)) | (Err(error), Ok(_)) => Err(error),
    }
}

/// An invitation, and whether one of its two sides has failed for good, so that the other need not go on.
struct Watched<'a> {
    invitation: &'a Invitation<'a>,
    hopeless: AtomicBool,
}

impl Watched<'_> {
    fn is_over(&self) -> bool {
        self.invitation.ended.is_set() || self.hopeless.load(Ordering::SeqCst)
    }

    fn give_up(&self) {
        self.hopeless.store(true, Ordering::SeqCst);
    }

    fn given_up(&self) -> io::Result<()> {
        match self.is_over() {
            true => Err(io::Error::other("the group was given up")),
            false => Ok(()),
        }
    }
}

/// Why there is no connection to the next rank.
enum Missed {
    /// It ended the connection before it answered, as when its places for callers were taken.
    HungUp(io::Error),
    /// Calling again would help no more.
    ForGood(Error),
}

/// Calls the next rank and hears its answer; calls again until the deadline when it is hung up on before.
fn reach(watched: &Watched<'_>, next_rank: u32) -> Result<TcpStream, Error> {
    let mut waited = Duration::ZERO;
    loop {
        match greet(watched, next_rank, &mut waited) {
            Ok(next) => return Ok(next),
            Err(Missed::ForGood(error)) => return Err(error),
            Err(Missed::HungUp(source)) => {
                if watched.is_over() {
                    return Err(Error::Aborted);
                }
                if waited >= watched.invitation.deadline {
                    let reason = format!("rank {next_rank} did not answer: {source}");
                    return Err(Error::Setup { reason });
                }
                thread::sleep(GLANCE);
                waited += GLANCE;
            }
        }
    }
}

/// One call of the next rank; the time that it took is added to `waited`, beside that of connecting.
fn greet(
    watched: &Watched<'_>,
    next_rank: u32,
    waited: &mut Duration,
) -> Result<TcpStream, Missed> {
    let invitation = watched.invitation;
    let address = &invitation.peers[next_rank as usize];
    let failed = |reason: String| match watched.is_over() {
        true => Missed::ForGood(Error::Aborted),
        false => Missed::ForGood(Error::Setup { reason }),
    };
    let hopeless = |reason: String| {
        let error = failed(reason);
        watched.give_up();
        error
    };
    let unreachable = |source: io::Error| {
        hopeless(format!(
            "rank {next_rank} at {address} cannot be reached: {source}"
        ))
    };
    let unheard = |source: io::Error| match is_end(&source) {
        true => Missed::HungUp(source),
        false => failed(format!("rank {next_rank} did not answer: {source}")),
    };
    let mut next = call(address, watched)
        .and_then(|stream| prepare(stream, invitation.deadline))
        .map_err(unreachable)?;
    let nonce = nonce().map_err(unreachable)?;
    let challenge = patiently(&next, watched, waited, read_challenge).map_err(unheard)?;
    Greeting::of(invitation, invitation.rank, Direction::Call, nonce)
        .write(&mut next, &invitation.token, &challenge)
        .map_err(unheard)?;
    let answer = patiently(&next, watched, waited, Greeting::read).map_err(unheard)?;
    let expected = Greeting::of(invitation, next_rank, Direction::Answer, nonce);
    match expected.difference(&invitation.token, &challenge, &answer) {
        Some(difference) => Err(hopeless(format!(
            "rank {next_rank} answered, but {difference}"
        ))),
        None => Ok(next),
    }
}

/// Whether it says that the other side has ended the connection.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
    )
}

/// Connects to the first of a name's addresses that answers within the deadline.
fn call(address: &str, watched: &Watched<'_>) -> io::Result<TcpStream> {
    let invitation = watched.invitation;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        let mut waited = Duration::ZERO;
        while waited < invitation.deadline {
            watched.given_up()?;
            let once = LONGEST_CALL.min(invitation.deadline);
            match TcpStream::connect_timeout(&address, once) {
                Ok(stream) => return Ok(stream),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    last = error;
                    waited += once;
                }
                Err(error) => {
                    last = error;
                    break;
                }
            }
        }
    }
    Err(last)
}

/// Reads what the next rank says as soon as it is ready to.
fn patiently<'a, T>(
    next: &'a TcpStream,
    watched: &'a Watched<'a>,
    waited: &'a mut Duration,
    read: impl FnOnce(&mut Patient<'a>) -> io::Result<T>,
) -> io::Result<T> {
    next.set_read_timeout(Some(GLANCE))?;
    let said = read(&mut Patient {
        stream: next,
        watched,
        waited,
    });
    next.set_read_timeout(Some(watched.invitation.deadline))?;
    said
}

/// Reads from a stream whose own timeout is [`GLANCE`], until the invitation's deadline or end.
struct Patient<'a> {
    stream: &'a TcpStream,
    watched: &'a Watched<'a>,
    waited: &'a mut Duration,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut stream = self.stream;
        loop {
            self.watched.given_up()?;
            match stream.read(buffer) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) && *self.waited < self.watched.invitation.deadline =>
                {
                    *self.waited += GLANCE;
                }
                read => return read,
            }
        }
    }
}

fn prepare(stream: TcpStream, deadline: Duration) -> io::Result<TcpStream> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(deadline))?;
    stream.set_write_timeout(Some(deadline))?;
    Ok(stream)
}

/// Accepts until the expected rank has greeted, and answers it; everybody else is hung up on. Callers are heard side by
/// side, so that one that says nothing holds up nobody.
fn wait_for(listener: &TcpListener, watched: &Watched<'_>, rank: u32) -> Result<TcpStream, Error> {
    let invitation = watched.invitation;
    let failed = |source: io::Error| Error::Setup {
        reason: format!("this rank cannot listen: {source}"),
    };
    listener.set_nonblocking(true).map_err(failed)?;
    let mut looks = invitation.deadline.as_millis() / LOOK.as_millis() + 1;
    let mut callers: VecDeque<Caller> = VecDeque::new();
    let mut refused = Refused::default();
    let mut calls = 0u64;
    while looks > 0 && !watched.is_over() {
        let accepted = match listener.accept() {
            Ok((stream, _)) => Some(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => return Err(failed(error)),
        };
        if accepted.is_none() {
            std::thread::sleep(LOOK);
        }
        if accepted.is_none() || calls.is_multiple_of(CALLS_OF_A_LOOK) {
            looks -= 1;
        }
        if let Some(stream) = accepted {
            calls += 1;
            if callers.len() == MOST_CALLERS {
                callers.pop_front();
                refused.note("it was slow, and others called");
            }
            match Caller::new(stream) {
                Ok(caller) => callers.push_back(caller),
                Err(error) => refused.note(&error.to_string()),
            }
        }
        for _ in 0..callers.len() {
            let Some(mut caller) = callers.pop_front() else {
                break;
            };
            match caller.hear(invitation, rank) {
                Ok(None) => callers.push_back(caller),
                Ok(Some(nonce)) => match welcome(caller, invitation, nonce) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => refused.note(&error.to_string()),
                },
                Err(why) => refused.note(&why),
            }
        }
    }
    if watched.is_over() {
        return Err(Error::Aborted);
    }
    Err(Error::Setup {
        reason: format!("rank {rank} did not call within the deadline{refused}"),
    })
}

/// Callers that were turned away.
#[derive(Debug, Default)]
struct Refused {
    count: u64,
    last: String,
}

impl Refused {
    fn note(&mut self, why: &str) {
        self.count += 1;
        why.clone_into(&mut self.last);
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count {
            0 => Ok(()),
            count => write!(
                f,
                "; {count} were turned away, the last because {}",
                self.last
            ),
        }
    }
}

/// Somebody who called and has not said all of a greeting yet.
#[derive(Debug)]
struct Caller {
    stream: TcpStream,
    /// What it was told, and nobody else.
    challenge: Nonce,
    heard: Vec<u8>,
}

impl Caller {
    fn new(mut stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let challenge = nonce()?;
        // The buffer of a new connection has room for it.
        stream.write_all(&challenge_bytes(&challenge))?;
        Ok(Self {
            stream,
            challenge,
            heard: Vec::new(),
        })
    }

    /// Takes what has arrived, and not a byte beyond the greeting. Gives the caller's random bytes once it has proved to be
    /// `rank`; an error is the reason to hang up.
    fn hear(&mut self, invitation: &Invitation<'_>, rank: u32) -> Result<Option<Nonce>, String> {
        loop {
            let missing = match Greeting::read(&mut self.heard.as_slice()) {
                Ok(heard) => {
                    let nonce = heard.0.nonce;
                    let expected = Greeting::of(invitation, rank, Direction::Call, nonce);
                    return match expected.difference(&invitation.token, &self.challenge, &heard) {
                        None => Ok(Some(nonce)),
                        Some(difference) => Err(difference),
                    };
                }
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => self.missing()?,
                Err(error) => return Err(error.to_string()),
            };
            let mut more = vec![0; missing];
            match self.stream.read(&mut more) {
                Ok(0) => return Err("it hung up".to_owned()),
                Ok(count) => self.heard.extend(&more[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// How many bytes of the greeting are sure to come still.
    fn missing(&self) -> Result<usize, String> {
        match self.heard.first_chunk::<FIXED>() {
            None => Ok(FIXED - self.heard.len()),
            Some(head) => {
                let stage = stage_len(head).map_err(|error| error.to_string())?;
                Ok((FIXED + stage).saturating_sub(self.heard.len()).max(1))
            }
        }
    }
}

/// Answers the neighbour's greeting.
fn welcome(caller: Caller, invitation: &Invitation<'_>, nonce: Nonce) -> io::Result<TcpStream> {
    let mut stream = prepare(caller.stream, invitation.deadline)?;
    Greeting::of(invitation, invitation.rank, Direction::Answer, nonce).write(
        &mut stream,
        &invitation.token,
        &caller.challenge,
    )?;
    Ok(stream)
}
