//! Who depends on whom, as Cargo resolves it.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;

use crate::sources::root;

/// `cargo metadata`, run once: it takes a moment, and every law asks it.
fn metadata() -> &'static Value {
    static METADATA: OnceLock<Value> = OnceLock::new();
    METADATA.get_or_init(|| {
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version=1", "--locked"])
            .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
            .current_dir(root())
            .output()
            .expect("cargo runs");
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "cargo metadata: {complaint}");
        serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
    })
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field]
        .as_str()
        .unwrap_or_else(|| panic!("no text `{field}` in {value}"))
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field]
        .as_array()
        .unwrap_or_else(|| panic!("no list `{field}` in {value}"))
}

fn names_by_id() -> BTreeMap<&'static str, &'static str> {
    let packages = list(metadata(), "packages").iter();
    packages
        .map(|package| (text(package, "id"), text(package, "name")))
        .collect()
}

fn package(name: &str) -> &'static Value {
    let mut packages = list(metadata(), "packages").iter();
    packages
        .find(|package| text(package, "name") == name)
        .unwrap_or_else(|| panic!("no package {name}"))
}

/// The names in order.
pub(crate) fn sorted(names: &[&str]) -> Vec<String> {
    let mut names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    names.sort();
    names
}

/// The crates of the workspace, in order.
pub(crate) fn members() -> Vec<String> {
    let names = names_by_id();
    let ids = list(metadata(), "workspace_members").iter();
    let members: Vec<&str> = ids
        .map(|id| names[id.as_str().expect("an id is text")])
        .collect();
    sorted(&members)
}

/// The crates of the workspace that `member` names, for whatever purpose.
pub(crate) fn workspace_dependencies(member: &str) -> Vec<String> {
    let members = members();
    let dependencies = list(package(member), "dependencies").iter();
    let names = dependencies.map(|dependency| text(dependency, "name").to_owned());
    names.filter(|name| members.contains(name)).collect()
}

/// The crates that `member` names, as its sources spell them.
pub(crate) fn dependencies(member: &str) -> Vec<String> {
    let dependencies = list(package(member), "dependencies").iter();
    dependencies
        .map(|dependency| text(dependency, "name").replace('-', "_"))
        .collect()
}

/// Everything that is built for `member`'s programs: normal and build dependencies, transitively.
pub(crate) fn closure(member: &str) -> BTreeSet<&'static str> {
    let names = names_by_id();
    let nodes: BTreeMap<&str, &Value> = list(&metadata()["resolve"], "nodes")
        .iter()
        .map(|node| (text(node, "id"), node))
        .collect();
    let mut open = vec![text(package(member), "id")];
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        if seen.insert(id) {
            let shipped = list(nodes[id], "deps").iter().filter(|dep| is_shipped(dep));
            open.extend(shipped.map(|dep| text(dep, "pkg")));
        }
    }
    seen.into_iter().map(|id| names[id]).collect()
}

fn is_shipped(dependency: &Value) -> bool {
    let mut kinds = list(dependency, "dep_kinds").iter();
    kinds.any(|kind| kind["kind"].as_str() != Some("dev"))
}
