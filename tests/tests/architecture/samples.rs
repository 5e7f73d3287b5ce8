//! Broken and lawful samples: the laws bite, and only where they should.

use crate::sources::Source;
use crate::{LAWS, judge};

/// The line numbers of the breaches that the law whose name begins with `law` finds in a file at `path`.
fn lines(law: &str, path: &str, text: &str) -> Vec<usize> {
    let source = [Source::new(path, text)];
    let laws = LAWS
        .iter()
        .filter(|candidate| candidate.name.starts_with(law));
    let breaches: Vec<String> = laws.flat_map(|law| judge(law, &source)).collect();
    breaches
        .iter()
        .map(|breach| {
            let line = breach.split(':').nth(1).expect("path:line: what");
            line.parse().expect("a line number")
        })
        .collect()
}

fn bites(law: &str, path: &str, text: &str) {
    assert!(
        !lines(law, path, text).is_empty(),
        "{law} lets this pass in {path}:\n{text}"
    );
}

fn spares(law: &str, path: &str, text: &str) {
    let found = lines(law, path, text);
    assert!(
        found.is_empty(),
        "{law} stumbles over lines {found:?} in {path}:\n{text}"
    );
}

#[test]
fn l3_bites_on_io_clock_chance_and_logging_in_the_mind() {
    let machine = "coordinator/src/scheduler/machine.rs";
    bites("L3", machine, "async fn decide() {}");
    bites("L3", machine, "fn f() { std::fs::read(x) }");
    bites(
        "L3",
        machine,
        "use std::{collections::{BTreeMap, HashMap}, fmt};",
    );
    bites("L3", machine, "use std::{fmt, fs::{self, File}};");
    bites("L3", machine, "let now = Instant::now();");
    bites("L3", machine, "tracing::info!(step);");
    bites("L3", "coordinator/src/plan.rs", "use tokio::sync::mpsc;");
    bites(
        "L3",
        "coordinator/src/plan/build.rs",
        "println!(\"{plan}\");",
    );
}

#[test]
fn l3_spares_words_in_comments_texts_tests_and_the_driver() {
    let machine = "coordinator/src/scheduler/machine.rs";
    spares(
        "L3",
        machine,
        "// tokio\n/* async /* HashMap */ await */\n/// std::fs\nfn f() {}",
    );
    spares(
        "L3",
        machine,
        r###"const A: &str = "tokio \" async"; const B: &str = r#"rand " HashMap"#;"###,
    );
    spares(
        "L3",
        machine,
        "fn f<'rand>(c: char) -> bool { c == '\"' || c == '\\'' } // async",
    );
    spares(
        "L3",
        machine,
        "#[cfg(test)]\nmod tests { use rand::Rng; fn g() { if a { b } } }\nfn h() {}",
    );
    bites(
        "L3",
        machine,
        "#[cfg(test)]\nmod tests { fn g() { if a { b } } }\nuse rand::Rng;",
    );
    bites("L3", machine, "#[cfg(test)]\nmod tests;\nuse rand::Rng;");
    spares("L3", "coordinator/src/scheduler/tests.rs", "use rand::Rng;");
    spares("L3", "coordinator/src/driver.rs", "use tokio::sync::mpsc;");
}

#[test]
fn l4_keeps_diffusion_to_tch_and_std() {
    let solver = "worker/engine/src/diffusion/solver.rs";
    bites("L4", solver, "use crate::models::unet::UNet;");
    bites("L4", solver, "use super::super::train;");
    bites("L4", solver, "use distillery_common::recipe::Recipe;");
    bites("L4", solver, "let a = serde_json::to_string(&x);");
    bites("L4", solver, "let noise = Tensor::randn([4], options);");
    bites("L4", solver, "fn f(store: &tch::nn::VarStore) {}");
    spares(
        "L4",
        solver,
        "use std::f64::consts::PI;\nuse tch::{Kind, Tensor};\nuse super::schedule::Schedule;",
    );
    spares(
        "L4",
        solver,
        "use crate::diffusion::schedule;\nfn f() { schedule::alpha_bar(3) }",
    );
    spares(
        "L4",
        "worker/engine/src/models/unet.rs",
        "use tch::nn::VarStore;",
    );
}

#[test]
fn l5_keeps_models_and_objectives_apart() {
    let unet = "worker/engine/src/models/unet.rs";
    bites("L5", unet, "use distillery_common::recipe;");
    bites("L5", unet, "use distillery_common::{ids, storage::Key};");
    bites("L5", unet, "fn f() { crate::distill::lcm::loss() }");
    spares("L5", unet, "let storage = tensor.storage();");
    let lcm = "worker/engine/src/distill/lcm.rs";
    bites("L5", lcm, "use crate::{diffusion, models::unet::UNet};");
    spares("L5", lcm, "use crate::diffusion::Denoiser;");
}

#[test]
fn l6_keeps_train_away_from_the_outside() {
    let train = "worker/engine/src/train/mod.rs";
    bites("L6", train, "use tokio::runtime::Handle;");
    bites("L6", train, "use distillery_common::storage::Storage;");
    bites("L6", train, "use distillery_common::proto;");
    spares("L6", train, "use crate::distill::Objective;");
}

#[test]
fn l7_stops_wire_types_at_their_converters() {
    bites(
        "L7",
        "coordinator/src/driver.rs",
        "use distillery_common::proto::wire::Lease;",
    );
    bites(
        "L7",
        "worker/src/app.rs",
        "use distillery_common::{ids, proto::{wire, to_wire}};",
    );
    bites(
        "L7",
        "common/src/task.rs",
        "fn f(lease: crate::proto::wire::Lease) {}",
    );
    spares(
        "L7",
        "coordinator/src/service.rs",
        "use distillery_common::proto::wire::Lease;",
    );
    spares(
        "L7",
        "worker/engine/src/link.rs",
        "use distillery_common::proto::wire;",
    );
    spares(
        "L7",
        "coordinator/tests/service.rs",
        "use distillery_common::proto::wire;",
    );
}

#[test]
fn l8_spells_keys_in_one_file() {
    let writer = "common/src/latents/writer.rs";
    bites(
        "L8",
        writer,
        "let key = format!(\"trajectories/{dataset}/MANIFEST\");",
    );
    bites("L8", writer, "let key = br#\"run/checkpoints/x\"#;");
    spares(
        "L8",
        writer,
        "// under trajectories/\nlet word = \"trajectories\";",
    );
    spares(
        "L8",
        "common/src/storage/layout.rs",
        "let key = \"journal/\";",
    );
}

#[test]
fn l9_wants_unsafe_in_two_files_and_explained() {
    let nccl = "worker/engine/src/collective/nccl_sys.rs";
    bites(
        "L9",
        "worker/engine/src/collective/nccl.rs",
        "// SAFETY: no.\nunsafe { f() }",
    );
    bites("L9", "tests/tests/faults.rs", "unsafe { f() }");
    bites("L9", nccl, "fn g() { unsafe { f() } }");
    bites(
        "L9",
        nccl,
        "// SAFETY: for a.\nlet a = unsafe { f() };\nlet b = unsafe { f() };",
    );
    bites("L9", nccl, "// ordinary\nlet a = unsafe { f() };");
    spares(
        "L9",
        nccl,
        "// SAFETY: the pointer\n// lives long enough.\nlet a = g(1, unsafe { f() });",
    );
    spares(
        "L9",
        nccl,
        "// SAFETY: it has no thread of its own.\nunsafe impl Send for Communicator {}",
    );
    spares("L9", nccl, "type Init = unsafe extern \"C\" fn() -> i32;");
    spares("L9", "worker/src/app.rs", "// unsafe\nlet a = \"unsafe\";");
}

#[test]
fn l10_lets_three_places_read_the_clock() {
    let waived = "#[expect(clippy::disallowed_methods, reason = \"…\")]\nfn now() -> Instant { Instant::now() }";
    bites("L10", "coordinator/src/app.rs", waived);
    bites(
        "L10",
        "worker/engine/src/train/mod.rs",
        "let t = std::time::SystemTime::now();",
    );
    for reader in [
        "coordinator/src/driver.rs",
        "worker/src/agent/mod.rs",
        "common/src/telemetry.rs",
        "coordinator/tests/simulation.rs",
    ] {
        spares("L10", reader, waived);
    }
}

#[test]
fn l12_counts_lines_and_takes_no_waivers() {
    let run = "coordinator/src/cli.rs";
    bites("L12", run, &"fn f() {}\n".repeat(501));
    spares("L12", run, &"fn f() {}\n".repeat(500));
    spares(
        "L12",
        "coordinator/src/cli/tests.rs",
        &"fn f() {}\n".repeat(501),
    );
    bites(
        "L12",
        run,
        "#[expect(clippy::too_many_lines, reason = \"long\")]\nfn f() {}",
    );
}

#[test]
fn breaches_carry_their_line() {
    let text = "//! a\n\nuse std::{\n    fmt,\n    fs,\n};\nconst A: &str = \"two\nlines\";\nuse tokio::sync;\n";
    assert_eq!(lines("L3", "coordinator/src/plan/mod.rs", text), [9, 5]);
}
