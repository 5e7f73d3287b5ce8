//! Numbers that name things, each in a type of its own.

use std::fmt;

/// One coordinator life. Durable, strictly increasing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Term(pub u64);

/// One worker registration: `term << 32 | n`, so it never repeats across coordinator restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Incarnation(pub u64);

impl Incarnation {
    /// The `n`th registration of `term`.
    pub fn new(term: Term, n: u32) -> Self {
        Self(term.0 << 32 | u64::from(n))
    }

    /// The coordinator life that gave this registration.
    pub fn term(self) -> Term {
        Term(self.0 >> 32)
    }
}

/// One formation of a training group. Durable, strictly increasing over the whole run, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

macro_rules! display_number {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

display_number!(Term, Incarnation, Generation);

/// A SHA-256, shown as hex.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// Reads 64 hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }

    /// The first 16 hex digits, enough to name a folder.
    pub fn short(&self) -> String {
        self.to_string()[..16].to_owned()
    }
}

/// A digest of bytes that come one after the other.
#[derive(Debug, Clone, Default)]
pub struct Digesting(sha2::Sha256);

impl Digesting {
    /// Takes in the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        sha2::Digest::update(&mut self.0, bytes);
    }

    /// The digest of all of them.
    pub fn finish(self) -> Digest {
        Digest(sha2::Digest::finalize(self.0).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incarnation_remembers_its_term() {
        assert_eq!(Incarnation::new(Term(7), 3).term(), Term(7));
        assert!(Incarnation::new(Term(7), u32::MAX) < Incarnation::new(Term(8), 0));
    }

    #[test]
    fn a_digest_reads_what_it_prints() {
        let digest = Digest::of(b"abc");
        assert!(digest.to_string().starts_with("ba7816bf8f01cfea"));
        assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
        assert_eq!(Digest::parse("xyz"), None);
    }
}
