//! Makes one shard of trajectory rows, as bytes that depend on the rows alone.
//!
//! Row groups hold whole trajectories near 8 MiB. A large state has a data page of its own, small ones share
//! pages of about 128 KiB; either way a state lies at the end of its page in one piece, so that the reader can
//! fetch it without decoding. Values are stored raw: latents do not compress.

use std::mem;
use std::sync::Arc;

use arrow_array::builder::{
    FixedSizeBinaryBuilder, Float32Builder, Int32Builder, StringBuilder, UInt16Builder,
    UInt64Builder,
};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::Schema;
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::basic::Encoding;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterPropertiesBuilder};
use parquet::schema::types::ColumnPath;
use xxhash_rust::xxh3::xxh3_64;

use super::Error;
use super::schema::{FORMAT_VERSION, Origin, RowSchema, TrajectoryRow, Value};
use crate::storage::{FileEntry, Upload};

/// States and predictions of one row group, in bytes, near which it ends.
const GROUP_BYTES: usize = 8 << 20;
/// Rows of one row group at most.
const GROUP_ROWS: usize = 1 << 16;
/// Values at least this large have a page of their own.
const OWN_PAGE_BYTES: usize = 64 << 10;
/// Bytes of a page that values share.
const SHARED_PAGE_BYTES: usize = 128 << 10;

/// What a finished file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Number of rows.
    pub rows: u64,
    /// Number of trajectories.
    pub trajectories: u64,
}

/// Writes the rows of one shard, sorted by (trajectory, step).
pub struct ShardWriter {
    schema: RowSchema,
    columns: Arc<Schema>,
    file: ArrowWriter<Vec<u8>>,
    group: Group,
    last: Option<(u64, u16)>,
    written: Written,
}

impl ShardWriter {
    /// Starts a file.
    pub fn new(schema: &RowSchema, origin: &Origin) -> Result<Self, Error> {
        let columns = schema.row_columns();
        let mut properties = properties(schema, origin)
            .set_column_encoding("traj_ord".into(), Encoding::DELTA_BINARY_PACKED)
            .set_column_encoding("step".into(), Encoding::DELTA_BINARY_PACKED);
        for repeated in [
            "traj_id",
            "prompt_id",
            "guidance",
            "n_steps",
            "segments",
            "mode",
            "cond_id",
            "uncond_id",
        ] {
            properties = properties.set_column_dictionary_enabled(repeated.into(), true);
        }
        for wide in ["latent", "eps_w"] {
            properties = wide_column(properties, wide, &schema.latent);
        }
        Ok(Self {
            schema: schema.clone(),
            file: ArrowWriter::try_new(Vec::new(), columns.clone(), Some(properties.build()))?,
            group: Group::new(schema),
            columns,
            last: None,
            written: Written {
                rows: 0,
                trajectories: 0,
            },
        })
    }

    /// Appends a row, which must come after the one before it in (trajectory, step).
    pub fn push(&mut self, row: &TrajectoryRow<'_>) -> Result<(), Error> {
        self.check(row)?;
        let next_trajectory = self
            .last
            .is_none_or(|(trajectory, _)| trajectory != row.traj_ord);
        if next_trajectory {
            self.written.trajectories += 1;
            if self.group.is_full(self.schema.row_bytes()) {
                self.flush()?;
            }
        }
        self.group.push(row)?;
        self.last = Some((row.traj_ord, row.step));
        self.written.rows += 1;
        Ok(())
    }

    /// The bytes of the file that are final by now and were not taken before.
    pub fn take(&mut self) -> Result<Bytes, Error> {
        self.file
            .sync()
            .map_err(parquet::errors::ParquetError::from)?;
        // The next group is about as large; growing to it would copy it twice more.
        let empty = Vec::with_capacity(self.file.inner().len());
        Ok(mem::replace(self.file.inner_mut(), empty).into())
    }

    /// Hands what is final by now to `upload`; call it now and then to keep memory bounded.
    pub async fn send(&mut self, upload: &mut Upload) -> Result<(), Error> {
        let bytes = self.take()?;
        if !bytes.is_empty() {
            upload.write(bytes).await?;
        }
        Ok(())
    }

    /// Ends the file: its last bytes, behind all that were taken.
    pub fn finish(mut self) -> Result<(Bytes, Written), Error> {
        self.flush()?;
        self.file.finish()?;
        Ok((self.take()?, self.written))
    }

    /// Ends the file and the upload that got its first bytes.
    pub async fn finish_into(self, mut upload: Upload) -> Result<(FileEntry, Written), Error> {
        let (bytes, written) = self.finish()?;
        upload.write(bytes).await?;
        Ok((upload.finish().await?, written))
    }

    fn flush(&mut self) -> Result<(), Error> {
        if self.group.rows == 0 {
            return Ok(());
        }
        let batch = RecordBatch::try_new(self.columns.clone(), self.group.take())?;
        self.file.write(&batch)?;
        self.file.flush()?;
        Ok(())
    }

    fn check(&self, row: &TrajectoryRow<'_>) -> Result<(), Error> {
        let refuse = |reason: String| {
            Err(Error::Row {
                trajectory: row.traj_ord,
                step: row.step,
                reason,
            })
        };
        let bytes = self.schema.row_bytes();
        for (name, value) in [("latent", row.latent), ("eps_w", row.eps_w)] {
            if value.len() != bytes {
                let found = value.len();
                return refuse(format!("{name} has {found} bytes, the schema says {bytes}"));
            }
        }
        if row.step >= row.n_steps {
            return refuse(format!("the trajectory has {} steps", row.n_steps));
        }
        match self.last {
            Some(last) if last >= (row.traj_ord, row.step) => refuse(format!(
                "step {} of trajectory {} came before it",
                last.1, last.0
            )),
            _ => Ok(()),
        }
    }
}

/// What all our files have in common. Nothing in it depends on when or where the file is written.
pub(super) fn properties(schema: &RowSchema, origin: &Origin) -> WriterPropertiesBuilder {
    let facts = [
        ("format.version", FORMAT_VERSION.to_string()),
        ("format.schema", schema.id()),
        ("dataset", origin.dataset.to_string()),
        ("teacher", origin.teacher.clone()),
        ("config", origin.config.to_string()),
        ("vae.scale", origin.latent_scale.to_string()),
    ];
    let facts = facts.map(|(key, value)| KeyValue::new(key.to_owned(), value));
    WriterProperties::builder()
        .set_created_by("distillery".to_owned())
        .set_key_value_metadata(Some(facts.to_vec()))
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::Chunk)
        .set_max_row_group_row_count(None)
        // The writer looks at a page's limits between batches of this many rows.
        .set_write_batch_size(1)
}

/// Raw, without statistics, in pages that the reader can address.
pub(super) fn wide_column(
    properties: WriterPropertiesBuilder,
    name: &str,
    value: &Value,
) -> WriterPropertiesBuilder {
    let path = ColumnPath::from(name);
    properties
        .set_column_encoding(path.clone(), Encoding::PLAIN)
        .set_column_statistics_enabled(path.clone(), EnabledStatistics::None)
        .set_column_data_page_row_count_limit(path, rows_per_page(value.bytes()))
}

fn rows_per_page(value_bytes: usize) -> usize {
    if value_bytes >= OWN_PAGE_BYTES {
        1
    } else {
        (SHARED_PAGE_BYTES / value_bytes).max(1)
    }
}

/// The rows of the row group that is being filled.
struct Group {
    rows: usize,
    ids: [FixedSizeBinaryBuilder; 4],
    traj_ord: UInt64Builder,
    seed: UInt64Builder,
    guidance: Float32Builder,
    shorts: [UInt16Builder; 4],
    timestep: Int32Builder,
    mode: StringBuilder,
    values: [FixedSizeBinaryBuilder; 2],
    hashes: [UInt64Builder; 2],
}

impl Group {
    fn new(schema: &RowSchema) -> Self {
        let width = i32::try_from(schema.row_bytes()).expect("a value has at most 64 MiB");
        Self {
            rows: 0,
            ids: std::array::from_fn(|_| FixedSizeBinaryBuilder::new(16)),
            traj_ord: UInt64Builder::new(),
            seed: UInt64Builder::new(),
            guidance: Float32Builder::new(),
            shorts: std::array::from_fn(|_| UInt16Builder::new()),
            timestep: Int32Builder::new(),
            mode: StringBuilder::new(),
            values: std::array::from_fn(|_| FixedSizeBinaryBuilder::new(width)),
            hashes: std::array::from_fn(|_| UInt64Builder::new()),
        }
    }

    /// Whether the group is near enough to its size to end at a trajectory's end.
    fn is_full(&self, row_bytes: usize) -> bool {
        // Half a trajectory is not known here; a group ends once it has 7/8 of its size.
        self.rows * row_bytes * 2 >= GROUP_BYTES / 8 * 7 || self.rows >= GROUP_ROWS
    }

    fn push(&mut self, row: &TrajectoryRow<'_>) -> Result<(), Error> {
        for (builder, id) in
            self.ids
                .iter_mut()
                .zip([row.traj_id, row.prompt_id, row.cond_id, row.uncond_id])
        {
            builder.append_value(id)?;
        }
        self.traj_ord.append_value(row.traj_ord);
        self.seed.append_value(row.seed);
        self.guidance.append_value(row.guidance);
        for (builder, value) in
            self.shorts
                .iter_mut()
                .zip([row.step, row.n_steps, row.segment, row.segments])
        {
            builder.append_value(value);
        }
        self.timestep.append_value(row.timestep);
        self.mode.append_value(row.mode);
        for ((values, hashes), bytes) in self
            .values
            .iter_mut()
            .zip(&mut self.hashes)
            .zip([row.latent, row.eps_w])
        {
            values.append_value(bytes)?;
            hashes.append_value(xxh3_64(bytes));
        }
        self.rows += 1;
        Ok(())
    }

    /// The columns in the order of [`RowSchema::row_columns`], and an empty group.
    fn take(&mut self) -> Vec<ArrayRef> {
        self.rows = 0;
        let [traj_id, prompt_id, cond_id, uncond_id] = &mut self.ids;
        let [step, n_steps, segment, segments] = &mut self.shorts;
        let [latent, eps_w] = &mut self.values;
        let [latent_xxh3, eps_w_xxh3] = &mut self.hashes;
        vec![
            Arc::new(traj_id.finish()),
            Arc::new(self.traj_ord.finish()),
            Arc::new(prompt_id.finish()),
            Arc::new(self.seed.finish()),
            Arc::new(self.guidance.finish()),
            Arc::new(step.finish()),
            Arc::new(n_steps.finish()),
            Arc::new(self.timestep.finish()),
            Arc::new(segment.finish()),
            Arc::new(segments.finish()),
            Arc::new(self.mode.finish()),
            Arc::new(cond_id.finish()),
            Arc::new(uncond_id.finish()),
            Arc::new(latent.finish()),
            Arc::new(latent_xxh3.finish()),
            Arc::new(eps_w.finish()),
            Arc::new(eps_w_xxh3.finish()),
        ]
    }
}
