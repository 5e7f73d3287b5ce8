//! Law L1, on what users run: coordinator, worker and sim-engine load no libtorch, CUDA or NCCL, and stay small.
//!
//! The manifests say what is depended on; only the binaries say what the linker made of it. `make test` builds them
//! before the tests; this test looks beside itself, in the same profile's folder.

use std::path::PathBuf;
use std::process::Command;

/// What every Linux with glibc has. A list of what is allowed also catches what nobody thought of forbidding.
const ALLOWED: [&str; 7] = [
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
];

/// What a head node may be asked to fetch.
const MAX_COORDINATOR_BYTES: u64 = 25 << 20;

fn binary(name: &str) -> PathBuf {
    let this_test = std::env::current_exe().expect("a running test has a path");
    let profile = this_test
        .ancestors()
        .nth(2)
        .expect("target/<profile>/deps/<test>");
    let path = profile.join(name);
    let hint = "run `cargo build --release --workspace` first";
    assert!(path.is_file(), "{} is not built: {hint}", path.display());
    path
}

/// The names of the libraries that the loader must find before `main`.
fn needed(name: &str) -> Vec<String> {
    let output = Command::new("readelf")
        .args(["--dynamic", "--wide"])
        .arg(binary(name))
        .env("LC_ALL", "C")
        .output()
        .expect("readelf runs (binutils)");
    assert!(output.status.success(), "readelf cannot read {name}");
    let text = String::from_utf8(output.stdout).expect("readelf prints ASCII");
    let entries = text.lines().filter(|line| line.contains("(NEEDED)"));
    entries
        .map(|line| {
            let bracketed = line.split(['[', ']']).nth(1);
            bracketed
                .expect("readelf puts names in brackets")
                .to_owned()
        })
        .collect()
}

#[test]
fn only_the_engine_loads_more_than_the_c_library() {
    for name in ["coordinator", "worker", "sim-engine"] {
        let needed = needed(name);
        assert!(
            !needed.is_empty(),
            "{name} should at least need libc; can readelf read it?"
        );
        let foreign: Vec<_> = needed
            .iter()
            .filter(|library| !ALLOWED.contains(&library.as_str()))
            .collect();
        assert!(foreign.is_empty(), "{name} loads {foreign:?}");
    }
}

/// Shows that the check above can see libtorch.
#[test]
fn the_engine_loads_libtorch() {
    let needed = needed("engine");
    let loads = |name: &str| needed.iter().any(|library| library == name);
    assert!(loads("libtorch_cpu.so"), "the engine loads {needed:?}");
    assert!(
        !loads("libtorch_cuda.so"),
        "an engine that needs CUDA to start cannot run on a CPU"
    );
}

#[test]
fn the_coordinator_is_small() {
    let path = binary("coordinator");
    let bytes = path.metadata().expect("its size is readable").len();
    assert!(
        bytes <= MAX_COORDINATOR_BYTES,
        "coordinator: {bytes} bytes, allowed {MAX_COORDINATOR_BYTES}"
    );
}
