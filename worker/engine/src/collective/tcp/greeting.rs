//! What neighbours say before they trust each other, byte by byte; nothing here waits or connects.

use std::io::{self, Read, Write};

use distillery_common::security::{self, GroupSecret};

use super::Invitation;

/// First bytes of every connection; the number is the version of the ring's protocol.
const MAGIC: [u8; 8] = *b"dstring3";

/// Random bytes of one side of a connection.
pub(super) type Nonce = [u8; 32];

/// Bytes of a challenge: magic, the listener's random bytes.
const CHALLENGE: usize = 8 + 32;

/// Bytes of a greeting without the stage's name: magic, seal, direction, generation, rank, world, length of the
/// stage's name, the caller's random bytes.
pub(super) const FIXED: usize = 8 + 32 + 1 + 8 + 4 + 4 + 2 + 32;

/// Longest stage name of a greeting.
const LONGEST_STAGE: usize = 256;

/// Who says a greeting: one that was recorded is no answer to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Call = 1,
    Answer = 2,
}

/// What a member says of itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    direction: u8,
    generation: u64,
    rank: u32,
    world: u32,
    stage: String,
    /// The caller's, which its answer repeats.
    pub(super) nonce: Nonce,
}

impl Greeting {
    pub(super) fn of(
        invitation: &Invitation<'_>,
        rank: u32,
        direction: Direction,
        nonce: Nonce,
    ) -> Self {
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

    pub(super) fn write(
        &self,
        to: &mut impl Write,
        secret: &[u8; 32],
        challenge: &Nonce,
    ) -> io::Result<()> {
        let words = self.words();
        let mut bytes = MAGIC.to_vec();
        bytes.extend(GroupSecret(*secret).seal(&self.sealed_words(challenge)));
        bytes.extend(words);
        to.write_all(&bytes)
    }

    /// Reads a greeting and its seal.
    pub(super) fn read(from: &mut impl Read) -> io::Result<(Self, [u8; 32])> {
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
    pub(super) fn difference(
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
pub(super) fn stage_len(head: &[u8; FIXED]) -> io::Result<usize> {
    match usize::from(u16::from_le_bytes(fixed(&head[57..59]))) {
        len if len > LONGEST_STAGE => Err(malformed("its stage name is too long")),
        len => Ok(len),
    }
}

/// `bytes` as an array; the caller read exactly N.
fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("as many bytes were read")
}

pub(super) fn nonce() -> io::Result<Nonce> {
    security::nonce().map_err(io::Error::other)
}

/// What the listener says first.
pub(super) fn challenge_bytes(challenge: &Nonce) -> Vec<u8> {
    [MAGIC.as_slice(), challenge].concat()
}

/// Reads it.
pub(super) fn read_challenge(from: &mut impl Read) -> io::Result<Nonce> {
    let mut challenge = [0; CHALLENGE];
    from.read_exact(&mut challenge)?;
    match challenge.strip_prefix(&MAGIC) {
        Some(nonce) => Ok(fixed(nonce)),
        None => Err(malformed("it is no member of a ring")),
    }
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
