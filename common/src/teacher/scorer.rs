//! `scorer/scorer.json`, read and checked. The order of its objects decides between equals, so it is kept.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

/// Its place in a teacher's folder.
const FILE: &str = "scorer/scorer.json";

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
    /// Width and height of the pictures.
    pub size: (usize, usize),
    /// Colours of objects by name, in the order of the file.
    pub object_colours: Vec<(String, [i64; 3])>,
    /// Families of background tones, in the order of the file.
    pub families: Vec<Family>,
    /// What words of a caption mean.
    pub words: Words,
    /// What counts as an object.
    pub object: ObjectRules,
    /// What tells shapes apart.
    pub shape: ShapeRules,
    /// What counts as a relation.
    pub relation: RelationRules,
    /// What counts as a background.
    pub background: BackgroundRules,
    /// What tells patterns apart.
    pub pattern: PatternRules,
}

/// One family of background tones.
#[derive(Debug, Clone)]
pub struct Family {
    /// Its name.
    pub name: String,
    /// Its dark tone.
    pub dark: [i64; 3],
    /// Its light tone.
    pub light: [i64; 3],
}

/// The words that captions are made of.
#[derive(Debug, Clone, Deserialize)]
pub struct Words {
    /// Numbers by word.
    pub count: BTreeMap<String, u64>,
    /// Colours by word.
    pub colour: Table,
    /// Shapes by word.
    pub shape: Table,
    /// Relations by word: left or above.
    pub relation: Table,
    /// Families by word.
    pub background: Table,
    /// Patterns by word.
    pub pattern: Table,
}

/// Meanings by word.
pub type Table = BTreeMap<String, String>;

/// What counts as an object.
#[derive(Debug, Clone, Deserialize)]
pub struct ObjectRules {
    /// A pixel with a byte of at least this belongs to an object.
    pub min_brightness: u8,
    /// Pixels of the smallest object.
    pub min_area: usize,
}

/// What tells shapes apart.
#[derive(Debug, Clone, Deserialize)]
pub struct ShapeRules {
    /// Dark cells around the middle that make a ring.
    pub ring_min_empty: usize,
    /// Ratio of the axes that makes a bar.
    pub bar_min_elongation: f64,
    /// Third moment that makes a triangle.
    pub triangle_min_asymmetry: f64,
    /// Spread that makes a cross.
    pub cross_min_spread: f64,
}

/// What counts as a relation.
#[derive(Debug, Clone, Deserialize)]
pub struct RelationRules {
    /// Pixels between two middles.
    pub min_distance: f64,
}

/// What counts as a background.
#[derive(Debug, Clone, Deserialize)]
pub struct BackgroundRules {
    /// Pixels that must be left of the background.
    pub min_pixels: usize,
}

/// What tells patterns apart.
#[derive(Debug, Clone, Deserialize)]
pub struct PatternRules {
    /// Largest share of light pixels of a plain ground.
    pub plain_max_light: f64,
    /// Largest ratio of changes along the axes of a striped ground.
    pub striped_max_ratio: f64,
    /// Smallest share of light pixels of a checkered ground.
    pub checkered_min_light: f64,
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
    /// Reads the scorer of the teacher in `folder`.
    ///
    /// # Errors
    /// When it has none, or one that this program cannot use.
    pub fn open(folder: &Path) -> Result<Self, super::Error> {
        let path = folder.join(FILE);
        let text = super::keys::read_bytes(&path)?;
        Self::from_json(&text).map_err(|source| super::Error::Scorer { path, source })
    }

    /// Reads the text of `scorer.json`.
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
