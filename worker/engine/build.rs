//! Writes libtorch's folder into the run path, so that nothing needs LD_LIBRARY_PATH, and its version into the
//! program, so that results can name what computed them. Compiles the C++ side of `models/recompute.rs`.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let Ok(libtorch) = std::env::var("LIBTORCH") else {
        println!(
            "cargo::error=LIBTORCH is not set; run deploy/libtorch.sh, or set it to a libtorch folder"
        );
        return;
    };
    let lib = Path::new(&libtorch).join("lib");
    let lib = lib.canonicalize().unwrap_or(lib);
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo::rustc-env=DISTILLERY_LIBTORCH_LIB={}", lib.display());
    println!(
        "cargo::rustc-env=DISTILLERY_LIBTORCH_VERSION={}",
        version(Path::new(&libtorch))
    );
    compile(Path::new(&libtorch));
}

/// As torch-sys compiles its own C++, so that both speak of the same tensors.
fn compile(libtorch: &Path) {
    const SOURCE: &str = "src/models/recompute.cpp";
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    let abi = std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    cc::Build::new()
        .cpp(true)
        .pic(true)
        // libtorch's headers are not ours to mend.
        .warnings(false)
        .include(libtorch.join("include"))
        .std("c++17")
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .file(SOURCE)
        .compile("distillery_recompute");
}

/// The three numbers in libtorch's own header.
fn version(libtorch: &Path) -> String {
    let header = libtorch.join("include/torch/headeronly/version.h");
    println!("cargo::rerun-if-changed={}", header.display());
    let text = std::fs::read_to_string(&header).unwrap_or_default();
    let number = |name: &str| {
        text.lines()
            .filter_map(|line| {
                line.strip_prefix("#define TORCH_VERSION_")?
                    .strip_prefix(name)
            })
            .find_map(|rest| rest.trim().parse::<u32>().ok())
    };
    match (number("MAJOR "), number("MINOR "), number("PATCH ")) {
        (Some(major), Some(minor), Some(patch)) => format!("{major}.{minor}.{patch}"),
        _ => {
            println!(
                "cargo::error={} does not name libtorch's version",
                header.display()
            );
            "unknown".to_owned()
        }
    }
}
