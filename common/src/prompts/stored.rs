//! The lists of a run as Parquet: equal prompts are equal bytes, whenever and wherever they are written.

use std::sync::Arc;

use arrow_array::{Array as _, FixedSizeBinaryArray, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::{EnabledStatistics, WriterProperties};

use super::{Error, Prompt};

/// Writes columns `prompt_id` and `text`, one row for each prompt, in order.
pub fn to_parquet(prompts: &[Prompt]) -> Bytes {
    let ids: Vec<[u8; 16]> = prompts.iter().map(Prompt::id).collect();
    let ids = if ids.is_empty() {
        FixedSizeBinaryArray::new_null(16, 0)
    } else {
        FixedSizeBinaryArray::try_from_iter(ids.iter()).expect("all ids have 16 bytes")
    };
    let texts = StringArray::from_iter_values(prompts.iter().map(Prompt::text));
    let batch = RecordBatch::try_new(schema(), vec![Arc::new(ids), Arc::new(texts)])
        .expect("both columns have a row for each prompt");
    let properties = WriterProperties::builder()
        .set_created_by("distillery".to_owned())
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .build();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, schema(), Some(properties))
        .expect("the schema has a Parquet form");
    writer
        .write(&batch)
        .expect("writing to memory does not fail");
    writer.close().expect("writing to memory does not fail");
    bytes.into()
}

/// Reads what [`to_parquet`] wrote.
///
/// # Errors
///
/// Bytes that are no such file, or ids that do not belong to their texts.
pub fn from_parquet(bytes: &Bytes) -> Result<Vec<Prompt>, Error> {
    let stored = |e: &dyn std::fmt::Display| Error::Stored(e.to_string());
    let builder =
        ParquetRecordBatchReaderBuilder::try_new(bytes.clone()).map_err(|e| stored(&e))?;
    let found: Vec<&DataType> = builder
        .schema()
        .fields()
        .iter()
        .map(|f| f.data_type())
        .collect();
    if found != [&DataType::FixedSizeBinary(16), &DataType::Utf8] {
        return Err(stored(&format!("its columns are {found:?}")));
    }
    let mut prompts = Vec::new();
    for batch in builder.build().map_err(|e| stored(&e))? {
        let batch = batch.map_err(|e| stored(&e))?;
        let ids = batch
            .column(0)
            .as_any()
            .downcast_ref::<FixedSizeBinaryArray>();
        let texts = batch.column(1).as_any().downcast_ref::<StringArray>();
        let (ids, texts) = (ids.expect("checked above"), texts.expect("checked above"));
        for row in 0..batch.num_rows() {
            let prompt = Prompt::new(texts.value(row))
                .filter(|p| p.text() == texts.value(row) && p.id() == ids.value(row));
            let number = prompts.len();
            prompts
                .push(prompt.ok_or_else(|| {
                    stored(&format!("row {number} has another id than its text"))
                })?);
        }
    }
    Ok(prompts)
}

fn schema() -> Arc<Schema> {
    Arc::new(Schema::new(vec![
        Field::new("prompt_id", DataType::FixedSizeBinary(16), false),
        Field::new("text", DataType::Utf8, false),
    ]))
}
