//! The compact form of Thrift, as far as headers of pages need it: structs of numbers, truths and structs.
//!
//! Texts and lists are passed over. What may be read, and how deep it may go, is bounded before anything is believed.

use std::collections::BTreeMap;
use std::io::{self, Read};

/// The longest header; one with the longest statistics that a prompt may have is shorter.
const MAX_BYTES: u64 = 1 << 20;
/// Structs within structs.
const MAX_DEPTH: u32 = 8;

/// The fields of a struct by their number. Those that are neither number, truth nor struct are left out.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Struct(BTreeMap<i16, Value>);

#[derive(Debug, PartialEq)]
enum Value {
    Truth(bool),
    Number(i64),
    Struct(Struct),
}

impl Struct {
    /// Reads one struct from where `source` stands, and not a byte more.
    pub(super) fn read(source: &mut impl Read) -> io::Result<Self> {
        Reader(source.take(MAX_BYTES)).fields(0)
    }

    /// A field that must be there and hold a number that fits a length.
    pub(super) fn size(&self, field: i16) -> Result<usize, String> {
        match self.0.get(&field) {
            Some(Value::Number(number)) => usize::try_from(*number)
                .ok()
                .filter(|&size| i32::try_from(size).is_ok())
                .ok_or_else(|| format!("{number} is no size")),
            _ => Err(format!("field {field} is not there or no number")),
        }
    }

    /// A field that holds a truth, if it is there.
    pub(super) fn truth(&self, field: i16) -> Option<bool> {
        match self.0.get(&field) {
            Some(Value::Truth(truth)) => Some(*truth),
            _ => None,
        }
    }

    /// A field that must be there and hold a struct.
    pub(super) fn within(&self, field: i16) -> Result<&Self, String> {
        match self.0.get(&field) {
            Some(Value::Struct(fields)) => Ok(fields),
            _ => Err(format!("field {field} is not there or no struct")),
        }
    }
}

/// What is left of the bytes that one struct may have.
struct Reader<R>(io::Take<R>);

impl<R: Read> Reader<R> {
    fn fields(&mut self, depth: u32) -> io::Result<Struct> {
        if depth > MAX_DEPTH {
            return Err(malformed("structs lie too deep in each other"));
        }
        let mut fields = BTreeMap::new();
        let mut id: i16 = 0;
        loop {
            let head = self.byte()?;
            if head & 0x0f == 0 {
                return Ok(Struct(fields));
            }
            id = match head >> 4 {
                0 => i16::try_from(self.number()?).map_err(|_| malformed("no field number"))?,
                delta => id
                    .checked_add(i16::from(delta))
                    .ok_or_else(|| malformed("no field number"))?,
            };
            // The type of a truth is its value; within lists it takes a byte.
            let value = match head & 0x0f {
                1 => Some(Value::Truth(true)),
                2 => Some(Value::Truth(false)),
                kind => self.value(kind, depth)?,
            };
            if let Some(value) = value {
                fields.insert(id, value);
            }
        }
    }

    /// A value of type `kind`; none where it is passed over.
    fn value(&mut self, kind: u8, depth: u32) -> io::Result<Option<Value>> {
        match kind {
            1..=3 => self.pass(1).map(|()| None),
            4..=6 => self.number().map(|number| Some(Value::Number(number))),
            7 => self.pass(8).map(|()| None),
            8 => {
                let len = self.varint()?;
                self.pass(len).map(|()| None)
            }
            9 | 10 => {
                self.list(depth)?;
                Ok(None)
            }
            12 => self
                .fields(depth + 1)
                .map(|fields| Some(Value::Struct(fields))),
            _ => Err(malformed("a value of an unknown type")),
        }
    }

    fn list(&mut self, depth: u32) -> io::Result<()> {
        let head = self.byte()?;
        let len = match head >> 4 {
            15 => self.varint()?,
            short => u64::from(short),
        };
        if depth > MAX_DEPTH {
            return Err(malformed("lists lie too deep in each other"));
        }
        for _ in 0..len {
            self.value(head & 0x0f, depth + 1)?;
        }
        Ok(())
    }

    fn pass(&mut self, len: u64) -> io::Result<()> {
        let passed = io::copy(&mut (&mut self.0).take(len), &mut io::sink())?;
        if passed == len {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.0.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn varint(&mut self) -> io::Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("a number of more than 64 bits"))
    }

    /// A signed number, its sign in the lowest bit.
    fn number(&mut self) -> io::Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }
}

fn malformed(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> io::Result<Struct> {
        Struct::read(&mut &bytes[..])
    }

    #[test]
    fn numbers_truths_and_structs_are_kept_and_the_rest_is_passed_over() {
        // 1: i32 150, 3: binary "ab", 4: list of i32 [1, -1], 5: struct {7: true}, 21 (long form): i64 -3
        let bytes = [
            0x15, 0xac, 0x02, 0x28, 2, b'a', b'b', 0x19, 0x25, 2, 1, 0x1c, 0x71, 0, 0x06, 42, 5, 0,
        ];
        let mut rest = &[&bytes[..], b"next"].concat()[..];
        let read = Struct::read(&mut rest).expect("a struct");
        assert_eq!(rest, b"next");
        assert_eq!(read.size(1), Ok(150));
        assert!(read.size(3).is_err() && read.size(9).is_err());
        assert_eq!(read.size(21), Err("-3 is no size".into()));
        assert_eq!(read.within(5).map(|s| s.truth(7)), Ok(Some(true)));
    }

    #[test]
    fn what_never_ends_is_refused() {
        let deep = vec![0x1c; 1000];
        let long_text = [&[0x18, 0xff, 0xff, 0xff, 0xff, 0x7f][..], &[0; 100]].concat();
        let long_list = [
            &[0x19, 0xf5, 0xff, 0xff, 0xff, 0xff, 0x7f][..],
            &vec![0; 2 << 20],
        ]
        .concat();
        let nested_lists = vec![0x19; 1000];
        let wide = vec![0xff; 11];
        for bytes in [&deep, &long_text, &long_list, &nested_lists, &wide, &vec![]] {
            assert!(read(bytes).is_err());
        }
    }
}
