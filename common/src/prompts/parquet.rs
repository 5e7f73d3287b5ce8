//! Prompts from a column of a Parquet file that anybody may have written.
//!
//! The footer is the `parquet` crate's work. Pages are read, decompressed and decoded here, within bounds, because that
//! crate makes room for whatever a header claims, and panics where pages contradict each other.

mod pages;
mod thrift;
mod values;

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use ::parquet::basic::{ConvertedType, LogicalType, Type};
use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, ParquetMetaDataReader};
use ::parquet::schema::types::ColumnDescPtr;
use bytes::Bytes;

use self::pages::{CODECS, Codec, Page, Pages};
use self::values::{Dictionary, each_text};
use super::Error;
use super::read::{FIELDS, List, MAX_LINE_BYTES, unreadable};

/// Decompressed bytes of the column over the whole file.
const MAX_TEXT_BYTES: u64 = 4 << 30;
/// Rows of the file; a dictionary makes a row cost next to nothing.
const MAX_ROWS: u64 = 1 << 27;

/// Puts every row of the file's column of prompts into `list`.
pub(super) fn read(path: &Path, list: &mut List) -> Result<(), Error> {
    let file = File::open(path).map_err(|e| unreadable(path, e))?;
    let fault = |problem: String| Error::Parquet {
        file: path.to_owned(),
        problem,
    };
    let metadata = ParquetMetaDataReader::new()
        .parse_and_finish(&file)
        .map_err(|e| fault(words(e)))?;
    let column = Column::find(&metadata).map_err(fault)?;
    let codecs = column.check(&metadata).map_err(fault)?;
    let mut row = 0;
    for (group, codec) in metadata.row_groups().iter().zip(codecs) {
        let own = file.try_clone().map_err(|e| unreadable(path, e))?;
        let texts = Texts::new(own, group.column(column.index), codec);
        let mut texts = texts.map_err(|e| unreadable(path, e))?;
        let taken = texts.each(|text| {
            row += 1;
            list.push(
                row,
                text.map_or(Ok(""), checked)
                    .map_err(|e| format!("row {row} {e}"))?,
            );
            Ok(())
        });
        taken.map_err(fault)?;
    }
    Ok(())
}

/// A text that may be a prompt.
fn checked(text: &[u8]) -> Result<&str, String> {
    if text.len() as u64 > MAX_LINE_BYTES {
        return Err(format!("is longer than {MAX_LINE_BYTES} bytes"));
    }
    std::str::from_utf8(text).map_err(|_| "is not UTF-8".into())
}

/// The column that holds the prompts.
struct Column {
    index: usize,
    name: &'static str,
    descr: ColumnDescPtr,
}

impl Column {
    fn find(metadata: &ParquetMetaData) -> Result<Self, String> {
        let schema = metadata.file_metadata().schema_descr();
        let names: Vec<&str> = schema
            .root_schema()
            .get_fields()
            .iter()
            .map(|f| f.name())
            .collect();
        let Some(&name) = FIELDS.iter().find(|f| names.contains(f)) else {
            let found = if names.is_empty() {
                "none".into()
            } else {
                names.join(", ")
            };
            return Err(format!("no column {}; it has {found}", FIELDS.join(", ")));
        };
        let is_named = |descr: &ColumnDescPtr| descr.path().parts() == [name];
        let index = schema.columns().iter().position(is_named);
        let column = index.map(|index| Self {
            index,
            name,
            descr: schema.column(index),
        });
        column
            .filter(|column| column.is_text())
            .ok_or_else(|| format!("column {name} does not hold text"))
    }

    /// One text, or none, in each row.
    fn is_text(&self) -> bool {
        let descr = &self.descr;
        let says_so = descr.converted_type() == ConvertedType::UTF8
            || descr.logical_type_ref() == Some(&LogicalType::String);
        descr.physical_type() == Type::BYTE_ARRAY
            && says_so
            && descr.max_rep_level() == 0
            && descr.max_def_level() <= 1
    }

    /// The codec of each row group, once what the footer states of the column is within bounds.
    fn check(&self, metadata: &ParquetMetaData) -> Result<Vec<Codec>, String> {
        let (mut rows, mut bytes) = (0u64, 0u64);
        let mut codecs = Vec::new();
        for group in metadata.row_groups() {
            let chunk = group.column(self.index);
            let stated =
                |number: i64| u64::try_from(number).map_err(|_| format!("{number} is no size"));
            rows = rows.saturating_add(stated(group.num_rows())?);
            bytes = bytes.saturating_add(stated(chunk.uncompressed_size())?);
            if chunk.num_values() != group.num_rows() {
                return Err(format!(
                    "column {} does not have a value in each row",
                    self.name
                ));
            }
            codecs.push(Codec::of(chunk.compression()).map_err(|codec| {
                format!(
                    "column {} is compressed with {codec}, which is not read here; write the file again with {CODECS}, for example pyarrow.parquet.write_table(table, path, compression=\"zstd\")",
                    self.name
                )
            })?);
        }
        if bytes > MAX_TEXT_BYTES {
            return Err(format!(
                "column {} states {bytes} bytes of text, and at most {MAX_TEXT_BYTES} are read; give a part of the rows",
                self.name
            ));
        }
        if rows > MAX_ROWS {
            return Err(format!(
                "it states {rows} rows, and at most {MAX_ROWS} are read; give a part of them"
            ));
        }
        Ok(codecs)
    }
}

/// A row group's chunk of a column of texts.
struct Texts<R> {
    pages: Pages<BufReader<R>>,
    is_optional: bool,
    dictionary: Option<Dictionary>,
}

impl<R: Read + Seek> Texts<R> {
    /// The chunk that `chunk` describes, in the file that `source` reads.
    fn new(mut source: R, chunk: &ColumnChunkMetaData, codec: Codec) -> io::Result<Self> {
        let size = |number: i64| {
            u64::try_from(number).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
        };
        let first = match chunk.dictionary_page_offset() {
            // Some writers give 0 where there is no dictionary.
            Some(dictionary) if dictionary > 0 => dictionary.min(chunk.data_page_offset()),
            _ => chunk.data_page_offset(),
        };
        source.seek(SeekFrom::Start(size(first)?))?;
        let stored = BufReader::new(source).take(size(chunk.compressed_size())?);
        let rows = size(chunk.num_values())?;
        Ok(Self {
            pages: Pages::new(stored, codec, rows, MAX_TEXT_BYTES),
            is_optional: chunk.column_descr().max_def_level() > 0,
            dictionary: None,
        })
    }

    /// Calls `take` with the text of every row, or none where it is missing.
    fn each(
        &mut self,
        mut take: impl FnMut(Option<&[u8]>) -> Result<(), String>,
    ) -> Result<(), String> {
        while let Some(page) = self.pages.next_page()? {
            match page {
                Page::Dictionary { bytes, count } => {
                    self.dictionary = Some(Dictionary::new(bytes, count)?);
                }
                Page::Data(page) => {
                    each_text(&page, self.is_optional, self.dictionary.as_ref(), &mut take)?;
                }
            }
        }
        Ok(())
    }
}

/// The texts of a required column of `file`, which is one that [`super::to_parquet`] wrote.
pub(super) fn stored_texts(
    file: &Bytes,
    chunk: &ColumnChunkMetaData,
) -> Result<Vec<String>, String> {
    let texts = Texts::new(io::Cursor::new(file.clone()), chunk, Codec::None);
    let mut found = Vec::new();
    texts.map_err(|e| e.to_string())?.each(|text| {
        found.push(checked(text.unwrap_or_default())?.to_owned());
        Ok(())
    })?;
    Ok(found)
}

/// As [`stored_texts`], for the column of ids.
pub(super) fn stored_ids(
    file: &Bytes,
    chunk: &ColumnChunkMetaData,
) -> Result<Vec<[u8; 16]>, String> {
    let mut ids =
        Texts::new(io::Cursor::new(file.clone()), chunk, Codec::None).map_err(|e| e.to_string())?;
    let mut found = Vec::new();
    while let Some(page) = ids.pages.next_page()? {
        let Page::Data(page) = page else {
            return Err("ids have no dictionary".into());
        };
        found.extend_from_slice(page.split(false)?.1.as_chunks().0);
    }
    Ok(found)
}

/// What an error says, without the crate's own preface.
pub(super) fn words(error: ParquetError) -> String {
    match error {
        ParquetError::General(problem) => problem,
        other => other.to_string(),
    }
}
