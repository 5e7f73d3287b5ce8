//! The values of a page: levels, texts and numbers of a dictionary, from bytes that are not trusted.
//!
//! What a count claims is never made room for; every value is paid for by bytes, or is a run that is walked.

use super::pages::{DataPage, Values};

/// What is wrong with a page.
type Result<T> = std::result::Result<T, String>;

/// The texts of a dictionary page, each with its place in the page.
#[derive(Debug, Default)]
pub(super) struct Dictionary {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Dictionary {
    /// Takes in a dictionary of `count` texts.
    pub(super) fn new(bytes: Vec<u8>, count: u32) -> Result<Self> {
        let mut plain = Plain(&bytes);
        let mut ends = Vec::new();
        for _ in 0..count {
            plain.next_text()?;
            ends.push(bytes.len() - plain.0.len());
        }
        Ok(Self { bytes, ends })
    }

    fn text(&self, number: u32) -> Result<&[u8]> {
        let number = number as usize;
        let missing = || format!("the dictionary has no text {number}");
        let end = *self.ends.get(number).ok_or_else(missing)?;
        let before = number.checked_sub(1).map_or(0, |before| self.ends[before]);
        Ok(&self.bytes[before + LENGTH_BYTES..end])
    }
}

/// Calls `take` with the text of every row of `page`, or none where it is missing.
pub(super) fn each_text(
    page: &DataPage,
    is_optional: bool,
    dictionary: Option<&Dictionary>,
    mut take: impl FnMut(Option<&[u8]>) -> Result<()>,
) -> Result<()> {
    let (levels, data) = page.split(is_optional)?;
    let mut present = Hybrid::new(levels, 1);
    let mut values = match page.values {
        Values::Plain => Texts::Plain(Plain(data)),
        Values::Dictionary => {
            let dictionary = dictionary.ok_or("a page needs a dictionary, and there is none")?;
            let (&bits, numbers) = data.split_first().unwrap_or((&0, &[]));
            if bits > 32 {
                return Err(format!("numbers of {bits} bits"));
            }
            Texts::Dictionary(dictionary, Hybrid::new(numbers, u32::from(bits)))
        }
    };
    for _ in 0..page.count {
        let is_there = !is_optional || present.next_number()? == 1;
        take(if is_there {
            Some(values.next_text()?)
        } else {
            None
        })?;
    }
    Ok(())
}

/// Where the texts of a page come from.
enum Texts<'a> {
    Plain(Plain<'a>),
    Dictionary(&'a Dictionary, Hybrid<'a>),
}

impl<'a> Texts<'a> {
    fn next_text(&mut self) -> Result<&'a [u8]> {
        match self {
            Self::Plain(plain) => plain.next_text(),
            Self::Dictionary(dictionary, numbers) => dictionary.text(numbers.next_number()?),
        }
    }
}

const LENGTH_BYTES: usize = 4;

/// Texts one after the other, each behind its length.
struct Plain<'a>(&'a [u8]);

impl<'a> Plain<'a> {
    fn next_text(&mut self) -> Result<&'a [u8]> {
        let short = || String::from("a page ends within a text");
        let (len, rest) = self
            .0
            .split_first_chunk::<LENGTH_BYTES>()
            .ok_or_else(short)?;
        let len = u32::from_le_bytes(*len) as usize;
        let (text, rest) = rest.split_at_checked(len).ok_or_else(short)?;
        self.0 = rest;
        Ok(text)
    }
}

/// Numbers of a fixed width: runs of one number, and numbers packed to bits, eight at a time.
struct Hybrid<'a> {
    bytes: &'a [u8],
    width: u32,
    left: u64,
    run: Run<'a>,
}

enum Run<'a> {
    Of(u32),
    Packed { bytes: &'a [u8], bit: usize },
}

impl<'a> Hybrid<'a> {
    fn new(bytes: &'a [u8], width: u32) -> Self {
        Self {
            bytes,
            width,
            left: 0,
            run: Run::Of(0),
        }
    }

    fn next_number(&mut self) -> Result<u32> {
        while self.left == 0 {
            self.next_run()?;
        }
        self.left -= 1;
        match &mut self.run {
            Run::Of(number) => Ok(*number),
            Run::Packed { bytes, bit } => {
                let mut number = 0u64;
                for at in 0..self.width as usize {
                    let place = *bit + at;
                    let byte = bytes
                        .get(place / 8)
                        .ok_or("a page ends within its numbers")?;
                    number |= u64::from(byte >> (place % 8) & 1) << at;
                }
                *bit += self.width as usize;
                Ok(number as u32)
            }
        }
    }

    fn next_run(&mut self) -> Result<()> {
        let short = || String::from("a page ends before its numbers do");
        let mut head = 0u64;
        for shift in (0..35).step_by(7) {
            let (&byte, rest) = self.bytes.split_first().ok_or_else(short)?;
            self.bytes = rest;
            head |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let width = self.width as usize;
        if head & 1 == 1 {
            let groups = (head >> 1) as usize;
            // The last groups may be cut short where nothing is in them.
            let len = groups.saturating_mul(width).min(self.bytes.len());
            let (bytes, rest) = self.bytes.split_at(len);
            self.bytes = rest;
            self.left = groups as u64 * 8;
            self.run = Run::Packed { bytes, bit: 0 };
        } else {
            let (number, rest) = self
                .bytes
                .split_at_checked(width.div_ceil(8))
                .ok_or_else(short)?;
            self.bytes = rest;
            self.left = head >> 1;
            let number = number
                .iter()
                .rev()
                .fold(0, |number, &byte| number << 8 | u32::from(byte));
            self.run = Run::Of(number);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(bytes: &[u8], width: u32, count: usize) -> Result<Vec<u32>> {
        let mut hybrid = Hybrid::new(bytes, width);
        (0..count).map(|_| hybrid.next_number()).collect()
    }

    /// The packed bytes are those of the example in the format's own description.
    #[test]
    fn runs_and_packed_numbers_are_read_in_their_order() {
        let packed = [0b0000_0011, 0b1000_1000, 0b1100_0110, 0b1111_1010];
        assert_eq!(numbers(&packed, 3, 8), Ok((0..8).collect()));
        let run = [&[6, 5][..], &packed].concat();
        assert_eq!(numbers(&run, 3, 6), Ok(vec![5, 5, 5, 0, 1, 2]));
        assert_eq!(numbers(&[4, 0x34, 0x12], 13, 2), Ok(vec![0x1234, 0x1234]));
        assert_eq!(numbers(&[3], 0, 8), Ok(vec![0; 8]));
    }

    #[test]
    fn numbers_that_are_not_there_are_refused() {
        assert!(numbers(&[], 3, 1).is_err());
        assert!(numbers(&[0b11, 0xff], 3, 8).is_err(), "one byte of three");
        assert!(numbers(&[0, 1, 0, 1], 3, 1).is_err(), "runs of nothing");
        assert!(numbers(&[0xff; 5], 32, 1).is_err());
    }

    #[test]
    fn a_dictionary_gives_the_texts_that_it_has() {
        let bytes = b"\x02\0\0\0ab\0\0\0\0\x01\0\0\0c".to_vec();
        let dictionary = Dictionary::new(bytes.clone(), 3).expect("three texts");
        let texts: Vec<&[u8]> = (0..3)
            .map(|n| dictionary.text(n).expect("it is there"))
            .collect();
        assert_eq!(texts, [&b"ab"[..], b"", b"c"]);
        assert!(dictionary.text(3).is_err());
        assert!(Dictionary::new(bytes, u32::MAX).is_err());
    }
}
