//! Keys of what is kept, shown, measured and written.

use super::Fallback::{Open, Yaml};
use super::Kind::{Bool, List, Whole};
use super::{DTYPE, Kind, SAMPLER, STEPS, Section, field, later, not_built, word};

pub(super) static CHECKPOINT: Section = Section {
    name: "checkpoint",
    fields: &[
        field(
            "every_steps",
            Whole(1, 1 << 40),
            Yaml("250"),
            "steps between checkpoints; the last step always has one",
        ),
        field("keep", Kind::Section(&KEEP), Open, "what stays"),
        field(
            "sharded",
            Bool,
            Yaml("false"),
            "whether every engine writes a share of each checkpoint, for states that are large",
        ),
    ],
};

pub(super) static KEEP: Section = Section {
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

pub(super) static PREVIEW: Section = Section {
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

pub(super) static EVALUATE: Section = Section {
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

pub(super) static EXPORT: Section = Section {
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
