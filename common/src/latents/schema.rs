//! What a row of a trajectory file is, and of the text embeddings beside it (data-plane.md §3).

use std::collections::HashMap;
use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema};

use crate::ids::Digest;

/// Version of the row format; part of every dataset's digest.
pub const FORMAT_VERSION: u32 = 1;
/// The largest state or embedding, in bytes.
pub const MAX_VALUE_BYTES: usize = 64 << 20;

/// Number formats of stored values, little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl Element {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }
}

/// Shape and number format of a stored value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// Number format.
    pub element: Element,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl Value {
    /// A value of this format and shape.
    pub fn new(element: Element, shape: &[usize]) -> Self {
        Self {
            element,
            shape: shape.to_vec(),
        }
    }

    /// Bytes of one value.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.element.bytes()
    }

    fn text(&self) -> String {
        let sizes: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        format!("{}:{}", self.element.name(), sizes.join("x"))
    }

    fn parse(text: &str) -> Option<Self> {
        let (element, sizes) = text.split_once(':')?;
        let element = match element {
            "f16" => Element::F16,
            "f32" => Element::F32,
            _ => return None,
        };
        let shape = sizes
            .split('x')
            .map(|size| size.parse().ok().filter(|&n: &usize| n > 0))
            .collect::<Option<Vec<_>>>()?;
        let bytes = shape
            .iter()
            .try_fold(element.bytes(), |bytes, &size| bytes.checked_mul(size))?;
        (bytes <= MAX_VALUE_BYTES).then_some(Self { element, shape })
    }
}

/// What the files of a dataset hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowSchema {
    /// A state, and the guided prediction at it: `[C, H, W]`.
    pub latent: Value,
    /// The text encoders' output for one prompt: `[tokens, width]`.
    pub ctx: Value,
    /// The pooled output, where the teacher uses one: `[width]`.
    pub pooled: Option<Value>,
}

impl RowSchema {
    /// Bytes of a state, and of a prediction.
    pub fn row_bytes(&self) -> usize {
        self.latent.bytes()
    }

    /// The schema as one line of text; equal text means equal layout.
    pub fn id(&self) -> String {
        let pooled = self.pooled.as_ref().map_or("none".into(), Value::text);
        format!(
            "rows-{FORMAT_VERSION};latent={};ctx={};pooled={pooled}",
            self.latent.text(),
            self.ctx.text()
        )
    }

    /// Reads what [`RowSchema::id`] wrote; none for another version or a shape beyond all bounds.
    pub fn parse(id: &str) -> Option<Self> {
        let mut parts = id.split(';');
        let version = parts.next()?.strip_prefix("rows-")?;
        let latent = Value::parse(parts.next()?.strip_prefix("latent=")?)?;
        let ctx = Value::parse(parts.next()?.strip_prefix("ctx=")?)?;
        let pooled = match parts.next()?.strip_prefix("pooled=")? {
            "none" => None,
            text => Some(Value::parse(text)?),
        };
        let schema = Self {
            latent,
            ctx,
            pooled,
        };
        (version == FORMAT_VERSION.to_string() && schema.id() == id).then_some(schema)
    }

    /// Columns of a trajectory file.
    pub(super) fn row_columns(&self) -> Arc<Schema> {
        let id = DataType::FixedSizeBinary(16);
        Arc::new(Schema::new(vec![
            column("traj_id", id.clone()),
            column("traj_ord", DataType::UInt64),
            column("prompt_id", id.clone()),
            column("seed", DataType::UInt64),
            column("guidance", DataType::Float32),
            column("step", DataType::UInt16),
            column("n_steps", DataType::UInt16),
            column("timestep", DataType::Int32),
            column("segment", DataType::UInt16),
            column("segments", DataType::UInt16),
            column("mode", DataType::Utf8),
            column("cond_id", id.clone()),
            column("uncond_id", id),
            value_column("latent", &self.latent),
            column("latent_xxh3", DataType::UInt64),
            value_column("eps_w", &self.latent),
            column("eps_w_xxh3", DataType::UInt64),
        ]))
    }

    /// Columns of a file of text embeddings.
    pub(super) fn embedding_columns(&self) -> Arc<Schema> {
        let mut columns = vec![
            column("cond_id", DataType::FixedSizeBinary(16)),
            value_column("ctx", &self.ctx),
            column("ctx_xxh3", DataType::UInt64),
        ];
        if let Some(pooled) = &self.pooled {
            columns.push(value_column("pooled", pooled));
            columns.push(column("pooled_xxh3", DataType::UInt64));
        }
        Arc::new(Schema::new(columns))
    }
}

fn column(name: &str, data_type: DataType) -> Field {
    Field::new(name, data_type, false)
}

fn value_column(name: &str, value: &Value) -> Field {
    let width = i32::try_from(value.bytes()).expect("a value has at most 64 MiB");
    let described = HashMap::from([
        ("tensor.dtype".to_owned(), value.element.name().to_owned()),
        ("tensor.shape".to_owned(), format!("{:?}", value.shape)),
        ("tensor.order".to_owned(), "row-major".to_owned()),
        ("latent.codec".to_owned(), "raw".to_owned()),
    ]);
    column(name, DataType::FixedSizeBinary(width)).with_metadata(described)
}

/// What a file says about where it comes from. Nothing here differs between attempts.
#[derive(Debug, Clone, PartialEq)]
pub struct Origin {
    /// Digest that names the dataset.
    pub dataset: Digest,
    /// Names the teacher.
    pub teacher: String,
    /// Digest of what in the recipe the rows depend on.
    pub config: Digest,
    /// The VAE's scale of latents.
    pub latent_scale: f64,
}

/// The first 16 bytes of the SHA-256 of `parts`, each after its length: an id that hides no boundary.
pub fn id_of(parts: &[&[u8]]) -> [u8; 16] {
    let mut joined = Vec::new();
    for part in parts {
        joined.extend_from_slice(&(part.len() as u64).to_le_bytes());
        joined.extend_from_slice(part);
    }
    let digest = Digest::of(&joined).0;
    std::array::from_fn(|i| digest[i])
}

/// One visited state with the teacher's guided prediction at it.
#[derive(Debug, Clone, Copy)]
pub struct TrajectoryRow<'a> {
    /// Names the trajectory by everything that it depends on.
    pub traj_id: [u8; 16],
    /// Position of the trajectory in the dataset.
    pub traj_ord: u64,
    /// Hash of the normalised prompt.
    pub prompt_id: [u8; 16],
    /// Seed of the run.
    pub seed: u64,
    /// Guidance scale w.
    pub guidance: f32,
    /// Position in the trajectory; 0 is pure noise.
    pub step: u16,
    /// Rows of the trajectory.
    pub n_steps: u16,
    /// Integer training timestep of the state.
    pub timestep: i32,
    /// Segment of the generation pass that holds the timestep.
    pub segment: u16,
    /// Segments of the generation pass.
    pub segments: u16,
    /// How states were drawn (`stratified`, `alg1`).
    pub mode: &'a str,
    /// Text embedding of the prompt.
    pub cond_id: [u8; 16],
    /// Text embedding of the unconditional pass.
    pub uncond_id: [u8; 16],
    /// The state, `[C, H, W]`, as the schema's bytes.
    pub latent: &'a [u8],
    /// The guided prediction at the state, as noise, likewise.
    pub eps_w: &'a [u8],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_is_its_id() {
        let schema = RowSchema {
            latent: Value::new(Element::F16, &[4, 128, 128]),
            ctx: Value::new(Element::F16, &[77, 2048]),
            pooled: Some(Value::new(Element::F16, &[1280])),
        };
        assert_eq!(schema.row_bytes(), 131_072);
        assert_eq!(
            schema.id(),
            "rows-1;latent=f16:4x128x128;ctx=f16:77x2048;pooled=f16:1280"
        );
        assert_eq!(RowSchema::parse(&schema.id()), Some(schema.clone()));
        let small = RowSchema {
            pooled: None,
            ..schema
        };
        assert_eq!(RowSchema::parse(&small.id()), Some(small));
    }

    #[test]
    fn an_impossible_schema_is_none() {
        for id in [
            "",
            "rows-2;latent=f16:4x8x8;ctx=f16:4x8;pooled=none",
            "rows-1;latent=f16:4x0x8;ctx=f16:4x8;pooled=none",
            "rows-1;latent=f16:99999999x99999999x99999999;ctx=f16:4x8;pooled=none",
            "rows-1;latent=f64:4x8x8;ctx=f16:4x8;pooled=none",
            "rows-1;latent=f16:4x8x8;ctx=f16:4x8;pooled=none;more=1",
            "rows-1;latent=f16:+4x8x8;ctx=f16:4x8;pooled=none",
        ] {
            assert_eq!(RowSchema::parse(id), None, "{id}");
        }
    }

    #[test]
    fn ids_keep_the_boundaries_of_their_parts() {
        assert_ne!(id_of(&[b"ab", b"c"]), id_of(&[b"a", b"bc"]));
        assert_ne!(id_of(&[b"a"]), id_of(&[b"a", b""]));
    }
}
