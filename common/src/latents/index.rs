//! Where every value of a verified Parquet file lies.
//!
//! Parquet's own reader decodes a page to give one value. Ours asks the footer once where the values are: a
//! required, raw, PLAIN value of fixed size lies whole, the last of its page at the page's end. The file has
//! been verified before, so that what is parsed is what was written; still, nothing it says is believed
//! without a bound, and a panic of the parser is an error.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow_array::cast::AsArray as _;
use arrow_array::types::{Int32Type, UInt16Type, UInt64Type};
use arrow_array::{Array as _, RecordBatch};
use arrow_schema::Schema;
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::basic::{Compression, Encoding};
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader};

use super::schema::RowSchema;

/// The largest footer that is parsed.
const MAX_FOOTER_BYTES: u64 = 64 << 20;
/// Rows decoded together.
const BATCH_ROWS: usize = 8192;

/// Where a value lies in its file, and the hash it must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) at: u64,
    pub(super) xxh3: u64,
}

/// One row of a trajectory file, without its values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub(super) traj_ord: u64,
    pub(super) step: u16,
    pub(super) timestep: i32,
    pub(super) segment: u16,
    pub(super) segments: u16,
    pub(super) cond_id: [u8; 16],
    pub(super) uncond_id: [u8; 16],
    pub(super) latent: Place,
    pub(super) eps_w: Place,
}

/// One row of a file of embeddings, without its values.
#[derive(Debug, Clone, Copy)]
pub(super) struct EmbeddingRow {
    pub(super) id: [u8; 16],
    pub(super) ctx: Place,
    pub(super) pooled: Option<Place>,
}

/// The rows of a trajectory file that has been verified.
pub(super) fn rows(file: &Bytes, schema: &RowSchema) -> Result<Vec<Row>, String> {
    guarded(|| {
        let table = Table::parse(file, &schema.row_columns())?;
        let wide = schema.row_bytes();
        let latent = table.places("latent", wide)?;
        let eps_w = table.places("eps_w", wide)?;
        let mut rows = Vec::with_capacity(latent.len());
        for batch in table.narrow()? {
            append_rows(&batch?, &latent, &eps_w, &mut rows)?;
        }
        if rows.len() != latent.len() || latent.len() != eps_w.len() {
            return Err("its columns differ in length".into());
        }
        let sorted = rows
            .windows(2)
            .all(|pair| (pair[0].traj_ord, pair[0].step) < (pair[1].traj_ord, pair[1].step));
        if !sorted {
            return Err("its rows are not sorted by trajectory and step".into());
        }
        Ok(rows)
    })
}

/// The rows of a file of embeddings that has been verified.
pub(super) fn embeddings(file: &Bytes, schema: &RowSchema) -> Result<Vec<EmbeddingRow>, String> {
    guarded(|| {
        let table = Table::parse(file, &schema.embedding_columns())?;
        let ctx = table.places("ctx", schema.ctx.bytes())?;
        let pooled = match &schema.pooled {
            Some(value) => Some(table.places("pooled", value.bytes())?),
            None => None,
        };
        let mut rows = Vec::with_capacity(ctx.len());
        for batch in table.narrow()? {
            let batch = batch?;
            let ctx_xxh3 = u64s(&batch, "ctx_xxh3")?;
            let pooled_xxh3 = match pooled {
                Some(_) => Some(u64s(&batch, "pooled_xxh3")?),
                None => None,
            };
            for i in 0..batch.num_rows() {
                let row = rows.len();
                let place = |at: &[u64], hashes: &[u64]| -> Result<Place, String> {
                    let at = *at.get(row).ok_or("its columns differ in length")?;
                    Ok(Place {
                        at,
                        xxh3: hashes[i],
                    })
                };
                rows.push(EmbeddingRow {
                    id: id(&batch, "cond_id", i)?,
                    ctx: place(&ctx, ctx_xxh3)?,
                    pooled: match (&pooled, pooled_xxh3) {
                        (Some(at), Some(hashes)) => Some(place(at, hashes)?),
                        _ => None,
                    },
                });
            }
        }
        if rows.len() != ctx.len() {
            return Err("its columns differ in length".into());
        }
        Ok(rows)
    })
}

fn append_rows(
    batch: &RecordBatch,
    latent: &[u64],
    eps_w: &[u64],
    rows: &mut Vec<Row>,
) -> Result<(), String> {
    let traj_ord = u64s(batch, "traj_ord")?;
    let step = u16s(batch, "step")?;
    let segment = u16s(batch, "segment")?;
    let segments = u16s(batch, "segments")?;
    let timestep = named(batch, "timestep")?
        .as_primitive_opt::<Int32Type>()
        .ok_or("column timestep has another type")?
        .values();
    let latent_xxh3 = u64s(batch, "latent_xxh3")?;
    let eps_w_xxh3 = u64s(batch, "eps_w_xxh3")?;
    for i in 0..batch.num_rows() {
        let row = rows.len();
        let (Some(&latent_at), Some(&eps_w_at)) = (latent.get(row), eps_w.get(row)) else {
            return Err("its columns differ in length".into());
        };
        rows.push(Row {
            traj_ord: traj_ord[i],
            step: step[i],
            timestep: timestep[i],
            segment: segment[i],
            segments: segments[i],
            cond_id: id(batch, "cond_id", i)?,
            uncond_id: id(batch, "uncond_id", i)?,
            latent: Place {
                at: latent_at,
                xxh3: latent_xxh3[i],
            },
            eps_w: Place {
                at: eps_w_at,
                xxh3: eps_w_xxh3[i],
            },
        });
    }
    Ok(())
}

fn named<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a arrow_array::ArrayRef, String> {
    batch
        .column_by_name(name)
        .ok_or_else(|| format!("it has no column {name}"))
}

fn u64s<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a [u64], String> {
    let array = named(batch, name)?.as_primitive_opt::<UInt64Type>();
    Ok(array
        .ok_or_else(|| format!("column {name} has another type"))?
        .values())
}

fn u16s<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a [u16], String> {
    let array = named(batch, name)?.as_primitive_opt::<UInt16Type>();
    Ok(array
        .ok_or_else(|| format!("column {name} has another type"))?
        .values())
}

fn id(batch: &RecordBatch, name: &str, row: usize) -> Result<[u8; 16], String> {
    named(batch, name)?
        .as_fixed_size_binary_opt()
        .filter(|array| !array.is_null(row))
        .and_then(|array| array.value(row).try_into().ok())
        .ok_or_else(|| format!("column {name} has another type"))
}

/// Runs a parser whose panics upstream counts as bugs rather than as weaknesses.
fn guarded<T>(parse: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(parse))
        .unwrap_or_else(|_| Err("the Parquet parser gave up".into()))
}

struct Table<'a> {
    file: &'a Bytes,
    metadata: Arc<ParquetMetaData>,
    footer_at: u64,
}

impl<'a> Table<'a> {
    fn parse(file: &'a Bytes, columns: &Schema) -> Result<Self, String> {
        let footer_at = footer_start(file)?;
        let metadata = ParquetMetaDataReader::new()
            .with_offset_index_policy(PageIndexPolicy::Required)
            .parse_and_finish(file)
            .map_err(|error| error.to_string())?;
        let found = metadata.file_metadata().schema_descr();
        let names: Vec<&str> = found.columns().iter().map(|column| column.name()).collect();
        let expected: Vec<&str> = columns.fields().iter().map(|f| f.name().as_str()).collect();
        if names != expected {
            return Err(format!(
                "its columns are {names:?}, expected are {expected:?}"
            ));
        }
        Ok(Self {
            file,
            metadata: Arc::new(metadata),
            footer_at,
        })
    }

    /// Where the values of a wide column start, row by row.
    fn places(&self, name: &str, wide: usize) -> Result<Vec<u64>, String> {
        let described = self.metadata.file_metadata().schema_descr();
        let leaf = (0..described.num_columns())
            .find(|&leaf| described.column(leaf).name() == name)
            .ok_or_else(|| format!("it has no column {name}"))?;
        let column = described.column(leaf);
        if column.max_def_level() != 0 || usize::try_from(column.type_length()) != Ok(wide) {
            return Err(format!(
                "column {name} does not hold values of {wide} bytes"
            ));
        }
        let mut places = Vec::new();
        for (group, row_group) in self.metadata.row_groups().iter().enumerate() {
            let chunk = row_group.column(leaf);
            let plain = chunk
                .encodings()
                .all(|e| matches!(e, Encoding::PLAIN | Encoding::RLE));
            if chunk.compression() != Compression::UNCOMPRESSED || !plain {
                return Err(format!("column {name} is not stored raw"));
            }
            let index = self.metadata.page_index_for_row_group(group);
            let pages = index.page_locations(leaf).ok_or("it has no offset index")?;
            let rows =
                u64::try_from(row_group.num_rows()).map_err(|_| "a row group has no rows")?;
            for (i, page) in pages.iter().enumerate() {
                let next = pages
                    .get(i + 1)
                    .map_or(Ok(rows), |next| u64::try_from(next.first_row_index));
                let first = u64::try_from(page.first_row_index);
                let start = u64::try_from(page.offset);
                let length = u64::try_from(page.compressed_page_size);
                let (Ok(next), Ok(first), Ok(start), Ok(length)) = (next, first, start, length)
                else {
                    return Err(format!("a page of {name} lies at no possible place"));
                };
                self.page_places(first..next, start, length, wide as u64, &mut places)
                    .ok_or_else(|| format!("a page of {name} lies at no possible place"))?;
            }
        }
        Ok(places)
    }

    /// The values of one page end where it ends. None when they do not fit into it, or it into the file.
    fn page_places(
        &self,
        rows: std::ops::Range<u64>,
        start: u64,
        length: u64,
        wide: u64,
        places: &mut Vec<u64>,
    ) -> Option<()> {
        let count = rows
            .end
            .checked_sub(rows.start)
            .filter(|&count| count > 0)?;
        let end = start
            .checked_add(length)
            .filter(|&end| end <= self.footer_at)?;
        let first = end
            .checked_sub(count.checked_mul(wide)?)
            .filter(|&first| first > start)?;
        places.extend((0..count).map(|row| first + row * wide));
        Some(())
    }

    /// Everything but the wide columns, decoded.
    fn narrow(&self) -> Result<impl Iterator<Item = Result<RecordBatch, String>> + use<>, String> {
        let described = self.metadata.file_metadata().schema_descr();
        let leaves = (0..described.num_columns()).filter(|&leaf| {
            let column = described.column(leaf);
            column.type_length() <= 16 && column.name() != "ctx" && column.name() != "pooled"
        });
        let mask = ProjectionMask::leaves(described, leaves);
        let options = ArrowReaderOptions::new();
        let metadata = ArrowReaderMetadata::try_new(self.metadata.clone(), options)
            .map_err(|error| error.to_string())?;
        let reader =
            ParquetRecordBatchReaderBuilder::new_with_metadata(self.file.clone(), metadata)
                .with_projection(mask)
                .with_batch_size(BATCH_ROWS)
                .build()
                .map_err(|error| error.to_string())?;
        Ok(reader.map(|batch| batch.map_err(|error| error.to_string())))
    }
}

/// Where the footer begins, after a look at the file's last eight bytes.
fn footer_start(file: &Bytes) -> Result<u64, String> {
    let len = file.len() as u64;
    let tail = file
        .len()
        .checked_sub(8)
        .map(|at| &file[at..])
        .ok_or("it is shorter than a footer")?;
    let (length, magic) = tail.split_at(4);
    if magic != b"PAR1" {
        return Err("it does not end like a Parquet file".into());
    }
    let length = u64::from(u32::from_le_bytes(
        length.try_into().expect("four bytes were split off"),
    ));
    if length > MAX_FOOTER_BYTES {
        return Err(format!("its footer of {length} bytes is too large"));
    }
    (len - 8)
        .checked_sub(length)
        .ok_or_else(|| "its footer is larger than itself".into())
}
