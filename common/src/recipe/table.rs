//! Every key a recipe may have: its type, its bounds, its default and what it means.
//!
//! The checker and the JSON Schema both read this table, so they cannot say different things. What relates
//! two keys to each other is in `check::cross`. This module must never know where a value came from.

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
    /// Known, refused.
    NotBuilt,
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

use Fallback::{Open, Required, Yaml};
use Kind::{
    Bool, List, Name, Or, Pair, Path, Real, Secret, ShareOrPath, Switch, Targets, Text, Uri, Whole,
};

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
const BELOW_ONE: Kind = Real {
    min: 0.0,
    max: 0.999_999_999,
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

static STUDENT: Section = Section {
    name: "student",
    fields: &[
        field(
            "kind",
            Kind::Word(&[word("lora"), word("full")]),
            Yaml("lora"),
            "adapters, or every weight",
        ),
        field(
            "lora_rank",
            Whole(1, 4096),
            Yaml("64"),
            "inner width of the adapters",
        )
        .only("kind", "lora"),
        field(
            "lora_alpha",
            POSITIVE,
            Yaml("8"),
            "the delta is multiplied by lora_alpha / lora_rank",
        )
        .only("kind", "lora"),
        field(
            "targets",
            Targets,
            Yaml("lcm"),
            "modules with adapters: preset lcm, or a list of last path components",
        )
        .only("kind", "lora"),
        field(
            "ema",
            Switch(&EMA),
            Yaml("false"),
            "a moving average that is sampled and exported instead",
        ),
    ],
};

static EMA: Section = Section {
    name: "ema",
    fields: &[field(
        "decay",
        BELOW_ONE,
        Yaml("0.95"),
        "share of the average that stays at each step",
    )],
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

static OPTIMIZER: Section = Section {
    name: "optimizer",
    fields: &[
        field("kind", Kind::Word(&[word("adamw")]), Yaml("adamw"), "AdamW"),
        field("lr", POSITIVE, Yaml("1.0e-4"), "peak learning rate"),
        field(
            "betas",
            Pair(&BELOW_ONE),
            Yaml("[0.9, 0.999]"),
            "decay rates of the two moments",
        ),
        field(
            "epsilon",
            POSITIVE,
            Yaml("1.0e-8"),
            "added to the root of the second moment",
        ),
        field(
            "weight_decay",
            NOT_NEGATIVE,
            Yaml("0"),
            "decoupled weight decay",
        ),
        field(
            "grad_clip",
            Or("none", &POSITIVE),
            Yaml("1.0"),
            "largest global gradient norm",
        ),
        field(
            "schedule",
            Kind::Section(&SCHEDULE),
            Open,
            "shape of the learning rate",
        ),
        field(
            "max_skipped",
            Whole(0, 1_000_000),
            Yaml("10"),
            "steps in a row that a non-finite gradient may cost",
        ),
    ],
};

static SCHEDULE: Section = Section {
    name: "schedule",
    fields: &[
        field(
            "kind",
            Kind::Word(&[word("constant"), word("cosine"), word("linear")]),
            Yaml("constant"),
            "after warm-up",
        ),
        field(
            "warmup",
            Or("auto", &Whole(0, 1 << 40)),
            Yaml("auto"),
            "steps of linear warm-up; auto = a tenth of the steps, at most 100",
        ),
    ],
};

static BATCH: Section = Section {
    name: "batch",
    fields: &[
        field(
            "global",
            Whole(1, 1 << 20),
            Yaml("16"),
            "rows in one step over all engines",
        ),
        field(
            "micro",
            Or("auto", &Whole(1, 1 << 20)),
            Yaml("auto"),
            "rows in one forward pass; auto = an engine's whole share",
        ),
        field(
            "reproducible",
            Kind::Word(&[word("false"), later("true")]),
            Yaml("false"),
            "bits that do not depend on the number of workers",
        ),
    ],
};

static LOSS: Section = Section {
    name: "loss",
    fields: &[
        field(
            "kind",
            Kind::Word(&[word("l2"), word("huber")]),
            Yaml("l2"),
            "squared L2 or pseudo-Huber",
        ),
        field(
            "c",
            POSITIVE,
            Yaml("0.001"),
            "where huber turns from square to linear",
        )
        .only("kind", "huber"),
    ],
};

static COMPUTE: Section = Section {
    name: "compute",
    fields: &[
        field(
            "dtype",
            Kind::Word(&[word("f32"), word("bf16")]),
            Yaml("f32"),
            "forward and backward passes; masters stay f32",
        ),
        field(
            "threads",
            Or("auto", &Whole(1, 1024)),
            Yaml("auto"),
            "CPU threads of one engine; auto = cores divided by engines",
        ),
    ],
};

static STAGE: Section = Section {
    name: "a stage",
    fields: &[
        field(
            "name",
            Name,
            Required,
            "unique; names its checkpoints and exports",
        ),
        field(
            "method",
            Kind::Word(&[word("mlcm"), word("lcm"), word("mcd")]),
            Yaml("mlcm"),
            "what is minimised",
        ),
        field(
            "segments",
            Or("auto", &Whole(1, 500)),
            Open,
            "number of segments; lcm has 1",
        ),
        field(
            "skip",
            Or("auto", &Whole(1, 999)),
            Yaml("auto"),
            "timesteps of one teacher step; auto = one grid step, 20 without a grid",
        ),
        field("steps", Whole(1, 1 << 40), Required, "optimizer steps"),
        field(
            "teacher_step",
            Kind::Word(&[word("stored"), word("online")]),
            Yaml("stored"),
            "from the rows, or two teacher passes for each batch",
        ),
        field(
            "student",
            Kind::Section(&STUDENT),
            Open,
            "overrides of student",
        ),
        field(
            "optimizer",
            Kind::Section(&OPTIMIZER),
            Open,
            "overrides of optimizer",
        ),
        field("batch", Kind::Section(&BATCH), Open, "overrides of batch"),
        field("loss", Kind::Section(&LOSS), Open, "overrides of loss"),
        field(
            "compute",
            Kind::Section(&COMPUTE),
            Open,
            "overrides of compute",
        ),
        not_built("on_error"),
    ],
};

static CHECKPOINT: Section = Section {
    name: "checkpoint",
    fields: &[
        field(
            "every_steps",
            Whole(1, 1 << 40),
            Yaml("250"),
            "steps between checkpoints; the last step always has one",
        ),
        field("keep", Kind::Section(&KEEP), Open, "what stays"),
    ],
};

static KEEP: Section = Section {
    name: "keep",
    fields: &[
        field(
            "last",
            Whole(1, 10_000),
            Yaml("3"),
            "newest checkpoints of each stage",
        ),
        field(
            "every_stage",
            Bool,
            Yaml("true"),
            "whether each stage's last one stays",
        ),
    ],
};

static PREVIEW: Section = Section {
    name: "preview",
    fields: &[
        not_built("every_steps"),
        field(
            "steps",
            STEPS,
            Yaml("[1, 2, 4, 8]"),
            "step counts, one column each",
        ),
        field(
            "sampler",
            SAMPLER,
            Yaml("tlcm9"),
            "how students are sampled",
        ),
        field(
            "seeds",
            List(&Whole(0, u64::MAX)),
            Yaml("[0, 1, 2, 3]"),
            "one row for each prompt and seed",
        ),
    ],
};

static EVALUATE: Section = Section {
    name: "evaluate",
    fields: &[
        field(
            "samples",
            Whole(2, 10_000_000),
            Yaml("2000"),
            "samples for each model, sampler and step count",
        ),
        field(
            "steps",
            STEPS,
            Yaml("[1, 2, 4, 8]"),
            "step counts of students",
        ),
        field(
            "teacher_steps",
            STEPS,
            Yaml("[2, 4, 8, 25, 50]"),
            "step counts of the teacher; the largest is the reference",
        ),
        field(
            "samplers",
            List(&SAMPLER),
            Yaml("[tlcm9, segments]"),
            "samplers of students; the first is the headline",
        ),
        field(
            "metrics",
            List(&Kind::Word(&[
                word("latent_frechet"),
                word("teacher_distance"),
                word("prompt_adherence"),
            ])),
            Open,
            "what is measured; all that can be, unless said",
        ),
        field(
            "scorer",
            Kind::Word(&[word("teacher"), later("command")]),
            Yaml("teacher"),
            "who reads attributes from images",
        ),
        field(
            "batch",
            Whole(1, 4096),
            Yaml("16"),
            "samples computed together",
        ),
    ],
};

static EXPORT: Section = Section {
    name: "export",
    fields: &[
        field(
            "formats",
            List(&Kind::Word(&[
                word("diffusers"),
                word("lora_universal"),
                later("lora_peft"),
                later("single_file"),
            ])),
            Open,
            "forms; diffusers, and lora_universal for adapters, unless said",
        ),
        field("dtype", DTYPE, Yaml("f16"), "format of the written weights"),
        field(
            "verify",
            Bool,
            Yaml("true"),
            "load again what was written and compare",
        ),
    ],
};

static CLUSTER: Section = Section {
    name: "cluster",
    fields: &[
        field(
            "launcher",
            Kind::Word(&[
                word("local"),
                word("external"),
                later("slurm"),
                later("kubernetes"),
            ]),
            Yaml("local"),
            "who starts workers",
        ),
        field("workers", Kind::Section(&WORKERS), Open, "how many"),
        field(
            "listen",
            Text,
            Yaml("127.0.0.1:0"),
            "address of the gRPC service, host:port",
        ),
        not_built("http"),
        field(
            "tls",
            Kind::Word(&[word("auto"), word("on"), word("off")]),
            Yaml("auto"),
            "auto = on unless only this host can connect",
        ),
        field("token", Secret, Open, "the run's token; made when absent"),
    ],
};

static WORKERS: Section = Section {
    name: "workers",
    fields: &[
        field(
            "min",
            Whole(1, 4096),
            Yaml("1"),
            "fewest that training starts with",
        ),
        field(
            "max",
            Or("auto", &Whole(1, 4096)),
            Yaml("auto"),
            "most that are used; auto = min",
        ),
    ],
};
