//! The table of `make compare`, on made-up figures: `compare/metrics.json` of the students in `compare/recipe.yaml`.
//!
//! After a change that is meant, write `compare/table.txt` anew with
//! `UPDATE_EXPECTED=1 cargo test --release -p distillery-tests --test compare` and read it.

use std::path::{Path, PathBuf};

use distillery_common::figures::Figure;
use distillery_common::recipe::{self, Method, Recipe};
use distillery_tests::compare::{Comparison, METRICS, leads, verdict};

fn beside(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("compare")
        .join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(beside(name)).expect("it lies in this repository")
}

fn recipe(sets: &[&str]) -> Recipe {
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    recipe::parse(&read("recipe.yaml"), "recipe.yaml", Path::new("/"), &sets).expect("a recipe")
}

fn figures() -> Vec<Figure> {
    serde_json::from_str(&read("metrics.json")).expect("figures as a report lists them")
}

fn comparison(change: impl Fn(&mut Figure)) -> Comparison {
    let mut figures = figures();
    figures.iter_mut().for_each(change);
    Comparison::new(&recipe(&[]), figures)
}

#[test]
fn the_table_is_the_one_beside_the_figures() {
    let comparison = comparison(|_| ());
    let rounds = comparison.rounds().expect("every method was measured");
    let found = format!(
        "{}\n{}{}\n",
        comparison.table(),
        leads(&rounds),
        verdict(&rounds)
    );
    if std::env::var_os("UPDATE_EXPECTED").is_some() {
        std::fs::write(beside("table.txt"), &found).expect("writable");
    }
    assert_eq!(found, read("table.txt"));
}

/// The best of a method at each of 1, 2, 4 and 8 steps, and whose it is.
fn best(comparison: &Comparison, method: Method, metric: usize) -> Vec<(&str, &str, f64)> {
    let steps = [1, 2, 4, 8].into_iter();
    steps
        .filter_map(|n| comparison.best(method, METRICS[metric], n))
        .map(|f| (f.model.as_str(), f.sampler.as_str(), f.value))
        .collect()
}

#[test]
fn a_method_counts_with_the_best_of_its_students_and_samplers() {
    let comparison = comparison(|_| ());
    assert_eq!(
        best(&comparison, Method::Mlcm, 0),
        [
            ("seg2", "tlcm9", 0.45),
            ("seg2", "segments", 0.72),
            ("seg4", "segments", 0.8),
            ("seg4", "segments", 0.82),
        ]
    );
    assert_eq!(
        best(&comparison, Method::Lcm, 0)[0],
        ("lcm", "segments", 0.52)
    );
}

#[test]
fn less_is_better_where_a_distance_is_measured() {
    let comparison = comparison(|_| ());
    let frechet: Vec<f64> = best(&comparison, Method::Mlcm, 1)
        .iter()
        .map(|b| b.2)
        .collect();
    assert_eq!(frechet, [8.0, 5.0, 4.0, 3.0]);
    assert_eq!(best(&comparison, Method::Mlcm, 2), [], "not measured");
}

#[test]
fn a_tie_or_a_lag_misses_the_goal_where_it_is() {
    let tied = comparison(|f| {
        if f.model == "mcd4" && f.steps == 8 && f.metric == METRICS[0].name {
            (f.value, f.interval) = (0.82, Some((0.8, 0.84)));
        }
    });
    let rounds = tied.rounds().expect("every method was measured");
    let holds: Vec<bool> = rounds.iter().map(|r| r.holds()).collect();
    assert_eq!(holds, [true, true, false]);
    assert_eq!(
        verdict(&rounds),
        "compare: MLCM 0.720/0.800/0.820 LCM 0.550/0.600/0.660 MCD 0.620/0.740/0.820 \
         (goal MLCM ahead at 2, 4 and 8 steps, MISSED at 8)"
    );
    let leads = leads(&rounds);
    let last = leads.lines().last();
    assert_eq!(
        last,
        Some(
            "8 steps: 0.820 by seg4 (segments), 0.820 by mcd4 (tlcm9): NOT ahead, intervals overlap"
        )
    );
}

#[test]
fn what_was_not_measured_is_not_compared() {
    let without = |text: &str, change: &dyn Fn(&mut Figure)| {
        let comparison = comparison(change);
        let error = comparison.rounds().expect_err("something is missing");
        assert_eq!(error.to_string(), text);
    };
    without("the run has no prompt_adherence of LCM at 2 steps", &|f| {
        if f.model == "lcm" && f.steps == 2 {
            f.steps = 3;
        }
    });
    without("the run has no prompt_adherence of MCD at 4 steps", &|f| {
        if f.model == "mcd4" && f.steps == 4 {
            f.value = f64::NAN;
        }
    });
    let only_mlcm = recipe(&["stages=[{name: seg2, segments: 2, steps: 1}]"]);
    let error = Comparison::new(&only_mlcm, figures());
    let error = error
        .rounds()
        .expect_err("two methods are missing")
        .to_string();
    assert_eq!(error, "the run has no student of method LCM");
}

#[test]
fn a_student_costs_what_its_whole_lineage_cost() {
    assert_eq!(comparison(|_| ()).unequal(), None, "200 + 100 are 300");
    let longer = Comparison::new(&recipe(&["stages.seg4.steps=250"]), figures());
    assert_eq!(
        longer.unequal().as_deref(),
        Some("MLCM 350, LCM 300, MCD 300")
    );
    assert!(longer.table().contains("NOT EQUAL: "));
    let alone = Comparison::new(&recipe(&["stages.seg2.from=teacher"]), figures());
    assert_eq!(
        alone.unequal().as_deref(),
        Some("MLCM 200, LCM 300, MCD 300")
    );
}
