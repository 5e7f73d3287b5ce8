//! Methods side by side: the students of one run by what they were trained with, at equal numbers of sampling steps.
//!
//! A method counts with the best of its students and samplers at each number of steps. Knows figures and a recipe,
//! nothing of how either was made.

mod show;

pub use show::{leads, verdict};

use anyhow::Context as _;
use distillery_common::figures::{Figure, TEACHER, UNDISTILLED, UNDISTILLED_GUIDED};
use distillery_common::recipe::{Method, Recipe, Stage};

/// The numbers of sampling steps that the goal speaks of.
pub const GOAL_STEPS: [u32; 3] = [2, 4, 8];
/// The metric that the goal speaks of.
pub const GOAL_METRIC: &str = "prompt_adherence";

/// A metric and which way is better.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// As figures call it.
    pub name: &'static str,
    /// Whether more is better.
    pub more: bool,
}

/// What is shown, the goal's metric first.
pub const METRICS: [Metric; 3] = [
    Metric {
        name: GOAL_METRIC,
        more: true,
    },
    Metric {
        name: "latent_frechet",
        more: false,
    },
    Metric {
        name: "teacher_distance",
        more: false,
    },
];

/// A student, and what it cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Student {
    /// Name of its stage.
    pub name: String,
    /// What it was trained with.
    pub method: Method,
    /// Number of its segments.
    pub segments: u32,
    /// Optimizer steps between the teacher and it.
    pub spent: u64,
}

/// The students of one run and all its figures.
#[derive(Debug)]
pub struct Comparison {
    students: Vec<Student>,
    figures: Vec<Figure>,
}

/// The best figures of the three methods at one number of steps.
#[derive(Debug, Clone)]
pub struct Round<'a> {
    /// The number of sampling steps.
    pub steps: u32,
    /// In the order of [`METHODS`].
    pub best: [&'a Figure; 3],
}

/// The methods in the order in which they are shown; the goal is that the first is ahead.
pub const METHODS: [Method; 3] = [Method::Mlcm, Method::Lcm, Method::Mcd];

/// A method as people write it.
pub fn name_of(method: Method) -> &'static str {
    match method {
        Method::Mlcm => "MLCM",
        Method::Lcm => "LCM",
        Method::Mcd => "MCD",
    }
}

impl Comparison {
    /// The students that `recipe` trains, with the `figures` of its run.
    pub fn new(recipe: &Recipe, figures: Vec<Figure>) -> Self {
        let mut students: Vec<Student> = Vec::new();
        for stage in &recipe.stages {
            let before = stage.from.map_or(0, |at| students[at].spent);
            students.push(student(stage, before));
        }
        Self { students, figures }
    }

    /// The best figures of each method at the numbers of steps of the goal.
    ///
    /// # Errors
    ///
    /// A method without a student or without a figure.
    pub fn rounds(&self) -> anyhow::Result<Vec<Round<'_>>> {
        let round = |steps| {
            let [mlcm, lcm, mcd] = METHODS.map(|method| self.required(method, steps));
            Ok(Round {
                steps,
                best: [mlcm?, lcm?, mcd?],
            })
        };
        GOAL_STEPS.into_iter().map(round).collect()
    }

    fn required(&self, method: Method, steps: u32) -> anyhow::Result<&Figure> {
        let name = name_of(method);
        anyhow::ensure!(
            self.of(method).next().is_some(),
            "the run has no student of method {name}"
        );
        self.best(method, METRICS[0], steps)
            .with_context(|| format!("the run has no {GOAL_METRIC} of {name} at {steps} steps"))
    }

    /// The best figure that any student of `method` reached under any sampler.
    pub fn best(&self, method: Method, metric: Metric, steps: u32) -> Option<&Figure> {
        let is_of = |figure: &&Figure| {
            figure.metric == metric.name
                && figure.steps == steps
                && figure.value.is_finite()
                && self.of(method).any(|s| s.name == figure.model)
        };
        let better = |a: &&Figure, b: &&Figure| {
            let order = a.value.total_cmp(&b.value);
            if metric.more { order } else { order.reverse() }
        };
        // Of equals the last is taken: backwards, the first, so that the headline sampler goes before.
        self.figures.iter().rev().filter(is_of).max_by(better)
    }

    /// What each method's students cost at most, if that is not the same for all.
    pub fn unequal(&self) -> Option<String> {
        let spent = METHODS.map(|method| self.of(method).map(|s| s.spent).max().unwrap_or(0));
        let is_equal = spent.iter().all(|n| *n == spent[0]);
        let texts = METHODS
            .iter()
            .zip(spent)
            .map(|(method, n)| format!("{} {n}", name_of(*method)));
        (!is_equal).then(|| texts.collect::<Vec<_>>().join(", "))
    }

    fn of(&self, method: Method) -> impl Iterator<Item = &Student> {
        self.students.iter().filter(move |s| s.method == method)
    }

    /// Models in the order in which they are shown: the teacher, the baselines, the students.
    fn models(&self) -> Vec<&str> {
        let mut models = vec![TEACHER, UNDISTILLED, UNDISTILLED_GUIDED];
        models.extend(self.students.iter().map(|s| s.name.as_str()));
        models
    }
}

impl Round<'_> {
    /// Whether MLCM is ahead of both.
    pub fn holds(&self) -> bool {
        let [mlcm, lcm, mcd] = self.best.map(|figure| figure.value);
        mlcm > lcm.max(mcd)
    }
}

fn student(stage: &Stage, before: u64) -> Student {
    Student {
        name: stage.name.clone(),
        method: stage.method,
        segments: stage.segments,
        spent: before + stage.steps,
    }
}
