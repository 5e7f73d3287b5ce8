//! Keys of what is trained and how: the sections that stages inherit, and the stages.

use super::Fallback::{Open, Required, Yaml};
use super::Kind::{Bool, Name, Or, Pair, Switch, Targets, Whole};
use super::{BELOW_ONE, Kind, NOT_NEGATIVE, POSITIVE, Section, field, not_built, word};

pub(super) static STUDENT: Section = Section {
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

pub(super) static EMA: Section = Section {
    name: "ema",
    fields: &[field(
        "decay",
        BELOW_ONE,
        Yaml("0.95"),
        "share of the average that stays at each step",
    )],
};

pub(super) static OPTIMIZER: Section = Section {
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
            "steps in a row that a non-finite gradient may cost; one more ends the stage",
        ),
        field(
            "sharded",
            Bool,
            Yaml("false"),
            "whether every engine keeps a share of the moments; a group that changes then starts from a checkpoint",
        ),
    ],
};

pub(super) static SCHEDULE: Section = Section {
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

pub(super) static BATCH: Section = Section {
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
            Kind::Word(&[word("false"), word("true")]),
            Yaml("false"),
            "bits that do not depend on the number of workers",
        ),
        field(
            "virtual_ranks",
            Whole(1, 4096),
            Yaml("8"),
            "fixed shares that a reproducible step is computed in: at least cluster.workers.max",
        )
        .only("reproducible", "true"),
    ],
};

pub(super) static LOSS: Section = Section {
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

pub(super) static COMPUTE: Section = Section {
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
        field(
            "recompute",
            Kind::Bool,
            Yaml("false"),
            "compute activations again in the backward pass instead of keeping them: far less memory, more time, the same bits",
        ),
    ],
};

pub(super) static STAGE: Section = Section {
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
            "from",
            Name,
            Open,
            "whose weights it starts from: teacher, or the name of an earlier stage; unless said, the stage before",
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
