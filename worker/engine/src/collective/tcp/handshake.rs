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

use distillery_common::security::{self, GroupSecret};

use super::{Error, Invitation, Links};

/// First bytes of every connection; the number is the version of the ring's protocol.
const MAGIC: [u8; 8] = *b"dstring3";

/// Random bytes of one side of a connection.
type Nonce = [u8; 32];

/// Bytes of a challenge: magic, the listener's random bytes.
const CHALLENGE: usize = 8 + 32;

/// Bytes of a greeting without the stage's name: magic, seal, direction, generation, rank, world, length of the
/// stage's name, the caller's random bytes.
const FIXED: usize = 8 + 32 + 1 + 8 + 4 + 4 + 2 + 32;

/// Longest stage name of a greeting.
const LONGEST_STAGE: usize = 256;

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

/// Who says a greeting: one that was recorded is no answer to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Call = 1,
    Answer = 2,
}

/// What a member says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Greeting {
    direction: u8,
    generation: u64,
    rank: u32,
    world: u32,
    stage: String,
    /// The caller's, which its answer repeats.
    nonce: Nonce,
}

impl Greeting {
    fn of(invitation: &Invitation<'_>, rank: u32, direction: Direction, nonce: Nonce) -> Self {
        Self {
            direction: direction as u8,
            generation: invitation.group.generation.0,
            rank,
            world: invitation.peers.len() as u32,
            stage: invitation.group.stage.clone(),
            nonce,
        }
    }

    /// What is said.
    fn words(&self) -> Vec<u8> {
        let mut words = Vec::with_capacity(FIXED + self.stage.len());
        words.push(self.direction);
        words.extend(self.generation.to_le_bytes());
        words.extend(self.rank.to_le_bytes());
        words.extend(self.world.to_le_bytes());
        words.extend((self.stage.len() as u16).to_le_bytes());
        words.extend(self.nonce);
        words.extend(self.stage.as_bytes());
        words
    }

    /// What is sealed on the connection on which the listener said `challenge`.
    fn sealed_words(&self, challenge: &Nonce) -> Vec<u8> {
        [challenge.as_slice(), &self.words()].concat()
    }

    fn write(&self, to: &mut impl Write, secret: &[u8; 32], challenge: &Nonce) -> io::Result<()> {
        let words = self.words();
        let mut bytes = MAGIC.to_vec();
        bytes.extend(GroupSecret(*secret).seal(&self.sealed_words(challenge)));
        bytes.extend(words);
        to.write_all(&bytes)
    }

    /// Reads a greeting and its seal.
    fn read(from: &mut impl Read) -> io::Result<(Self, [u8; 32])> {
        let mut head = [0; FIXED];
        // What speaks something else is told so at its first words: it may say no more.
        from.read_exact(&mut head[..MAGIC.len()])?;
        if head[..MAGIC.len()] != MAGIC {
            return Err(malformed("it is no member of a ring"));
        }
        from.read_exact(&mut head[MAGIC.len()..])?;
        let mut stage = vec![0; stage_len(&head)?];
        from.read_exact(&mut stage)?;
        let stage = String::from_utf8(stage).map_err(|_| malformed("its stage is no text"))?;
        let greeting = Self {
            direction: head[40],
            generation: u64::from_le_bytes(fixed(&head[41..49])),
            rank: u32::from_le_bytes(fixed(&head[49..53])),
            world: u32::from_le_bytes(fixed(&head[53..57])),
            stage,
            nonce: fixed(&head[59..91]),
        };
        Ok((greeting, fixed(&head[8..40])))
    }

    /// Why what was heard is not the expected greeting, if it is not; says nothing of secrets.
    fn difference(
        &self,
        secret: &[u8; 32],
        challenge: &Nonce,
        (other, seal): &(Self, [u8; 32]),
    ) -> Option<String> {
        if !GroupSecret(*secret).sealed(&other.sealed_words(challenge), seal) {
            return Some("its token is not this run's, or it repeats what it has heard".to_owned());
        }
        (self != other).then(|| {
            format!(
                "it is rank {} of {} of {} generation {}, expected rank {} of {} of {} generation {}",
                other.rank,
                other.world,
                other.stage,
                other.generation,
                self.rank,
                self.world,
                self.stage,
                self.generation
            )
        })
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Length of the stage's name in a greeting with this head.
fn stage_len(head: &[u8; FIXED]) -> io::Result<usize> {
    match usize::from(u16::from_le_bytes(fixed(&head[57..59]))) {
        len if len > LONGEST_STAGE => Err(malformed("its stage name is too long")),
        len => Ok(len),
    }
}

/// `bytes` as an array; the caller read exactly N.
fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("as many bytes were read")
}

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

/// Calls the next rank and hears its answer.
fn reach(watched: &Watched<'_>, next_rank: u32) -> Result<TcpStream, Error> {
    let invitation = watched.invitation;
    let address = &invitation.peers[next_rank as usize];
    let failed = |reason: String| match watched.is_over() {
        true => Error::Aborted,
        false => Error::Setup { reason },
    };
    let unreachable = |source: io::Error| {
        let error = failed(format!(
            "rank {next_rank} at {address} cannot be reached: {source}"
        ));
        watched.give_up();
        error
    };
    let silent = |source: io::Error| failed(format!("rank {next_rank} did not answer: {source}"));
    let mut next = call(address, watched)
        .and_then(|stream| prepare(stream, invitation.deadline))
        .map_err(unreachable)?;
    let nonce = nonce().map_err(unreachable)?;
    let challenge = patiently(&next, watched, read_challenge).map_err(silent)?;
    Greeting::of(invitation, invitation.rank, Direction::Call, nonce)
        .write(&mut next, &invitation.token, &challenge)
        .map_err(unreachable)?;
    let answer = patiently(&next, watched, Greeting::read).map_err(silent)?;
    let expected = Greeting::of(invitation, next_rank, Direction::Answer, nonce);
    match expected.difference(&invitation.token, &challenge, &answer) {
        Some(difference) => Err(failed(format!(
            "rank {next_rank} answered, but {difference}"
        ))),
        None => Ok(next),
    }
}

fn nonce() -> io::Result<Nonce> {
    security::nonce().map_err(io::Error::other)
}

/// What the listener says first.
fn read_challenge(from: &mut impl Read) -> io::Result<Nonce> {
    let mut challenge = [0; CHALLENGE];
    from.read_exact(&mut challenge)?;
    match challenge.strip_prefix(&MAGIC) {
        Some(nonce) => Ok(fixed(nonce)),
        None => Err(malformed("it is no member of a ring")),
    }
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
    read: impl FnOnce(&mut Patient<'a>) -> io::Result<T>,
) -> io::Result<T> {
    next.set_read_timeout(Some(GLANCE))?;
    let said = read(&mut Patient {
        stream: next,
        watched,
        waited: Duration::ZERO,
    });
    next.set_read_timeout(Some(watched.invitation.deadline))?;
    said
}

/// Reads from a stream whose own timeout is [`GLANCE`], until the invitation's deadline or end.
struct Patient<'a> {
    stream: &'a TcpStream,
    watched: &'a Watched<'a>,
    waited: Duration,
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
                    ) && self.waited < self.watched.invitation.deadline =>
                {
                    self.waited += GLANCE;
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
        stream.write_all(&[MAGIC.as_slice(), &challenge].concat())?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use distillery_common::seed::{Purpose, Stream};

    const SECRET: [u8; 32] = [7; 32];

    fn greeting(direction: Direction) -> Greeting {
        Greeting {
            direction: direction as u8,
            generation: 3,
            rank: 1,
            world: 2,
            stage: "seg8".into(),
            nonce: [5; 32],
        }
    }

    fn bytes(greeting: &Greeting, challenge: &Nonce) -> Vec<u8> {
        let mut bytes = Vec::new();
        greeting.write(&mut bytes, &SECRET, challenge).unwrap();
        bytes
    }

    #[test]
    fn a_seal_holds_for_one_challenge_one_direction_and_every_byte() {
        let call = greeting(Direction::Call);
        let whole = bytes(&call, &[1; 32]);
        let heard = Greeting::read(&mut whole.as_slice()).unwrap();
        assert_eq!(call.difference(&SECRET, &[1; 32], &heard), None);
        assert!(call.difference(&SECRET, &[2; 32], &heard).is_some());
        assert!(call.difference(&[8; 32], &[1; 32], &heard).is_some());
        let answer = greeting(Direction::Answer);
        assert!(answer.difference(&SECRET, &[1; 32], &heard).is_some());
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(heard) = Greeting::read(&mut flipped.as_slice()) {
                assert!(call.difference(&SECRET, &[1; 32], &heard).is_some());
            }
        }
    }

    /// Greetings that were changed, cut and added to at random: none is believed, none breaks the reader.
    #[test]
    fn no_changed_bytes_are_taken_for_a_greeting() {
        let call = greeting(Direction::Call);
        let whole = bytes(&call, &[1; 32]);
        let mut stream = Stream::new(1, Purpose::Bootstrap, 0, 0);
        for _ in 0..20_000 {
            let mut changed = whole.clone();
            for _ in 0..=stream.below(8) {
                let at = stream.below(changed.len() as u32) as usize;
                changed[at] = stream.below(256) as u8;
            }
            changed.truncate(stream.below(2 * whole.len() as u32) as usize);
            if changed.get(..whole.len()) == Some(whole.as_slice()) {
                continue;
            }
            let _ = read_challenge(&mut changed.as_slice());
            if let Ok(heard) = Greeting::read(&mut changed.as_slice()) {
                assert!(call.difference(&SECRET, &[1; 32], &heard).is_some());
            }
        }
    }
}
