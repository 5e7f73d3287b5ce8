//! Keys of `cluster.kubernetes`.

use super::Fallback::{Open, Required, Yaml};
use super::Kind::{Bool, List, Or, Text, Whole};
use super::{Kind, MapOf, Section, field, word};

pub(super) static KUBERNETES: Section = Section {
    name: "cluster.kubernetes",
    fields: &[
        field(
            "image",
            Text,
            Required,
            "image that holds worker and engine (deploy/containers)",
        ),
        field(
            "namespace",
            Or("none", &Kind::DnsName),
            Yaml("none"),
            "where the pods are; none = the coordinator's own",
        ),
        field(
            "service",
            Text,
            Yaml("distillery-coordinator"),
            "what workers dial: the coordinator's Service, or an address where the cluster resolves no names",
        ),
        field(
            "service_account",
            Or("none", &Kind::DnsName),
            Yaml("none"),
            "account of the pods; none = the namespace's default",
        ),
        field(
            "gpus",
            Whole(0, 64),
            Yaml("0"),
            "GPUs of each pod, one worker for each; 0 = one worker on the CPU",
        ),
        field(
            "gpu_resource",
            Text,
            Yaml("nvidia.com/gpu"),
            "what the cluster calls a GPU",
        ),
        field(
            "resources",
            Kind::Map(MapOf::Quantities),
            Open,
            "requests and limits of each pod, like {cpu: 4, memory: 16Gi}",
        ),
        field(
            "node_selector",
            Kind::Map(MapOf::Labels),
            Open,
            "labels that a node must have",
        ),
        field(
            "tolerations",
            List(&Kind::Section(&TOLERATION)),
            Open,
            "taints of nodes that pods put up with",
        ),
        field(
            "labels",
            Kind::Map(MapOf::Labels),
            Open,
            "further labels of the pods",
        ),
        field(
            "image_pull_secrets",
            List(&Kind::DnsName),
            Open,
            "Secrets that open the image's registry",
        ),
        field(
            "env_from",
            List(&Kind::DnsName),
            Open,
            "Secrets whose keys become environment variables, such as a bucket's credentials",
        ),
        field(
            "volumes",
            List(&Kind::Section(&VOLUME)),
            Open,
            "claims that are mounted: the run's folder, the teacher's",
        ),
        field(
            "priority_class",
            Or("none", &Kind::DnsName),
            Yaml("none"),
            "PriorityClass of the pods",
        ),
        field(
            "grace_seconds",
            Whole(10, 86_400),
            Yaml("120"),
            "seconds between a request to leave and the end",
        ),
        field(
            "unreachable_seconds",
            Whole(0, 86_400),
            Yaml("30"),
            "seconds that a pod stays bound to a node that is not ready or not reached",
        ),
    ],
};

static TOLERATION: Section = Section {
    name: "a toleration",
    fields: &[
        field(
            "key",
            Or("none", &Text),
            Yaml("none"),
            "the taint's key; none = all",
        ),
        field(
            "value",
            Or("none", &Text),
            Yaml("none"),
            "its value; none = any",
        ),
        field(
            "effect",
            Kind::Word(&[
                word("any"),
                word("NoSchedule"),
                word("PreferNoSchedule"),
                word("NoExecute"),
            ]),
            Yaml("any"),
            "its effect",
        ),
    ],
};

static VOLUME: Section = Section {
    name: "a volume",
    fields: &[
        field(
            "claim",
            Kind::DnsName,
            Required,
            "name of a PersistentVolumeClaim",
        ),
        field("path", Text, Required, "where it is mounted, absolute"),
        field(
            "read_only",
            Bool,
            Yaml("false"),
            "whether nothing may be written there",
        ),
    ],
};
