//! Changes of an input, from a stream of random words: the same seed makes the same inputs.

use distillery_common::seed::Stream;

/// Longest input that changes make.
const LONGEST: usize = 1 << 20;
/// Most changes of one input.
const CHANGES: u32 = 6;
/// Most bytes that one change inserts or takes.
const PIECE: u32 = 64;
/// Numbers at which lengths, counts and offsets tend to break.
const NUMBERS: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 60,
    i64::MAX as u64,
    u64::MAX,
];
/// Texts at which readers of text tend to break.
const TEXTS: [&str; 14] = [
    "-1",
    "1e999",
    "NaN",
    "null",
    "18446744073709551615",
    "99999999999999999999",
    "\"\"",
    "[]",
    "{}",
    "../",
    "\u{0}",
    "\u{fffd}",
    "&a *a",
    "${env:HOME}",
];

/// `input`, changed a few times; `other` lends pieces.
pub fn mutate(input: &[u8], other: &[u8], stream: &mut Stream) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=stream.below(CHANGES) {
        change(&mut bytes, other, stream);
    }
    bytes.truncate(LONGEST);
    bytes
}

/// A place in `bytes`, its end included.
fn place(bytes: &[u8], stream: &mut Stream) -> usize {
    stream.below(bytes.len() as u32 + 1) as usize
}

/// A piece of `bytes`, maybe empty.
fn piece<'a>(bytes: &'a [u8], stream: &mut Stream) -> &'a [u8] {
    let from = place(bytes, stream);
    let len = stream.below(PIECE) as usize;
    &bytes[from..bytes.len().min(from + len)]
}

fn change(bytes: &mut Vec<u8>, other: &[u8], stream: &mut Stream) {
    let at = place(bytes, stream);
    match stream.below(9) {
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << stream.below(8);
            }
        }
        1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = stream.next_u32() as u8;
            }
        }
        2 => number(bytes, at, stream),
        3 => {
            let len = piece(bytes, stream).len().min(bytes.len() - at);
            bytes.drain(at..at + len);
        }
        4 => {
            let copied = piece(bytes, stream).to_vec();
            bytes.splice(at..at, copied);
        }
        5 => {
            let lent = piece(other, stream).to_vec();
            bytes.splice(at..at, lent);
        }
        6 => {
            let text = TEXTS[stream.below(TEXTS.len() as u32) as usize];
            bytes.splice(at..at, text.bytes());
        }
        7 => bytes.truncate(at),
        _ => digits(bytes, at, stream),
    }
}

/// Writes a number over what stands at `at`, in one of the ways that formats store them.
fn number(bytes: &mut [u8], at: usize, stream: &mut Stream) {
    let number = NUMBERS[stream.below(NUMBERS.len() as u32) as usize];
    let stored = match stream.below(4) {
        0 => number.to_le_bytes().to_vec(),
        1 => (number as u32).to_le_bytes().to_vec(),
        2 => number.to_be_bytes().to_vec(),
        _ => varint(number),
    };
    for (to, from) in bytes[at..].iter_mut().zip(stored) {
        *to = from;
    }
}

/// A number as Thrift and Protocol Buffers store it.
fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// Puts another number in the place of the digits at or after `at`.
fn digits(bytes: &mut Vec<u8>, at: usize, stream: &mut Stream) {
    let is_digit = |byte: &u8| byte.is_ascii_digit();
    let Some(from) = bytes[at..]
        .iter()
        .position(is_digit)
        .map(|found| at + found)
    else {
        return;
    };
    let len = bytes[from..]
        .iter()
        .take_while(|byte| is_digit(byte))
        .count();
    let number = NUMBERS[stream.below(NUMBERS.len() as u32) as usize];
    bytes.splice(from..from + len, number.to_string().into_bytes());
}
