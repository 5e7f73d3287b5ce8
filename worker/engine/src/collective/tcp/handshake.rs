//! How two neighbours make sure that they are meant for each other.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

use super::{Error, Invitation, Links};

/// First bytes of every connection; the number is the version of the ring's protocol.
const MAGIC: [u8; 8] = *b"dstring1";

/// Bytes of a greeting: magic, token, generation, rank, world, length of the stage's name.
const FIXED: usize = 8 + 32 + 8 + 4 + 4 + 2;

/// Longest stage name of a greeting.
const LONGEST_STAGE: usize = 256;

/// Connections turned away before the wait is given up.
const MOST_STRANGERS: u32 = 64;

/// How often a listener looks for its neighbour.
const LOOK: Duration = Duration::from_millis(2);

/// How often a member that waits for an answer looks whether the group was given up.
const GLANCE: Duration = Duration::from_millis(50);

/// How long one try to reach a neighbour may take before the group is looked at again.
const LONGEST_CALL: Duration = Duration::from_secs(1);

/// How long a connection may take over its greeting: strangers must not hold up the neighbour.
const LONGEST_GREETING: Duration = Duration::from_secs(2);

/// What a member says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Greeting {
    token: [u8; 32],
    generation: u64,
    rank: u32,
    world: u32,
    stage: String,
}

impl Greeting {
    fn of(invitation: &Invitation<'_>, rank: u32) -> Self {
        Self {
            token: invitation.token,
            generation: invitation.group.generation.0,
            rank,
            world: invitation.peers.len() as u32,
            stage: invitation.group.stage.clone(),
        }
    }

    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(FIXED + self.stage.len());
        bytes.extend(MAGIC);
        bytes.extend(self.token);
        bytes.extend(self.generation.to_le_bytes());
        bytes.extend(self.rank.to_le_bytes());
        bytes.extend(self.world.to_le_bytes());
        bytes.extend((self.stage.len() as u16).to_le_bytes());
        bytes.extend(self.stage.as_bytes());
        to.write_all(&bytes)
    }

    fn read(from: &mut impl Read) -> io::Result<Self> {
        let malformed = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let mut take = |len: usize| -> io::Result<Vec<u8>> {
            let mut bytes = vec![0; len];
            from.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        if take(MAGIC.len())? != MAGIC {
            return Err(malformed("it is no member of a ring"));
        }
        let token = fixed(&take(32)?);
        let generation = u64::from_le_bytes(fixed(&take(8)?));
        let rank = u32::from_le_bytes(fixed(&take(4)?));
        let world = u32::from_le_bytes(fixed(&take(4)?));
        let len = usize::from(u16::from_le_bytes(fixed(&take(2)?)));
        if len > LONGEST_STAGE {
            return Err(malformed("its stage name is too long"));
        }
        let stage = String::from_utf8(take(len)?).map_err(|_| malformed("its stage is no text"))?;
        Ok(Self {
            token,
            generation,
            rank,
            world,
            stage,
        })
    }

    /// Why `other` is not the expected member, if it is not; says nothing of tokens.
    fn difference(&self, other: &Self) -> Option<String> {
        if self.token != other.token {
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
    Greeting::of(invitation, invitation.rank)
        .write(&mut next)
        .map_err(unreachable)?;
    let previous = wait_for(listener, invitation, previous_rank)?;
    // The neighbour's answer: it accepted this rank's greeting.
    let answer = answer(&next, invitation).map_err(|source| Error::Setup {
        reason: format!("rank {next_rank} did not answer: {source}"),
    })?;
    match Greeting::of(invitation, next_rank).difference(&answer) {
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
fn answer(next: &TcpStream, invitation: &Invitation<'_>) -> io::Result<Greeting> {
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

/// Accepts until the expected rank has greeted, and answers it; everybody else is hung up on.
fn wait_for(
    listener: &TcpListener,
    invitation: &Invitation<'_>,
    rank: u32,
) -> Result<TcpStream, Error> {
    let failed = |source: io::Error| Error::Setup {
        reason: format!("this rank cannot listen: {source}"),
    };
    listener.set_nonblocking(true).map_err(failed)?;
    let mut looks = invitation.deadline.as_millis() / LOOK.as_millis() + 1;
    let mut refused = Vec::new();
    while looks > 0 && !invitation.ended.is_set() && refused.len() < MOST_STRANGERS as usize {
        match listener.accept() {
            Ok((stream, _)) => match admit(stream, invitation, rank) {
                Ok(stream) => return Ok(stream),
                Err(why) => refused.push(why),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(LOOK);
                looks -= 1;
            }
            Err(error) => return Err(failed(error)),
        }
    }
    if invitation.ended.is_set() {
        return Err(Error::Aborted);
    }
    let turned_away = match refused.last() {
        Some(last) => format!(
            "; {} were turned away, the last because {last}",
            refused.len()
        ),
        None => String::new(),
    };
    Err(Error::Setup {
        reason: format!("rank {rank} did not call within the deadline{turned_away}"),
    })
}

/// Checks a caller's greeting and answers it.
fn admit(stream: TcpStream, invitation: &Invitation<'_>, rank: u32) -> Result<TcpStream, String> {
    let told = |error: io::Error| error.to_string();
    let patience = invitation.deadline.min(LONGEST_GREETING);
    let mut stream = prepare(stream, patience).map_err(told)?;
    let greeting = Greeting::read(&mut stream).map_err(told)?;
    if let Some(difference) = Greeting::of(invitation, rank).difference(&greeting) {
        return Err(difference);
    }
    Greeting::of(invitation, invitation.rank)
        .write(&mut stream)
        .map_err(told)?;
    prepare(stream, invitation.deadline).map_err(told)
}
