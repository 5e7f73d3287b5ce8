//! Keys of who does the work, and where.

use super::Fallback::{Open, Yaml};
use super::Kind::{List, Or, Path, Secret, Shell, Text, Whole, Words};
use super::kubernetes::KUBERNETES;
use super::{Kind, Section, field, word};

pub(super) static CLUSTER: Section = Section {
    name: "cluster",
    fields: &[
        field(
            "launcher",
            Kind::Word(&[
                word("local"),
                word("external"),
                word("slurm"),
                word("kubernetes"),
            ]),
            Yaml("local"),
            "who starts workers",
        ),
        field("workers", Kind::Section(&WORKERS), Open, "how many"),
        field(
            "slurm",
            Kind::Section(&SLURM),
            Open,
            "how Slurm is asked for workers",
        )
        .only("launcher", "slurm"),
        field(
            "kubernetes",
            Or("none", &Kind::Section(&KUBERNETES)),
            Yaml("none"),
            "what workers are as pods",
        ),
        field(
            "listen",
            Or("auto", &Text),
            Yaml("auto"),
            "address of the gRPC service, host:port; auto = 127.0.0.1:0, 0.0.0.0:0 with slurm, 0.0.0.0:7070 with kubernetes",
        ),
        field(
            "http",
            Or("off", &Text),
            Yaml("127.0.0.1:0"),
            "address of the live page and of /metrics, host:port; off = none",
        ),
        field(
            "tls",
            Kind::Word(&[word("auto"), word("on"), word("off")]),
            Yaml("auto"),
            "auto = on; off wants 127.0.0.1, or --insecure",
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

/// Every text here becomes an option of sbatch; `check::cross` says which texts do.
static SLURM: Section = Section {
    name: "slurm",
    fields: &[
        field(
            "partition",
            Or("none", &Text),
            Yaml("none"),
            "partition of the workers' jobs; none = the cluster's default",
        ),
        field(
            "account",
            Or("none", &Text),
            Yaml("none"),
            "who is charged for them",
        ),
        field(
            "qos",
            Or("none", &Text),
            Yaml("none"),
            "their quality of service",
        ),
        field(
            "gres",
            Or("none", &Text),
            Yaml("none"),
            "generic resources of each job, like gpu:1 or gpu:a100:4",
        ),
        field(
            "time",
            Or("none", &Text),
            Yaml("none"),
            "time limit of each job, as Slurm writes it: 90, 1:30:00, 2-12; a job that reaches it leaves in time and is queued again",
        ),
        field(
            "cpus",
            Or("auto", &Whole(1, 4096)),
            Yaml("auto"),
            "CPUs of each job; auto = compute.threads for each device where that is a number",
        ),
        field(
            "memory",
            Or("none", &Text),
            Yaml("none"),
            "memory of each job, like 64G",
        ),
        field(
            "extra",
            List(&Text),
            Open,
            "more options of sbatch, like [--constraint=a100, --exclude=n7]",
        ),
        field(
            "setup",
            Shell,
            Open,
            "lines of shell that each job runs before its worker: module load, export",
        ),
        field(
            "srun",
            List(&Text),
            Open,
            "more options of the srun that starts the worker, like [--container-image=worker.sqsh]",
        ),
        field(
            "container",
            Words,
            Open,
            "command within which the worker is started, a word each: [apptainer, exec, --nv, worker.sif]",
        ),
        field(
            "devices",
            Text,
            Yaml("auto"),
            "what each worker lends: cpu, ordinals like \"0,1\", or auto = the job's GPUs, else its CPUs",
        ),
        field(
            "worker",
            Or("auto", &Path),
            Yaml("auto"),
            "the worker's program on the nodes; auto = the one that this coordinator knows",
        ),
        field(
            "engine",
            Or("auto", &Path),
            Yaml("auto"),
            "the engine's program on the nodes; auto = the one that this coordinator knows",
        ),
        field(
            "poll",
            Whole(1, 3600),
            Yaml("10"),
            "seconds between two looks at the queue",
        ),
    ],
};
