//! The text embeddings of a shard's prompts: each once, however many states refer to it.

use std::collections::BTreeSet;
use std::sync::Arc;

use arrow_array::builder::{FixedSizeBinaryBuilder, UInt64Builder};
use arrow_array::{ArrayRef, RecordBatch};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use xxhash_rust::xxh3::xxh3_64;

use super::Error;
use super::schema::{Origin, RowSchema, Value};
use super::writer::{properties, wide_column};

/// What the text encoders made of one prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Embedding {
    /// Output of the text encoders, `[tokens, width]`, as the schema's bytes.
    pub ctx: Bytes,
    /// Pooled output, where the teacher uses one.
    pub pooled: Option<Bytes>,
}

/// Embeddings of one row group.
const GROUP_ROWS: usize = 64;

/// Writes the embeddings of one shard, in the order in which they first come.
pub struct EmbeddingsWriter {
    schema: RowSchema,
    file: ArrowWriter<Vec<u8>>,
    ids: FixedSizeBinaryBuilder,
    values: Vec<(FixedSizeBinaryBuilder, UInt64Builder)>,
    waiting: usize,
    seen: BTreeSet<[u8; 16]>,
}

impl EmbeddingsWriter {
    /// Starts a file.
    pub fn new(schema: &RowSchema, origin: &Origin) -> Result<Self, Error> {
        let mut properties = wide_column(properties(schema, origin), "ctx", &schema.ctx);
        let mut values = vec![builders(&schema.ctx)];
        if let Some(pooled) = &schema.pooled {
            properties = wide_column(properties, "pooled", pooled);
            values.push(builders(pooled));
        }
        let columns = schema.embedding_columns();
        Ok(Self {
            schema: schema.clone(),
            file: ArrowWriter::try_new(Vec::new(), columns, Some(properties.build()))?,
            ids: FixedSizeBinaryBuilder::new(16),
            values,
            waiting: 0,
            seen: BTreeSet::new(),
        })
    }

    /// Whether `id` is in the file already, so that it need not be computed again.
    pub fn has(&self, id: &[u8; 16]) -> bool {
        self.seen.contains(id)
    }

    /// Adds an embedding, unless one with its id is there already.
    pub fn push(&mut self, id: [u8; 16], ctx: &[u8], pooled: Option<&[u8]>) -> Result<(), Error> {
        let expected: Vec<usize> = [Some(&self.schema.ctx), self.schema.pooled.as_ref()]
            .into_iter()
            .flatten()
            .map(Value::bytes)
            .collect();
        let given: Vec<&[u8]> = [Some(ctx), pooled].into_iter().flatten().collect();
        let found: Vec<usize> = given.iter().map(|value| value.len()).collect();
        if found != expected {
            return Err(Error::Format {
                file: "embeddings".into(),
                reason: format!("values of {found:?} bytes came, the schema says {expected:?}"),
            });
        }
        if !self.seen.insert(id) {
            return Ok(());
        }
        self.ids.append_value(id)?;
        for ((values, hashes), bytes) in self.values.iter_mut().zip(given) {
            values.append_value(bytes)?;
            hashes.append_value(xxh3_64(bytes));
        }
        self.waiting += 1;
        if self.waiting == GROUP_ROWS {
            self.flush()
        } else {
            Ok(())
        }
    }

    /// Ends the file.
    pub fn finish(mut self) -> Result<Bytes, Error> {
        self.flush()?;
        Ok(self.file.into_inner()?.into())
    }

    fn flush(&mut self) -> Result<(), Error> {
        if self.waiting == 0 {
            return Ok(());
        }
        let mut columns: Vec<ArrayRef> = vec![Arc::new(self.ids.finish())];
        for (values, hashes) in &mut self.values {
            columns.push(Arc::new(values.finish()));
            columns.push(Arc::new(hashes.finish()));
        }
        self.waiting = 0;
        self.file.write(&RecordBatch::try_new(
            self.schema.embedding_columns(),
            columns,
        )?)?;
        self.file.flush()?;
        Ok(())
    }
}

fn builders(value: &Value) -> (FixedSizeBinaryBuilder, UInt64Builder) {
    let width = i32::try_from(value.bytes()).expect("a value has at most 64 MiB");
    (FixedSizeBinaryBuilder::new(width), UInt64Builder::new())
}
