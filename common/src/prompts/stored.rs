//! The lists of a run as Parquet: equal prompts are equal bytes, whenever and wherever they are written.
//!
//! Written and read column by column, without Arrow, which would be most of the programs that only pass prompts on.

use std::sync::Arc;

use ::parquet::data_type::{
    ByteArray, ByteArrayType, DataType, FixedLenByteArray, FixedLenByteArrayType,
};
use ::parquet::errors::Result as ParquetResult;
use ::parquet::file::metadata::ParquetMetaDataReader;
use ::parquet::file::properties::{EnabledStatistics, WriterProperties};
use ::parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use ::parquet::schema::parser::parse_message_type;
use bytes::Bytes;

use super::{Error, Prompt, parquet};

/// The columns: the first 16 bytes of a text's SHA-256, and the text.
const SCHEMA: &str = "message prompts {
    REQUIRED FIXED_LEN_BYTE_ARRAY (16) prompt_id;
    REQUIRED BYTE_ARRAY text (STRING);
}";

/// Writes columns `prompt_id` and `text`, one row for each prompt, in order.
pub fn to_parquet(prompts: &[Prompt]) -> Bytes {
    write(prompts)
        .expect("writing to memory does not fail")
        .into()
}

fn write(prompts: &[Prompt]) -> ParquetResult<Vec<u8>> {
    let properties = WriterProperties::builder()
        .set_created_by("distillery".to_owned())
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .build();
    let ids: Vec<FixedLenByteArray> = prompts
        .iter()
        .map(|p| ByteArray::from(p.id().to_vec()).into())
        .collect();
    let texts: Vec<ByteArray> = prompts.iter().map(|p| p.text().into()).collect();
    let mut bytes = Vec::new();
    let schema = Arc::new(parse_message_type(SCHEMA)?);
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties))?;
    if !prompts.is_empty() {
        let mut group = writer.next_row_group()?;
        write_column::<FixedLenByteArrayType>(&mut group, &ids)?;
        write_column::<ByteArrayType>(&mut group, &texts)?;
        group.close()?;
    }
    writer.close()?;
    Ok(bytes)
}

fn write_column<T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, &mut Vec<u8>>,
    values: &[T::T],
) -> ParquetResult<()> {
    let mut column = group.next_column()?.expect("the schema has two columns");
    column.typed::<T>().write_batch(values, None, None)?;
    column.close()
}

/// Reads what [`to_parquet`] wrote.
///
/// # Errors
///
/// Bytes that are no such file, or ids that do not belong to their texts.
pub fn from_parquet(bytes: &Bytes) -> Result<Vec<Prompt>, Error> {
    read(bytes).map_err(Error::Stored)
}

fn read(bytes: &Bytes) -> Result<Vec<Prompt>, String> {
    let metadata = ParquetMetaDataReader::new()
        .parse_and_finish(bytes)
        .map_err(parquet::words)?;
    let columns = metadata.file_metadata().schema_descr().columns();
    let wanted = parse_message_type(SCHEMA).map_err(parquet::words)?;
    let is_ours = columns.len() == 2
        && columns
            .iter()
            .zip(wanted.get_fields())
            .all(|(found, wanted)| found.self_type() == wanted.as_ref());
    if !is_ours {
        let names: Vec<String> = columns.iter().map(|c| c.path().string()).collect();
        return Err(format!(
            "its columns are {}, or of other types",
            names.join(", ")
        ));
    }
    let mut prompts = Vec::new();
    for group in metadata.row_groups() {
        let ids = parquet::stored_ids(bytes, group.column(0))?;
        let texts = parquet::stored_texts(bytes, group.column(1))?;
        if ids.len() != texts.len() {
            return Err("its columns differ in length".into());
        }
        for (id, text) in ids.iter().zip(&texts) {
            let number = prompts.len();
            let prompt = Prompt::new(text).filter(|p| p.text() == text && p.id() == *id);
            prompts
                .push(prompt.ok_or_else(|| format!("row {number} has another id than its text"))?);
        }
    }
    Ok(prompts)
}
