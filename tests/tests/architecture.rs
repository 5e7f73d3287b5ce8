//! The laws of ARCHITECTURE.md that can be read off sources and manifests. Each breaks a build that breaks it.
//!
//! L1 to L10 and L12; of L11 (save, then send) the proof is the simulation, which crashes between every pair.
//! Laws speak about what ships: `#[cfg(test)]` items, `tests.rs` files and `tests` folders are free,
//! except that `unsafe` (L9) is nowhere free. At the end, samples show that every law bites.

#[path = "architecture/manifests.rs"]
mod manifests;
#[path = "architecture/scan.rs"]
mod scan;
#[path = "architecture/sources.rs"]
mod sources;

use scan::{Located, Path, Token};
use sources::{Source, root};

/// What a law says about one file: the lines that break it, and how.
type Breaches = Vec<(usize, String)>;

struct Law {
    name: &'static str,
    /// Whether the law speaks about the file at this path.
    about: fn(&str) -> bool,
    breaches: fn(&Source) -> Breaches,
}

const LAWS: [Law; 10] = [
    PURE_MIND,
    PURE_TENSORS,
    MODELS,
    DISTILL,
    TRAIN,
    WIRE,
    KEYS,
    UNSAFE,
    CLOCK,
    SIZE,
];

const PURE_MIND: Law = Law {
    name: "L3: plan and scheduler decide, and know neither IO, nor the clock, nor chance",
    about: |path| {
        let mind = ["coordinator/src/plan", "coordinator/src/scheduler"];
        ships(path) && starts_with_any(path, &mind)
    },
    breaches: |source| {
        let io = ["async", "await", "tokio", "tonic", "prost", "object_store"];
        let order_and_chance = ["rand", "HashMap", "HashSet"];
        let logging = ["tracing", "println", "eprintln", "print", "eprint", "dbg"];
        let outside = [
            "std::fs",
            "std::net",
            "std::env",
            "std::process",
            "std::thread",
        ];
        let mut found = words(source, &[&io[..], &order_and_chance, &logging].concat());
        found.extend(parts(source, &[&outside[..], &CLOCKS].concat()));
        found
    },
};

const PURE_TENSORS: Law = Law {
    name: "L4: diffusion is functions of tensors: tch and std only, no VarStore, no RNG",
    about: |path| ships(path) && path.starts_with("worker/engine/src/diffusion"),
    breaches: |source| {
        let rng = [
            "rand",
            "randn",
            "rand_like",
            "randn_like",
            "manual_seed",
            "bernoulli",
        ];
        let mut found = words(source, &[&rng[..], &["VarStore", "nn"]].concat());
        let dependencies = manifests::dependencies("distillery-engine");
        let foreign = |path: &Path| {
            let first = path.words[0].as_str();
            let leaves_the_folder = path.contains("super::super")
                || (first == "crate" && path.words.get(1).is_some_and(|next| next != "diffusion"));
            leaves_the_folder || (first != "tch" && dependencies.iter().any(|name| name == first))
        };
        found.extend(
            source
                .paths
                .iter()
                .filter(|path| foreign(path))
                .map(|path| (path.line, path.text())),
        );
        found
    },
};

const MODELS: Law = Law {
    name: "L5: models know no recipe, no storage, no objective",
    about: |path| ships(path) && path.starts_with("worker/engine/src/models"),
    breaches: |source| {
        let mut found = words(source, &["object_store"]);
        found.extend(path_words(source, &["recipe", "storage", "distill"]));
        found
    },
};

const DISTILL: Law = Law {
    name: "L5: distill knows no concrete model; they meet at Denoiser",
    about: |path| ships(path) && path.starts_with("worker/engine/src/distill"),
    breaches: |source| parts(source, &["crate::models", "super::models"]),
};

const TRAIN: Law = Law {
    name: "L6: train knows no tokio, storage, gRPC",
    about: |path| ships(path) && path.starts_with("worker/engine/src/train"),
    breaches: |source| {
        let mut found = words(
            source,
            &["async", "await", "tokio", "object_store", "tonic", "prost"],
        );
        found.extend(path_words(source, &["storage", "proto"]));
        found
    },
};

const WIRE: Law = Law {
    name: "L7: generated wire types stop at their converters",
    about: |path| {
        let converters = [
            "common/src/proto",
            "coordinator/src/service",
            "worker/src/agent/client",
            "worker/src/engine_process",
            "worker/engine/src/link",
        ];
        ships(path) && !starts_with_any(path, &converters)
    },
    breaches: |source| parts(source, &["proto::wire"]),
};

const KEYS: Law = Law {
    name: "L8: storage keys are spelled only in storage::layout",
    about: |path| ships(path) && path != "common/src/storage/layout.rs",
    breaches: |source| {
        let roots = ["trajectories/", "checkpoints/", "journal/"];
        let spelled = |located: &&Located| matches!(&located.token, Token::Text(text) if roots.iter().any(|root| text.contains(root)));
        let breach = |located: &Located| (located.line, "a key in a string literal".to_owned());
        source.shipped.iter().filter(spelled).map(breach).collect()
    },
};

const UNSAFE_FILES: [&str; 4] = [
    "tests/host-nccl/src/abi.rs",
    "worker/engine/src/collective/nccl_sys.rs",
    // tch cannot put a node into libtorch's graph of gradients; recomputed activations need one.
    "worker/engine/src/models/recompute.rs",
    "worker/engine/src/raw_tensor.rs",
];

const UNSAFE: Law = Law {
    name: "L9: unsafe in three files of the engine and one of its tests, each block under a SAFETY sentence",
    about: |_| true,
    breaches: |source| {
        let is_allowed_here = UNSAFE_FILES.contains(&source.path.as_str());
        let mut found = Vec::new();
        for (at, located) in source.tokens.iter().enumerate() {
            if !located.is_word("unsafe") {
                continue;
            }
            if !is_allowed_here {
                found.push((located.line, "unsafe".to_owned()));
            } else if is_block(&source.tokens, at) && !has_safety_comment(&source.tokens[..at]) {
                found.push((located.line, "unsafe without a SAFETY comment".to_owned()));
            }
        }
        found
    },
};

const CLOCKS: [&str; 3] = ["Instant::now", "SystemTime::now", "Uuid::now_v7"];

const CLOCK: Law = Law {
    name: "L10: driver, agent and telemetry read the clock; nobody else may silence clippy about it",
    about: |path| {
        let readers = [
            "coordinator/src/driver",
            "worker/src/agent",
            "common/src/telemetry",
            "coordinator/src/telemetry",
            "worker/src/telemetry",
            "worker/engine/src/telemetry",
        ];
        ships(path) && !starts_with_any(path, &readers)
    },
    breaches: |source| {
        let clock = [&CLOCKS[..], &["clippy::disallowed_methods"]].concat();
        parts(source, &clock)
    },
};

const MAX_LINES: usize = 500;

const SIZE: Law = Law {
    name: "L12: a file has one noun and at most 500 lines; the lints on size and unwrap are not waived",
    about: ships,
    breaches: |source| {
        let mut found = parts(source, &["clippy::too_many_lines", "clippy::unwrap_used"]);
        if source.line_count > MAX_LINES {
            found.push((MAX_LINES + 1, format!("{} lines", source.line_count)));
        }
        found
    },
};

/// Whether a file is part of a program, not a test of one.
fn ships(path: &str) -> bool {
    let is_test = |part: &str| part == "tests" || part == "tests.rs" || part == "benches";
    !path.split('/').any(is_test)
}

fn starts_with_any(path: &str, starts: &[&str]) -> bool {
    starts.iter().any(|start| path.starts_with(start))
}

/// The places of any of these words.
fn words(source: &Source, forbidden: &[&str]) -> Breaches {
    let word = |located: &Located| {
        let word = located.word().filter(|word| forbidden.contains(word))?;
        Some((located.line, word.to_owned()))
    };
    source.shipped.iter().filter_map(word).collect()
}

/// The paths of at least two words that hold one of these words: a local variable of that name is no breach.
fn path_words(source: &Source, forbidden: &[&str]) -> Breaches {
    let breach = |path: &&Path| {
        (path.imported || path.words.len() > 1)
            && path
                .words
                .iter()
                .any(|word| forbidden.contains(&word.as_str()))
    };
    let place = |path: &Path| (path.line, path.text());
    source.paths.iter().filter(breach).map(place).collect()
}

/// The paths that contain one of these runs, such as `Instant::now`.
fn parts(source: &Source, forbidden: &[&str]) -> Breaches {
    let breach = |path: &&Path| forbidden.iter().any(|part| path.contains(part));
    let place = |path: &Path| (path.line, path.text());
    source.paths.iter().filter(breach).map(place).collect()
}

/// `unsafe {` and `unsafe impl` promise something; `unsafe fn` and `unsafe extern` ask for a promise.
fn is_block(tokens: &[Located], at: usize) -> bool {
    tokens
        .get(at + 1)
        .is_some_and(|next| next.is_mark('{') || next.is_word("impl"))
}

/// Whether the comments that stand before the current statement say why it is sound.
fn has_safety_comment(before: &[Located]) -> bool {
    let mut seen_comment = false;
    for located in before.iter().rev() {
        match &located.token {
            Token::Comment(text) if text.contains("SAFETY:") => return true,
            Token::Comment(_) => seen_comment = true,
            Token::Mark(';' | '{' | '}') => return false,
            _ if seen_comment => return false,
            _ => {}
        }
    }
    false
}

/// Every breach of `law` in `sources`, one line each, as an editor can follow it.
fn judge(law: &Law, sources: &[Source]) -> Vec<String> {
    let concerned = sources.iter().filter(|source| (law.about)(&source.path));
    concerned
        .flat_map(|source| {
            let breaches = (law.breaches)(source).into_iter();
            breaches.map(|(line, what)| format!("{}:{line}: {what}", source.path))
        })
        .collect()
}

#[test]
fn every_law_holds() {
    let sources = sources::all();
    let verdicts: Vec<String> = LAWS
        .iter()
        .map(|law| (law.name, judge(law, &sources)))
        .filter(|(_, breaches)| !breaches.is_empty())
        .map(|(name, breaches)| format!("{name}\n  {}", breaches.join("\n  ")))
        .collect();
    assert!(verdicts.is_empty(), "broken laws:\n{}", verdicts.join("\n"));
}

/// A law about a folder that was renamed would hold for ever.
#[test]
fn what_the_laws_speak_of_exists() {
    let paths = [
        "common/src/proto",
        "common/src/storage/layout.rs",
        "common/src/telemetry",
        "coordinator/src/driver",
        "coordinator/src/plan",
        "coordinator/src/scheduler",
        "coordinator/src/service",
        "worker/src/agent",
        "worker/src/engine_process",
        "tests/host-nccl/src/abi.rs",
        "worker/engine/src/collective/nccl_sys.rs",
        "worker/engine/src/diffusion",
        "worker/engine/src/distill",
        "worker/engine/src/link",
        "worker/engine/src/models",
        "worker/engine/src/raw_tensor.rs",
        "worker/engine/src/train",
    ];
    let exists =
        |path: &str| root().join(path).exists() || root().join(format!("{path}.rs")).exists();
    let missing: Vec<_> = paths.into_iter().filter(|path| !exists(path)).collect();
    assert!(
        missing.is_empty(),
        "laws speak of what is not there: {missing:?}"
    );
}

/// L12, its other half: clippy counts the lines of functions and the unwraps, if it is told to.
#[test]
fn clippy_is_told_the_laws() {
    let thresholds = sources::read("clippy.toml");
    for line in [
        "too-many-lines-threshold = 70",
        "allow-unwrap-in-tests = true",
    ] {
        assert!(thresholds.contains(line), "clippy.toml lost `{line}`");
    }
    for method in ["std::time::Instant::now", "std::time::SystemTime::now"] {
        assert!(thresholds.contains(method), "clippy.toml lost {method}");
    }
    let workspace = sources::read("Cargo.toml");
    for lint in [
        "unsafe_code = \"deny\"",
        "unwrap_used = \"deny\"",
        "disallowed_methods = \"deny\"",
        "too_many_lines = ",
    ] {
        assert!(workspace.contains(lint), "Cargo.toml lost `{lint}`");
    }
    for member in [
        "common",
        "coordinator",
        "worker",
        "worker/engine",
        "tests",
        "tests/host-nccl",
    ] {
        let manifest = sources::read(&format!("{member}/Cargo.toml"));
        let inherits = manifest.contains("[lints]\nworkspace = true");
        assert!(inherits, "{member} does not inherit the workspace's lints");
    }
}

#[test]
fn l1_coordinator_and_worker_link_no_libtorch_cuda_or_nccl() {
    for program in [
        "distillery-coordinator",
        "distillery-worker",
        "distillery-tests",
    ] {
        let closure = manifests::closure(program);
        assert!(
            closure.contains("distillery-common"),
            "the closure of {program} is not whole"
        );
        for forbidden in ["tch", "torch-sys", "cudarc", "distillery-engine"] {
            assert!(
                !closure.contains(forbidden),
                "{program} pulls in {forbidden}"
            );
        }
    }
    let engine = manifests::closure("distillery-engine");
    assert!(
        engine.contains("torch-sys"),
        "the engine should show that the check can see torch-sys"
    );
}

#[test]
fn l2_arrows_between_crates_go_down_only() {
    let may_see = [
        ("distillery-common", &[][..]),
        ("distillery-coordinator", &["distillery-common"]),
        ("distillery-worker", &["distillery-common"]),
        // Its tests open the library at run time; that nothing that ships sees it is checked below.
        (
            "distillery-engine",
            &["distillery-common", "distillery-host-nccl"],
        ),
        ("distillery-host-nccl", &[]),
        (
            "distillery-tests",
            &[
                "distillery-common",
                "distillery-coordinator",
                "distillery-worker",
            ],
        ),
    ];
    let members: Vec<_> = may_see.iter().map(|(member, _)| *member).collect();
    assert_eq!(
        manifests::members(),
        manifests::sorted(&members),
        "a crate without a floor"
    );
    for (member, allowed) in may_see {
        let seen = manifests::workspace_dependencies(member);
        let forbidden: Vec<_> = seen
            .iter()
            .filter(|name| !allowed.contains(&name.as_str()))
            .collect();
        assert!(forbidden.is_empty(), "{member} must not see {forbidden:?}");
        let ships = manifests::closure(member);
        let is_itself = member == "distillery-host-nccl";
        assert!(
            is_itself || !ships.contains("distillery-host-nccl"),
            "{member} ships the stand-in for NCCL"
        );
    }
}

#[path = "architecture/samples.rs"]
mod samples;
