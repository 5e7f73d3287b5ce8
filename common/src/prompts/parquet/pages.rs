//! The pages of one column, each decompressed within a bound that it states first.
//!
//! A header says how long its page is once it is decompressed. That is checked against the bounds below before
//! anything of the kind is made, and no decoder may give a byte more, so that a small file cannot grow without end.

use std::io::{self, Read};

use ::parquet::basic::Compression;

use super::thrift::Struct;

/// The longest page. Writers make pages of 1 MiB, some make one for a whole row group.
const MAX_PAGE_BYTES: usize = 256 << 20;

/// The codecs that can be read, for people.
pub(super) const CODECS: &str = "snappy, zstd, gzip, lz4_raw, brotli or none";

/// What is wrong with a page.
type Result<T> = std::result::Result<T, String>;

/// How pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    None,
    Snappy,
    Gzip,
    Brotli,
    Zstd,
    Lz4Raw,
}

impl Codec {
    /// The codec of a column; its name where it cannot be read.
    pub(super) fn of(compression: Compression) -> std::result::Result<Self, &'static str> {
        match compression {
            Compression::UNCOMPRESSED => Ok(Self::None),
            Compression::SNAPPY => Ok(Self::Snappy),
            Compression::GZIP(_) => Ok(Self::Gzip),
            Compression::BROTLI(_) => Ok(Self::Brotli),
            Compression::ZSTD(_) => Ok(Self::Zstd),
            Compression::LZ4_RAW => Ok(Self::Lz4Raw),
            Compression::LZO => Err("lzo"),
            Compression::LZ4 => Err("lz4 in Hadoop's framing"),
        }
    }

    /// What `compressed` holds, which must be `len` bytes.
    fn decompress(self, compressed: &[u8], len: usize) -> Result<Vec<u8>> {
        let bad = |e: &dyn std::fmt::Display| format!("a page cannot be decompressed: {e}");
        let made = match self {
            Self::None => compressed.to_vec(),
            Self::Snappy => {
                // The length stands at the front as well; the decoder believes that one.
                let stated = snap::raw::decompress_len(compressed).map_err(|e| bad(&e))?;
                check_len(stated, len)?;
                let mut decoder = snap::raw::Decoder::new();
                decoder.decompress_vec(compressed).map_err(|e| bad(&e))?
            }
            Self::Lz4Raw => lz4_flex::block::decompress(compressed, len).map_err(|e| bad(&e))?,
            Self::Gzip => {
                let gzip = flate2::read::MultiGzDecoder::new(compressed);
                read_at_most(gzip, len).map_err(|e| bad(&e))?
            }
            Self::Brotli => {
                let brotli = brotli_decompressor::Decompressor::new(compressed, 4096);
                read_at_most(brotli, len).map_err(|e| bad(&e))?
            }
            Self::Zstd => {
                let zstd = ruzstd::decoding::StreamingDecoder::new(compressed);
                read_at_most(zstd.map_err(|e| bad(&e))?, len).map_err(|e| bad(&e))?
            }
        };
        check_len(made.len(), len)?;
        Ok(made)
    }
}

fn check_len(found: usize, stated: usize) -> Result<()> {
    if found == stated {
        return Ok(());
    }
    let than = if found > stated { "more" } else { "fewer" };
    Err(format!(
        "a page holds {than} than the {stated} bytes that it states"
    ))
}

/// All of `source`, but never more than one byte beyond `len`.
fn read_at_most(source: impl Read, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(len as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A page of values.
#[derive(Debug)]
pub(super) enum Page {
    /// Values that data pages refer to.
    Dictionary {
        /// Decompressed.
        bytes: Vec<u8>,
        /// How many there are.
        count: u32,
    },
    /// Values, or numbers of the dictionary.
    Data(DataPage),
}

/// A page of rows.
#[derive(Debug)]
pub(super) struct DataPage {
    /// Rows.
    pub(super) count: u32,
    /// How its values are written.
    pub(super) values: Values,
    /// Levels, then values; decompressed.
    bytes: Vec<u8>,
    /// Length of the levels; none where it stands before them.
    levels: Option<usize>,
}

/// How the values of a page are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Values {
    Plain,
    Dictionary,
}

impl DataPage {
    /// Its levels, which only an optional column has, and its values.
    pub(super) fn split(&self, is_optional: bool) -> Result<(&[u8], &[u8])> {
        let short = || String::from("levels are longer than their page");
        let (len, rest) = match self.levels {
            Some(len) => (len, &self.bytes[..]),
            None if is_optional => {
                let (len, rest) = self.bytes.split_first_chunk().ok_or_else(short)?;
                (u32::from_le_bytes(*len) as usize, rest)
            }
            None => (0, &self.bytes[..]),
        };
        rest.split_at_checked(len).ok_or_else(short)
    }
}

/// Reads the pages of a column's chunk, one after the other.
#[derive(Debug)]
pub(super) struct Pages<R> {
    /// Stands at the next header; ends with the chunk.
    chunk: io::Take<R>,
    codec: Codec,
    /// Rows that the chunk has still to give.
    rows_left: u64,
    /// Decompressed bytes that its pages may still have.
    bytes_left: u64,
}

impl<R: Read> Pages<R> {
    /// The pages of `chunk`, which hold `rows` rows, and may hold `bytes` bytes.
    pub(super) fn new(chunk: io::Take<R>, codec: Codec, rows: u64, bytes: u64) -> Self {
        Self {
            chunk,
            codec,
            rows_left: rows,
            bytes_left: bytes,
        }
    }

    /// The next page; none once all rows were given.
    pub(super) fn next_page(&mut self) -> Result<Option<Page>> {
        while self.rows_left > 0 {
            let fields =
                Struct::read(&mut self.chunk).map_err(|e| format!("a page has no header: {e}"))?;
            let header = Header::of(&fields).map_err(|e| format!("the header of a page: {e}"))?;
            let bytes = self.body(&header)?;
            match header.kind {
                Kind::Index => {}
                Kind::Dictionary { count } => return Ok(Some(Page::Dictionary { bytes, count })),
                Kind::Data {
                    count,
                    values,
                    levels,
                    ..
                } => {
                    self.rows_left = self
                        .rows_left
                        .checked_sub(u64::from(count))
                        .ok_or("pages hold more rows than their row group")?;
                    return Ok(Some(Page::Data(DataPage {
                        count,
                        values,
                        bytes,
                        levels,
                    })));
                }
            }
        }
        Ok(None)
    }

    /// Reads and decompresses what follows `header`.
    fn body(&mut self, header: &Header) -> Result<Vec<u8>> {
        let (stored, len) = (header.stored_len, header.len);
        let longest = len.max(stored);
        if longest > MAX_PAGE_BYTES {
            return Err(format!(
                "a page of {longest} bytes is longer than {MAX_PAGE_BYTES}; write smaller pages"
            ));
        }
        self.bytes_left = self
            .bytes_left
            .checked_sub(len as u64)
            .ok_or("its pages hold more text than may be read")?;
        if stored as u64 > self.chunk.limit() {
            return Err(format!("a page of {stored} bytes does not fit its column"));
        }
        let mut bytes = vec![0; stored];
        self.chunk
            .read_exact(&mut bytes)
            .map_err(|e| format!("a page cannot be read: {e}"))?;
        // Levels of the second version lie before the values and are never compressed.
        let (plain, is_compressed) = header.uncompressed_part();
        if self.codec == Codec::None || !is_compressed {
            check_len(stored, len)?;
            return Ok(bytes);
        }
        let levels = bytes.get(..plain).filter(|_| plain <= len);
        let mut whole = levels.ok_or("levels are longer than their page")?.to_vec();
        if len > plain {
            whole.extend(self.codec.decompress(&bytes[plain..], len - plain)?);
        }
        Ok(whole)
    }
}

/// What stands before a page (`PageHeader` in parquet.thrift).
struct Header {
    kind: Kind,
    /// Decompressed, and as stored.
    len: usize,
    stored_len: usize,
}

enum Kind {
    Index,
    Dictionary {
        count: u32,
    },
    Data {
        count: u32,
        values: Values,
        levels: Option<usize>,
        is_compressed: bool,
    },
}

impl Header {
    fn of(fields: &Struct) -> Result<Self> {
        let count = |fields: &Struct| fields.size(1).map(|count| count as u32);
        let kind = match fields.size(1)? {
            0 => {
                let data = fields.within(5)?;
                if data.size(3)? != RLE {
                    return Err("its levels are not in RLE".into());
                }
                Kind::Data {
                    count: count(data)?,
                    values: values(data.size(2)?)?,
                    levels: None,
                    is_compressed: true,
                }
            }
            1 => Kind::Index,
            2 => {
                let dictionary = fields.within(7)?;
                Kind::Dictionary {
                    count: count(dictionary)?,
                }
            }
            3 => {
                let data = fields.within(8)?;
                if data.size(6)? != 0 {
                    return Err("it holds lists".into());
                }
                Kind::Data {
                    count: count(data)?,
                    values: values(data.size(4)?)?,
                    levels: Some(data.size(5)?),
                    is_compressed: data.truth(7).unwrap_or(true),
                }
            }
            other => return Err(format!("there are no pages of type {other}")),
        };
        Ok(Self {
            kind,
            len: fields.size(2)?,
            stored_len: fields.size(3)?,
        })
    }

    /// Bytes at the front that no codec has seen, and whether one has seen the others.
    fn uncompressed_part(&self) -> (usize, bool) {
        match self.kind {
            Kind::Data {
                levels,
                is_compressed,
                ..
            } => (levels.unwrap_or(0), is_compressed),
            Kind::Index | Kind::Dictionary { .. } => (0, true),
        }
    }
}

/// `Encoding.RLE` in parquet.thrift.
const RLE: usize = 3;

/// The encodings of texts whose sizes follow from the page's own bytes.
fn values(encoding: usize) -> Result<Values> {
    match encoding {
        0 => Ok(Values::Plain),
        2 | 8 => Ok(Values::Dictionary),
        6 | 7 => Err("its texts are in a delta encoding, which is not read here; write them plain or with a dictionary".into()),
        other => Err(format!("encoding {other} is none of texts")),
    }
}
