//! Every key a recipe may have: its type, its bounds, its default and what it means.
//!
//! The checker and the JSON Schema both read this table, so they cannot say different things. What relates
//! two keys to each other is in `check::cross`. This module must never know where a value came from.

mod cluster;
mod kubernetes;
mod learning;
mod results;

/// A group of keys.
#[derive(Debug)]
pub(super) struct Section {
    /// As people call it.
    pub(super) name: &'static str,
    pub(super) fields: &'static [Field],
}

/// One key.
#[derive(Debug)]
pub(super) struct Field {
    pub(super) key: &'static str,
    pub(super) kind: Kind,
    pub(super) default: Fallback,
    /// The key means something only when its neighbour (key, word) says so.
    pub(super) only: Option<(&'static str, &'static str)>,
    pub(super) about: &'static str,
}

/// What stands in for a key that is not given.
#[derive(Debug)]
pub(super) enum Fallback {
    /// Nothing: the key must be there.
    Required,
    /// This YAML.
    Yaml(&'static str),
    /// Decided from other keys, or nothing at all.
    Open,
}

/// What a value must be.
#[derive(Debug)]
pub(super) enum Kind {
    Bool,
    Whole(u64, u64),
    /// Finite, between the bounds; the lower one only when `closed`.
    Real {
        min: f64,
        max: f64,
        closed: bool,
    },
    Word(&'static [Word]),
    /// Any text but the empty one.
    Text,
    /// One plain path segment.
    Name,
    /// A file or folder, relative to the recipe file.
    Path,
    /// A run URI, or a folder relative to the recipe file.
    Uri,
    /// Text that may come from `${env:NAME}` or `${file:PATH}`.
    Secret,
    /// One word that stands for "none" or "decide yourself", or a value.
    Or(&'static str, &'static Kind),
    /// `false`, or a section; `true` means the section with its defaults.
    Switch(&'static Section),
    Section(&'static Section),
    /// At least one value, none twice.
    List(&'static Kind),
    /// Exactly two values.
    Pair(&'static Kind),
    /// A share below one, or a file.
    ShareOrPath,
    /// A preset's name, or a list of module names.
    Targets,
    /// A name as Kubernetes allows one: a DNS label or several, in lower case.
    DnsName,
    /// Keys of the user's own choice, each with a text.
    Map(MapOf),
    /// Lines of shell, as a list or as one text: taken as they are.
    Shell,
    /// Words of a command: at least one, any of them twice.
    Words,
    /// Known, refused.
    NotBuilt,
}

/// What a map of the user's own keys holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MapOf {
    /// Labels of Kubernetes.
    Labels,
    /// Amounts of resources of Kubernetes.
    Quantities,
}

/// One of the words a value may be.
#[derive(Debug)]
pub(super) struct Word {
    pub(super) name: &'static str,
    pub(super) built: bool,
}

const fn field(key: &'static str, kind: Kind, default: Fallback, about: &'static str) -> Field {
    Field {
        key,
        kind,
        default,
        only: None,
        about,
    }
}

const fn not_built(key: &'static str) -> Field {
    field(key, Kind::NotBuilt, Fallback::Open, "not built yet")
}

impl Field {
    const fn only(mut self, key: &'static str, word: &'static str) -> Self {
        self.only = Some((key, word));
        self
    }
}

const fn word(name: &'static str) -> Word {
    Word { name, built: true }
}

const fn later(name: &'static str) -> Word {
    Word { name, built: false }
}

use cluster::CLUSTER;
use learning::{BATCH, COMPUTE, LOSS, OPTIMIZER, STAGE, STUDENT};
use results::{CHECKPOINT, EVALUATE, EXPORT, PREVIEW};

use Fallback::{Open, Required, Yaml};
use Kind::{List, Name, Or, Path, Real, ShareOrPath, Switch, Uri, Whole};

const POSITIVE: Kind = Real {
    min: 0.0,
    max: 1e6,
    closed: false,
};
const NOT_NEGATIVE: Kind = Real {
    min: 0.0,
    max: 1e6,
    closed: true,
};
/// The largest number allowed where 1 is not.
pub(super) const ALMOST_ONE: f64 = 1.0 - f64::EPSILON / 2.0;
const BELOW_ONE: Kind = Real {
    min: 0.0,
    max: ALMOST_ONE,
    closed: true,
};
const DTYPE: Kind = Kind::Word(&[word("f32"), word("f16"), word("bf16")]);
const STEPS: Kind = List(&Whole(1, 1000));
/// Samplers of students.
const SAMPLER: Kind = Kind::Word(&[word("tlcm9"), word("lcm"), word("segments")]);

/// The whole recipe.
pub(super) static RECIPE: Section = Section {
    name: "the recipe",
    fields: &[
        field(
            "version",
            Whole(1, 1),
            Required,
            "version of this format: 1",
        ),
        field(
            "name",
            Name,
            Required,
            "name for people, of letters, digits and ._=-",
        ),
        field(
            "seed",
            Whole(0, u64::MAX),
            Yaml("0"),
            "all randomness derives from it",
        ),
        field(
            "output",
            Uri,
            Required,
            "run URI: a folder, file://, s3://, gs:// or az://",
        ),
        field(
            "teacher",
            Kind::Section(&TEACHER),
            Required,
            "the model to learn from",
        ),
        field(
            "prompts",
            Kind::Section(&PROMPTS),
            Required,
            "texts to learn on and to be judged by",
        ),
        field("student", Kind::Section(&STUDENT), Open, "what is trained"),
        field(
            "trajectories",
            Kind::Section(&TRAJECTORIES),
            Open,
            "what the teacher draws",
        ),
        field(
            "optimizer",
            Kind::Section(&OPTIMIZER),
            Open,
            "how students are trained",
        ),
        field(
            "batch",
            Kind::Section(&BATCH),
            Open,
            "rows seen by one step",
        ),
        field(
            "loss",
            Kind::Section(&LOSS),
            Open,
            "distance between two landings",
        ),
        field(
            "compute",
            Kind::Section(&COMPUTE),
            Open,
            "number formats and threads",
        ),
        field(
            "stages",
            List(&Kind::Section(&STAGE)),
            Required,
            "training stages in order; each inherits student, optimizer, batch, loss and compute and may override any key of them",
        ),
        field(
            "checkpoint",
            Kind::Section(&CHECKPOINT),
            Open,
            "when state is saved and what is kept",
        ),
        field(
            "preview",
            Kind::Section(&PREVIEW),
            Open,
            "what sample grids show",
        ),
        field(
            "evaluate",
            Switch(&EVALUATE),
            Open,
            "how students are judged; on when the teacher folder has a scorer",
        ),
        field(
            "export",
            Switch(&EXPORT),
            Open,
            "what is written at the end",
        ),
        field(
            "cluster",
            Kind::Section(&CLUSTER),
            Open,
            "who does the work",
        ),
        not_built("on_error"),
    ],
};

/// Sections at the top that a stage inherits.
pub(super) const INHERITED: [&str; 5] = ["student", "optimizer", "batch", "loss", "compute"];

/// Names that stages of the plan already bear.
pub(super) const RESERVED_STAGES: [&str; 5] =
    ["trajectories", "reference", "evaluate", "export", "teacher"];

static TEACHER: Section = Section {
    name: "teacher",
    fields: &[
        field("model", Path, Required, "folder in the diffusers layout"),
        field(
            "variant",
            Or("none", &Name),
            Yaml("none"),
            "fp16 reads *.fp16.safetensors",
        ),
        field(
            "dtype",
            DTYPE,
            Yaml("f32"),
            "what its weights are computed in",
        ),
        field(
            "guidance",
            Real {
                min: 1.0,
                max: 100.0,
                closed: true,
            },
            Yaml("8.0"),
            "w in n_null + w (n_cond - n_null); 1 means none",
        ),
        field(
            "solver",
            Kind::Word(&[word("ddim")]),
            Yaml("ddim"),
            "how trajectories are drawn",
        ),
    ],
};

static PROMPTS: Section = Section {
    name: "prompts",
    fields: &[
        field("train", Path, Required, ".txt, .jsonl or .parquet"),
        field(
            "holdout",
            ShareOrPath,
            Yaml("0.01"),
            "share of train, or a file, that training never sees",
        ),
        field(
            "preview",
            Or("none", &Path),
            Yaml("none"),
            "prompts of the sample grids; else the first held-out ones",
        ),
    ],
};

static TRAJECTORIES: Section = Section {
    name: "trajectories",
    fields: &[
        field(
            "count",
            Whole(1, 1 << 40),
            Yaml("21000"),
            "number of trajectories",
        ),
        field(
            "segments",
            Whole(1, 500),
            Yaml("8"),
            "segments of the finest stage",
        ),
        field(
            "mode",
            Kind::Word(&[word("stratified"), word("alg1")]),
            Yaml("stratified"),
            "one pass for all segments, or one for each state",
        ),
        field(
            "time_grid",
            Or("none", &Whole(1, 1000)),
            Yaml("40"),
            "equally spaced times that states lie on; none = any",
        ),
        field(
            "shard_trajectories",
            Whole(1, 1 << 20),
            Yaml("224"),
            "trajectories in one shard, a multiple of batch",
        ),
        field(
            "batch",
            Whole(1, 4096),
            Yaml("8"),
            "trajectories computed together; part of the result's identity",
        ),
        field(
            "dtype",
            Kind::Word(&[word("f16")]),
            Yaml("f16"),
            "what states are stored in",
        ),
        field(
            "quarantine",
            BELOW_ONE,
            Yaml("0"),
            "share of shards that may be set aside for bad input",
        ),
        field(
            "uri",
            Or("none", &Uri),
            Yaml("none"),
            "an earlier set to reuse",
        ),
    ],
};
