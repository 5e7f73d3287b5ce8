//! `scorer.json`, read and checked. The order of its objects decides between equals, so it is kept.

use serde::Deserialize;
use serde_json::{Map, Value};

/// The format that this program implements.
const FORMAT: &str = "distillery-scene-scorer";
const VERSION: u64 = 1;
/// Above this side the integer sums of the specification no longer fit 64 bits.
const MAX_SIDE: usize = 32;

/// A scorer that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON of the right form.
    #[error("the scorer's rules are not readable")]
    Malformed(#[from] serde_json::Error),
    /// Another format or version.
    #[error(
        "the scorer has format {format:?} version {version}; this program reads {FORMAT:?} version {VERSION}"
    )]
    Format {
        /// Its format.
        format: String,
        /// Its version.
        version: u64,
    },
    /// A value out of range.
    #[error("the scorer's rules are not usable: {0}")]
    Rule(String),
    /// A picture of another size.
    #[error("the scorer reads pictures of {expected:?} pixels, this one has {found:?}")]
    Size {
        /// (width, height) of the rules.
        expected: (usize, usize),
        /// (width, height) of the picture.
        found: (usize, usize),
    },
}

/// The rules, in the names of the file.
#[derive(Debug, Clone)]
pub struct Rules {
    pub(super) size: (usize, usize),
    pub(super) object_colours: Vec<(String, [i64; 3])>,
    pub(super) families: Vec<Family>,
    pub(super) words: Words,
    pub(super) object: ObjectRules,
    pub(super) shape: ShapeRules,
    pub(super) relation: RelationRules,
    pub(super) background: BackgroundRules,
    pub(super) pattern: PatternRules,
}

/// One family of background tones.
#[derive(Debug, Clone)]
pub(super) struct Family {
    pub(super) name: String,
    pub(super) dark: [i64; 3],
    pub(super) light: [i64; 3],
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Words {
    pub(super) count: std::collections::BTreeMap<String, u64>,
    pub(super) colour: Table,
    pub(super) shape: Table,
    pub(super) relation: Table,
    pub(super) background: Table,
    pub(super) pattern: Table,
}

type Table = std::collections::BTreeMap<String, String>;

#[derive(Debug, Clone, Deserialize)]
pub(super) struct ObjectRules {
    pub(super) min_brightness: u8,
    pub(super) min_area: usize,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct ShapeRules {
    pub(super) ring_min_empty: usize,
    pub(super) bar_min_elongation: f64,
    pub(super) triangle_min_asymmetry: f64,
    pub(super) cross_min_spread: f64,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct RelationRules {
    pub(super) min_distance: f64,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct BackgroundRules {
    pub(super) min_pixels: usize,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct PatternRules {
    pub(super) plain_max_light: f64,
    pub(super) striped_max_ratio: f64,
    pub(super) checkered_min_light: f64,
}

#[derive(Deserialize)]
struct Head {
    format: String,
    version: u64,
}

#[derive(Deserialize)]
struct File {
    image: Image,
    palette: Palette,
    words: Words,
    object: ObjectRules,
    shape: ShapeRules,
    relation: RelationRules,
    background: BackgroundRules,
    pattern: PatternRules,
}

#[derive(Deserialize)]
struct Image {
    width: usize,
    height: usize,
}

#[derive(Deserialize)]
struct Palette {
    objects: Map<String, Value>,
    backgrounds: Map<String, Value>,
}

#[derive(Deserialize)]
struct Tones {
    dark: [u8; 3],
    light: [u8; 3],
}

impl Rules {
    /// Reads `scorer.json`.
    pub fn from_json(text: &[u8]) -> Result<Self, Error> {
        let head: Head = serde_json::from_slice(text)?;
        if head.format != FORMAT || head.version != VERSION {
            return Err(Error::Format {
                format: head.format,
                version: head.version,
            });
        }
        let file: File = serde_json::from_slice(text)?;
        let size = (file.image.width, file.image.height);
        if !(1..=MAX_SIDE).contains(&size.0) || !(1..=MAX_SIDE).contains(&size.1) {
            return Err(Error::Rule(format!(
                "pictures of {size:?} pixels; at most {MAX_SIDE} a side"
            )));
        }
        if file.palette.objects.is_empty() || file.palette.backgrounds.is_empty() {
            return Err(Error::Rule("an empty palette".into()));
        }
        let relations = file.words.relation.values();
        if let Some(other) = relations
            .clone()
            .find(|r| !["left", "above"].contains(&r.as_str()))
        {
            return Err(Error::Rule(format!(
                "the relation {other:?} is none of left, above"
            )));
        }
        let object_colours = file
            .palette
            .objects
            .into_iter()
            .map(|(name, rgb)| Ok((name, serde_json::from_value::<[u8; 3]>(rgb)?.map(i64::from))))
            .collect::<Result<_, Error>>()?;
        let families = file
            .palette
            .backgrounds
            .into_iter()
            .map(|(name, tones)| {
                let Tones { dark, light } = serde_json::from_value(tones)?;
                Ok(Family {
                    name,
                    dark: dark.map(i64::from),
                    light: light.map(i64::from),
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            size,
            object_colours,
            families,
            words: file.words,
            object: file.object,
            shape: file.shape,
            relation: file.relation,
            background: file.background,
            pattern: file.pattern,
        })
    }

    /// Refuses pictures of another size.
    pub fn check_size(&self, width: usize, height: usize) -> Result<(), Error> {
        if self.size == (width, height) {
            Ok(())
        } else {
            Err(Error::Size {
                expected: self.size,
                found: (width, height),
            })
        }
    }
}
