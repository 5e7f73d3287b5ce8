//! Compiles `proto/` with protox, so that no `protoc` has to be installed.

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto");
    let files = ["coordinator", "engine", "group", "task"]
        .map(|name| root.join(format!("distill/v1/{name}.proto")));
    let descriptors = protox::compile(&files, [&root])?;
    tonic_prost_build::configure()
        .emit_rerun_if_changed(false)
        // The generated dispatch is one long function.
        .server_mod_attribute(".", "#[allow(clippy::too_many_lines)]")
        // Cut from the message and shared, not copied: every member is told the addresses of all.
        .bytes(".distill.v1.GroupPeers")
        .compile_fds(descriptors)?;
    println!("cargo::rerun-if-changed={}", root.display());
    Ok(())
}
