//! How two neighbours make sure that they are meant for each other.
//!
//! A greeting names its sender's place and carries a seal that only a holder of the group's secret can make. The secret
//! itself is never sent. A generation is never used twice, so a greeting that was recorded is of no use in a later one.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

use distillery_common::security::GroupSecret;

use super::{Error, Invitation, Links};

/// First bytes of every connection; the number is the version of the ring's protocol.
const MAGIC: [u8; 8] = *b"dstring2";

/// Bytes of a greeting: magic, seal, direction, generation, rank, world, length of the stage's name.
const FIXED: usize = 8 + 32 + 1 + 8 + 4 + 4 + 2;

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
}

impl Greeting {
    fn of(invitation: &Invitation<'_>, rank: u32, direction: Direction) -> Self {
        Self {
            direction: direction as u8,
            generation: invitation.group.generation.0,
            rank,
            world: invitation.peers.len() as u32,
            stage: invitation.group.stage.clone(),
        }
    }

    /// What is sealed.
    fn words(&self) -> Vec<u8> {
        let mut words = Vec::with_capacity(FIXED + self.stage.len());
        words.push(self.direction);
        words.extend(self.generation.to_le_bytes());
        words.extend(self.rank.to_le_bytes());
        words.extend(self.world.to_le_bytes());
        words.extend((self.stage.len() as u16).to_le_bytes());
        words.extend(self.stage.as_bytes());
        words
    }

    fn write(&self, to: &mut impl Write, secret: &[u8; 32]) -> io::Result<()> {
        let words = self.words();
        let mut bytes = MAGIC.to_vec();
        bytes.extend(GroupSecret(*secret).seal(&words));
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
        };
        Ok((greeting, fixed(&head[8..40])))
    }

    /// Why what was heard is not the expected greeting, if it is not; says nothing of secrets.
    fn difference(&self, secret: &[u8; 32], (other, seal): &(Self, [u8; 32])) -> Option<String> {
        if !GroupSecret(*secret).sealed(&other.words(), seal) {
            return Some("its token is not this run's".to_owned());
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

/// Calls the next rank, hears from the previous one, and checks both.
pub(super) fn join(listener: &TcpListener, invitation: &Invitation<'_>) -> Result<Links, Error> {
    let world = invitation.peers.len() as u32;
    let next_rank = (invitation.rank + 1) % world;
    let previous_rank = (invitation.rank + world - 1) % world;
    let unreachable = |source: io::Error| Error::Setup {
        reason: format!(
            "rank {next_rank} at {} cannot be reached: {source}",
            invitation.peers[next_rank as usize]
        ),
    };
    let mut next = call(&invitation.peers[next_rank as usize], invitation)
        .and_then(|stream| prepare(stream, invitation.deadline))
        .map_err(unreachable)?;
    Greeting::of(invitation, invitation.rank, Direction::Call)
        .write(&mut next, &invitation.token)
        .map_err(unreachable)?;
    let previous = wait_for(listener, invitation, previous_rank)?;
    // The neighbour's answer: it accepted this rank's greeting.
    let answer = answer(&next, invitation).map_err(|source| Error::Setup {
        reason: format!("rank {next_rank} did not answer: {source}"),
    })?;
    let expected = Greeting::of(invitation, next_rank, Direction::Answer);
    match expected.difference(&invitation.token, &answer) {
        Some(difference) => Err(Error::Setup {
            reason: format!("rank {next_rank} answered, but {difference}"),
        }),
        None => Ok(Links { next, previous }),
    }
}

/// Connects to the first of a name's addresses that answers within the deadline.
fn call(address: &str, invitation: &Invitation<'_>) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        let mut waited = Duration::ZERO;
        while waited < invitation.deadline {
            given_up(invitation)?;
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

/// The greeting with which the next rank answers, as soon as it is ready to.
fn answer(next: &TcpStream, invitation: &Invitation<'_>) -> io::Result<(Greeting, [u8; 32])> {
    next.set_read_timeout(Some(GLANCE))?;
    let answer = Greeting::read(&mut Patient {
        stream: next,
        invitation,
        waited: Duration::ZERO,
    });
    next.set_read_timeout(Some(invitation.deadline))?;
    answer
}

/// Reads from a stream whose own timeout is [`GLANCE`], until the invitation's deadline or end.
struct Patient<'a> {
    stream: &'a TcpStream,
    invitation: &'a Invitation<'a>,
    waited: Duration,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            given_up(self.invitation)?;
            match self.stream.read(buffer) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) && self.waited < self.invitation.deadline =>
                {
                    self.waited += GLANCE;
                }
                read => return read,
            }
        }
    }
}

fn given_up(invitation: &Invitation<'_>) -> io::Result<()> {
    match invitation.ended.is_set() {
        true => Err(io::Error::other("the group was given up")),
        false => Ok(()),
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
fn wait_for(
    listener: &TcpListener,
    invitation: &Invitation<'_>,
    rank: u32,
) -> Result<TcpStream, Error> {
    let failed = |source: io::Error| Error::Setup {
        reason: format!("this rank cannot listen: {source}"),
    };
    listener.set_nonblocking(true).map_err(failed)?;
    let expected = Greeting::of(invitation, rank, Direction::Call);
    let mut looks = invitation.deadline.as_millis() / LOOK.as_millis() + 1;
    let mut callers: VecDeque<Caller> = VecDeque::new();
    let mut refused = Refused::default();
    let mut calls = 0u64;
    while looks > 0 && !invitation.ended.is_set() {
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
            match caller.hear(&expected, &invitation.token) {
                Ok(false) => callers.push_back(caller),
                Ok(true) => match welcome(caller.stream, invitation) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => refused.note(&error.to_string()),
                },
                Err(why) => refused.note(&why),
            }
        }
    }
    if invitation.ended.is_set() {
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
    heard: Vec<u8>,
}

impl Caller {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            heard: Vec::new(),
        })
    }

    /// Takes what has arrived, and not a byte beyond the greeting. Gives whether it is `expected`; an error is the
    /// reason to hang up.
    fn hear(&mut self, expected: &Greeting, secret: &[u8; 32]) -> Result<bool, String> {
        loop {
            let missing = match Greeting::read(&mut self.heard.as_slice()) {
                Ok(greeting) => {
                    return match expected.difference(secret, &greeting) {
                        None => Ok(true),
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
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
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
fn welcome(stream: TcpStream, invitation: &Invitation<'_>) -> io::Result<TcpStream> {
    let mut stream = prepare(stream, invitation.deadline)?;
    Greeting::of(invitation, invitation.rank, Direction::Answer)
        .write(&mut stream, &invitation.token)?;
    Ok(stream)
}
