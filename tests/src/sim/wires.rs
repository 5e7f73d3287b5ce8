//! A star of TCP streams between the members of a group: rank 0 adds up in rank order and tells everybody.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use distillery_common::group::Membership;
use distillery_common::ledger::PLACES;
use distillery_common::security::GroupSecret;
use distillery_common::telemetry::Stopwatch;

/// Numbers in a sum.
pub(super) const WIDTH: usize = 32;
/// Numbers that are added up in a step: the rows', and the ledger's.
pub(super) const SUMS: usize = WIDTH + PLACES;
/// The longest that is brought to a choice.
const MAX_BYTES: usize = 64 << 20;
/// How often a waiting member looks whether it is still wanted.
const GLANCE: Duration = Duration::from_millis(20);
/// How long members wait for each other.
const DEADLINE: Duration = Duration::from_secs(30);

/// Why a sum did not come about.
#[derive(Debug)]
pub(super) enum Broken {
    /// The caller asked to stop.
    Stopped,
    /// A peer is gone or speaks nonsense.
    Peer(io::Error),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Peer(error)
    }
}

/// The streams of one member. Rank 0 has one for each other rank, in order; the others have one.
pub(super) struct Star {
    rank: u32,
    streams: Vec<TcpStream>,
}

impl Star {
    /// Connects the members. `stop` is asked now and then whether to give up.
    pub(super) fn connect(
        listener: &TcpListener,
        membership: &Membership,
        peers: &[String],
        secret: GroupSecret,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<Self, Broken> {
        let mut greeting = secret.0.to_vec();
        greeting.extend(membership.group.generation.0.to_le_bytes());
        let mut star = Self {
            rank: membership.rank,
            streams: Vec::new(),
        };
        if membership.rank > 0 {
            let root = peers.first().ok_or(io::ErrorKind::InvalidInput);
            let mut stream = TcpStream::connect(root.map_err(io::Error::from)?)?;
            prepare(&stream)?;
            greeting.extend(membership.rank.to_le_bytes());
            stream.write_all(&greeting)?;
            star.streams.push(stream);
            return Ok(star);
        }
        listener.set_nonblocking(true)?;
        let mut members: Vec<Option<TcpStream>> = Vec::new();
        members.resize_with(membership.world as usize - 1, || None);
        let watch = Stopwatch::start();
        while members.iter().any(Option::is_none) {
            if stop() {
                return Err(Broken::Stopped);
            }
            if watch.elapsed() > DEADLINE {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            let mut stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(GLANCE);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            stream.set_nonblocking(false)?;
            prepare(&stream)?;
            let mut shown = vec![0; greeting.len() + 4];
            read_full(&mut stream, &mut shown, stop)?;
            let (who, rank) = shown.split_at(greeting.len());
            let rank = u32::from_le_bytes(std::array::from_fn(|i| rank[i])) as usize;
            // A stranger, or a member of a generation that has ended, is not let in.
            if who == greeting && (1..=members.len()).contains(&rank) {
                members[rank - 1] = Some(stream);
            }
        }
        star.streams = members.into_iter().flatten().collect();
        Ok(star)
    }

    /// What rank 0 chooses among what all ranks bring, in rank order: everybody gets it.
    pub(super) fn choose<E: From<Broken>>(
        &mut self,
        own: Vec<u8>,
        choose: impl FnOnce(Vec<Vec<u8>>) -> Result<Vec<u8>, E>,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<Vec<u8>, E> {
        if self.rank > 0 {
            send_bytes(&mut self.streams[0], &own).map_err(Broken::from)?;
            return Ok(receive_bytes(&mut self.streams[0], stop)?);
        }
        let mut all = vec![own];
        for stream in &mut self.streams {
            all.push(receive_bytes(stream, stop)?);
        }
        let chosen = choose(all)?;
        for stream in &mut self.streams {
            send_bytes(stream, &chosen).map_err(Broken::from)?;
        }
        Ok(chosen)
    }

    /// The sum over all ranks of `own`, equal everywhere.
    pub(super) fn sum(
        &mut self,
        step: u64,
        own: [i64; SUMS],
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<[i64; SUMS], Broken> {
        if self.rank > 0 {
            send(&mut self.streams[0], step, &own)?;
            return receive(&mut self.streams[0], step, stop);
        }
        let mut sum = own;
        for stream in &mut self.streams {
            let theirs = receive(stream, step, stop)?;
            for (sum, value) in sum.iter_mut().zip(theirs) {
                *sum += value;
            }
        }
        for stream in &mut self.streams {
            send(stream, step, &sum)?;
        }
        Ok(sum)
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(GLANCE))
}

fn send(stream: &mut TcpStream, step: u64, values: &[i64; SUMS]) -> io::Result<()> {
    let mut message = step.to_le_bytes().to_vec();
    message.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    stream.write_all(&message)
}

fn send_bytes(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(&(bytes.len() as u64).to_le_bytes())?;
    stream.write_all(bytes)
}

fn receive_bytes(
    stream: &mut TcpStream,
    stop: &mut dyn FnMut() -> bool,
) -> Result<Vec<u8>, Broken> {
    let mut len = [0; 8];
    read_full(stream, &mut len, stop)?;
    let len = u64::from_le_bytes(len) as usize;
    if len > MAX_BYTES {
        return Err(io::Error::other(format!("a peer offers {len} bytes")).into());
    }
    let mut bytes = vec![0; len];
    read_full(stream, &mut bytes, stop)?;
    Ok(bytes)
}

fn receive(
    stream: &mut TcpStream,
    step: u64,
    stop: &mut dyn FnMut() -> bool,
) -> Result<[i64; SUMS], Broken> {
    let mut message = [0; 8 + 8 * SUMS];
    read_full(stream, &mut message, stop)?;
    let word = |at: usize| -> [u8; 8] { std::array::from_fn(|i| message[8 * at + i]) };
    if u64::from_le_bytes(word(0)) != step {
        return Err(io::Error::other("a peer is at another step").into());
    }
    Ok(std::array::from_fn(|i| i64::from_le_bytes(word(i + 1))))
}

fn read_full(
    stream: &mut TcpStream,
    buffer: &mut [u8],
    stop: &mut dyn FnMut() -> bool,
) -> Result<(), Broken> {
    let watch = Stopwatch::start();
    let mut filled = 0;
    while filled < buffer.len() {
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(read) => filled += read,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                if stop() {
                    return Err(Broken::Stopped);
                }
                if watch.elapsed() > DEADLINE {
                    return Err(error.into());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use distillery_common::group::GroupId;
    use distillery_common::ids::{Generation, Term};

    fn member(rank: u32, world: u32) -> Membership {
        Membership {
            group: GroupId {
                stage: "seg4".into(),
                generation: Generation(1),
            },
            rank,
            world,
            base_step: 0,
            base_checkpoint: None,
            parent_checkpoint: None,
            term: Term(1),
        }
    }

    #[test]
    fn everybody_gets_the_same_sum_and_a_stranger_none() {
        let listeners: Vec<_> = (0..3)
            .map(|_| TcpListener::bind("127.0.0.1:0").expect("binds"))
            .collect();
        let peers: Vec<String> = listeners
            .iter()
            .map(|listener| listener.local_addr().expect("bound").to_string())
            .collect();
        let mut stranger = TcpStream::connect(&peers[0]).expect("connects");
        stranger.write_all(&[7; 44]).expect("writes");
        let members: Vec<_> = (0..3u32)
            .zip(listeners)
            .map(|(rank, listener)| {
                let peers = peers.clone();
                std::thread::spawn(move || {
                    let secret = GroupSecret([1; 32]);
                    let never = &mut || false;
                    let mut star =
                        Star::connect(&listener, &member(rank, 3), &peers, secret, never)
                            .expect("connects");
                    star.sum(9, [i64::from(rank) + 1; SUMS], never)
                        .expect("sums")
                })
            })
            .collect();
        for member in members {
            assert_eq!(member.join().expect("no panic"), [6; SUMS]);
        }
    }
}
