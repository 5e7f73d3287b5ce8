//! Messages on the socket between a worker and its engine: prost, each after its length as u32 little endian.
//!
//! Knows nothing of what the messages say.

use std::io;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Longest message that either side accepts, in bytes: a COMMIT that names every tensor of a large student
/// stays below a tenth of it.
pub const MAX_FRAME_BYTES: u32 = 16 << 20;

/// What went wrong on the socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket broke, or closed inside a message.
    #[error("the engine's socket failed")]
    Io(#[from] io::Error),
    /// A message longer than any correct one.
    #[error("a message of {0} bytes on the engine's socket, {MAX_FRAME_BYTES} are allowed")]
    TooLong(u64),
    /// Bytes that are no message.
    #[error("a message on the engine's socket cannot be read")]
    Decode(#[from] prost::DecodeError),
}

/// Writes one message.
pub async fn write<W: AsyncWrite + Unpin, M: Message>(
    socket: &mut W,
    message: &M,
) -> Result<(), Error> {
    let len = message.encoded_len();
    let short = u32::try_from(len)
        .ok()
        .filter(|&len| len <= MAX_FRAME_BYTES);
    let Some(short) = short else {
        return Err(Error::TooLong(len as u64));
    };
    let mut frame = Vec::with_capacity(4 + len);
    frame.extend_from_slice(&short.to_le_bytes());
    message
        .encode(&mut frame)
        .expect("a Vec grows as far as a message needs");
    socket.write_all(&frame).await?;
    socket.flush().await?;
    Ok(())
}

/// Reads one message; none when the other side closed the socket between two messages.
///
/// Not safe to cancel: a loop of its own must own the reading half.
pub async fn read<R: AsyncRead + Unpin, M: Message + Default>(
    socket: &mut R,
) -> Result<Option<M>, Error> {
    let mut head = [0; 4];
    match socket.read(&mut head[..1]).await? {
        0 => return Ok(None),
        _ => socket.read_exact(&mut head[1..]).await?,
    };
    let len = u32::from_le_bytes(head);
    if len > MAX_FRAME_BYTES {
        return Err(Error::TooLong(len.into()));
    }
    let mut body = vec![0; len as usize];
    socket.read_exact(&mut body).await?;
    Ok(Some(M::decode(body.as_slice())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::wire;

    fn some_message() -> wire::Revoke {
        wire::Revoke {
            lease: None,
            reason: "because".into(),
        }
    }

    #[tokio::test]
    async fn messages_arrive_as_they_were_sent() {
        let (mut near, mut far) = tokio::io::duplex(64);
        write(&mut near, &some_message()).await.expect("fits");
        write(&mut near, &some_message()).await.expect("fits");
        drop(near);
        for _ in 0..2 {
            let read = read::<_, wire::Revoke>(&mut far).await.expect("whole");
            assert_eq!(read, Some(some_message()));
        }
        let end = read::<_, wire::Revoke>(&mut far).await.expect("closed");
        assert_eq!(end, None);
    }

    #[tokio::test]
    async fn a_cut_message_is_an_error_at_every_byte() {
        let mut whole = Vec::new();
        write(&mut whole, &some_message()).await.expect("fits");
        for cut in 1..whole.len() {
            let read = read::<_, wire::Revoke>(&mut &whole[..cut]).await;
            assert!(matches!(read, Err(Error::Io(_))), "cut at {cut}");
        }
    }

    #[tokio::test]
    async fn an_absurd_length_is_refused_before_memory_is_taken() {
        let absurd = u32::MAX.to_le_bytes();
        let read = read::<_, wire::Revoke>(&mut absurd.as_slice()).await;
        assert!(matches!(read, Err(Error::TooLong(_))));
    }
}
