//! Recipes that must be read, and recipes that must be refused with exactly these words.
//!
//! `broken/recipes/*.yaml` hold one fault or a few each, with what `check` says beside them (`*.stderr`).
//! A line `# --set a.b=c` in one is given as that argument. After a change that is meant, write them anew with
//! `UPDATE_EXPECTED=1 cargo test --release -p distillery-tests --test recipes` and read every one.

use std::fs;
use std::path::{Path, PathBuf};

use distillery_common::recipe::{self, Method, Recipe, Stage};

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests
        .parent()
        .expect("the tests have a workspace")
        .to_owned()
}

/// Files of `folder` with this ending, in order.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of recipes");
    let mut files: Vec<PathBuf> = entries
        .map(|e| e.expect("an entry").path())
        .filter(|p| p.extension().is_some_and(|e| e == ending))
        .collect();
    files.sort();
    files
}

/// The recipe in `path`, without asking whether what it names is on this host.
fn parse(path: &Path, sets: &[String]) -> Recipe {
    let text = fs::read_to_string(path).expect("a recipe");
    let folder = path.parent().expect("a file has a folder");
    let sets: Vec<String> = sets.to_vec();
    match recipe::parse(&text, &path.display().to_string(), folder, &sets) {
        Ok(recipe) => recipe,
        Err(faults) => panic!("{faults}"),
    }
}

#[test]
fn every_recipe_of_the_repository_is_read() {
    let recipes = files(&root().join("configs"), "yaml");
    assert!(recipes.len() >= 3, "{recipes:?}");
    for path in recipes {
        // The only thing these recipes take from their surroundings is a token.
        let text = fs::read_to_string(&path).expect("a recipe");
        let token = text
            .contains("${env:")
            .then(|| "cluster.token=x".to_owned());
        let sets: Vec<String> = token.into_iter().collect();
        let recipe = parse(&path, &sets);
        let mut stored = recipe.clone();
        stored.cluster.token = None;
        assert_eq!(Recipe::from_stored(&recipe.to_stored()), Ok(stored));
    }
}

#[test]
fn recipes_that_need_nothing_else_name_files_that_are_there() {
    for name in ["quickstart.yaml", "tiny.yaml", "compare.yaml"] {
        if let Err(faults) = recipe::load(&root().join("configs").join(name), &[]) {
            panic!("{faults}");
        }
    }
}

/// `configs/compare.yaml` promises it; whoever changes one of the two changes the other.
#[test]
fn the_comparison_is_the_quickstart_with_other_methods_beside_it() {
    let of = |name: &str| parse(&root().join("configs").join(name), &[]);
    let (quick, compare) = (of("quickstart.yaml"), of("compare.yaml"));
    assert_eq!(compare.seed, quick.seed);
    assert_eq!(compare.teacher, quick.teacher);
    assert_eq!(compare.prompts, quick.prompts);
    assert_eq!(compare.trajectories, quick.trajectories);
    assert_eq!(compare.compute, quick.compute);
    let is_mlcm = |stage: &&Stage| stage.method == Method::Mlcm;
    let mlcm: Vec<&Stage> = compare.stages.iter().filter(is_mlcm).collect();
    assert_eq!(mlcm.len(), quick.stages.len());
    for (own, theirs) in mlcm.iter().zip(&quick.stages) {
        assert_eq!(compare.origin_of(own), quick.origin_of(theirs));
        let from = theirs.from;
        let own = Stage {
            from,
            ..(*own).clone()
        };
        assert_eq!(own, *theirs);
    }
    let total: u64 = mlcm.iter().map(|stage| stage.steps).sum();
    let first = mlcm[0];
    for other in compare.stages.iter().filter(|stage| !is_mlcm(stage)) {
        assert_eq!(other.from, None, "{} starts from the teacher", other.name);
        assert_eq!(
            other.steps, total,
            "{} has as many steps as all MLCM stages",
            other.name
        );
        assert_eq!(other.batch, first.batch, "{}", other.name);
        assert_eq!(other.student, first.student, "{}", other.name);
        assert_eq!(other.optimizer.lr, first.optimizer.lr, "{}", other.name);
        assert_eq!(other.loss, first.loss, "{}", other.name);
        assert_eq!(other.teacher_step, first.teacher_step, "{}", other.name);
    }
    let last = compare.stages.last().map(|stage| stage.method);
    assert_eq!(last, Some(Method::Mlcm), "the last student is exported");
}

/// What `check` says about a broken recipe, with this checkout's folder written as `ROOT`.
fn complaint(path: &Path) -> String {
    let bytes = fs::read(path).expect("a broken recipe");
    let text = String::from_utf8_lossy(&bytes);
    let argument = |line: &str| line.strip_prefix("# --set ").map(str::to_owned);
    let sets: Vec<String> = text.lines().filter_map(argument).collect();
    // As a person would name it: tests run in the folder of their crate.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let relative = path
        .strip_prefix(here)
        .expect("recipes lie below the tests");
    let faults = recipe::load(relative, &sets).expect_err("a broken recipe is refused");
    assert!(!faults.list().is_empty());
    assert!(
        faults.render(true).contains("\x1b["),
        "colours are asked for"
    );
    let plain = faults.to_string();
    assert!(!plain.contains('\x1b'), "colours are not asked for");
    assert!(
        faults.to_json()["faults"]
            .as_array()
            .is_some_and(|f| f.len() == faults.list().len())
    );
    plain.replace(&root().display().to_string(), "ROOT")
}

#[test]
fn broken_recipes_are_refused_with_these_words() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("broken/recipes");
    let update = std::env::var_os("UPDATE_EXPECTED").is_some();
    let recipes = files(&folder, "yaml");
    assert!(recipes.len() >= 30, "{} broken recipes", recipes.len());
    let mut wrong = Vec::new();
    for path in recipes {
        let found = complaint(&path);
        let beside = path.with_extension("stderr");
        if update {
            fs::write(&beside, &found).expect("write what is expected");
        } else if fs::read_to_string(&beside).ok().as_deref() != Some(found.as_str()) {
            wrong.push(format!("{}\n{found}", path.display()));
        }
    }
    assert!(
        wrong.is_empty(),
        "said otherwise than expected:\n{}",
        wrong.join("\n")
    );
}

/// Secrets of the broken recipes must not come out again.
#[test]
fn complaints_tell_no_secret() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("broken/recipes");
    for name in ["credentials.yaml", "listen.yaml"] {
        let said = complaint(&folder.join(name));
        assert!(
            !said.contains("hunter2") && !said.contains("topsecret"),
            "{said}"
        );
    }
}
