//! Text that tells whether it is whole: a last line holds the digest of what stands before it.
//!
//! For objects that are caches of others. One that is damaged is passed over, never believed.

use bytes::Bytes;

use distillery_common::ids::Digest;

/// `body`, sealed.
pub(crate) fn write(mut body: Vec<u8>) -> Bytes {
    let digest = Digest::of(&body);
    body.extend_from_slice(format!("\n{digest}\n").as_bytes());
    body.into()
}

/// What was sealed, if it is whole.
pub(crate) fn read(bytes: &[u8]) -> Result<&[u8], String> {
    let lines = bytes.strip_suffix(b"\n").ok_or("it is cut off")?;
    let end = lines.iter().rposition(|&byte| byte == b'\n');
    let (body, digest) = lines.split_at(end.ok_or("it has no digest")?);
    if digest[1..] == *Digest::of(body).to_string().as_bytes() {
        Ok(body)
    } else {
        Err("its digest is another".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_and_every_flipped_bit_is_seen() {
        let whole = write(b"some text".to_vec());
        assert_eq!(read(&whole), Ok(&b"some text"[..]));
        for end in 0..whole.len() {
            assert!(read(&whole[..end]).is_err(), "cut at {end}");
        }
        for at in 0..whole.len() * 8 {
            let mut flipped = whole.to_vec();
            flipped[at / 8] ^= 1 << (at % 8);
            assert!(read(&flipped).is_err(), "bit {at}");
        }
    }
}
