//! The comparison as text.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Write as _};

use distillery_common::figures::{Figure, TEACHER};

use super::{Comparison, GOAL_STEPS, METHODS, METRICS, Metric, Round, Student, name_of};

/// Width of the column of names.
const NAME: usize = 34;
/// Width of a column of figures.
const COLUMN: usize = 22;

impl Comparison {
    /// Everything for people: who the students are, every figure, and the best of each method.
    pub fn table(&self) -> String {
        let mut text = String::from("students\n");
        for student in &self.students {
            let _ = writeln!(text, "  {student}");
        }
        for metric in METRICS {
            self.show_metric(metric, &mut text);
        }
        text.push_str(
            "\nEach method counts with the best of its students and samplers at each number of steps.\n\
             Intervals are 95 % of each figure by itself; prompts and noise are the same for all.\n",
        );
        if let Some(spent) = self.unequal() {
            let _ = writeln!(
                text,
                "NOT EQUAL: the methods had different numbers of optimizer steps: {spent}"
            );
        }
        text
    }

    fn show_metric(&self, metric: Metric, text: &mut String) {
        let steps = self.student_steps(metric);
        if steps.is_empty() {
            return;
        }
        let way = if metric.more { "more" } else { "less" };
        let _ = write!(
            text,
            "\n{:<NAME$}",
            format!("{}, {way} is better", metric.name)
        );
        for n in &steps {
            let noun = if *n == 1 { "step" } else { "steps" };
            let _ = write!(text, "{:>COLUMN$}", format!("{n} {noun}"));
        }
        text.push('\n');
        for model in self.models() {
            for sampler in self.samplers(metric, model) {
                let name = format!("  {model:<19} {sampler}");
                let found = steps
                    .iter()
                    .map(|n| self.figure(metric, model, sampler, *n));
                // The teacher may have been measured at none of these numbers of steps.
                if found.clone().flatten().next().is_some() {
                    row(&name, found, text);
                }
            }
        }
        for method in METHODS {
            let name = format!("  best of {}", name_of(method));
            let best = steps.iter().map(|n| self.best(method, metric, *n));
            row(&name, best, text);
        }
        if let Some(most) = self.reference(metric) {
            let shown = figure_text(most);
            let _ = writeln!(text, "  {TEACHER}, {} steps: {shown}", most.steps);
        }
    }

    /// Numbers of steps that students were measured at.
    fn student_steps(&self, metric: Metric) -> BTreeSet<u32> {
        let is_student = |figure: &&Figure| self.students.iter().any(|s| s.name == figure.model);
        let measured = self.figures.iter().filter(is_student);
        measured
            .filter(|figure| figure.metric == metric.name)
            .map(|figure| figure.steps)
            .collect()
    }

    /// Samplers that `model` was measured under, in the order of its figures.
    fn samplers(&self, metric: Metric, model: &str) -> Vec<&str> {
        let mut samplers = Vec::new();
        for figure in &self.figures {
            let sampler = figure.sampler.as_str();
            let is_of = figure.metric == metric.name && figure.model == model;
            if is_of && !samplers.contains(&sampler) {
                samplers.push(sampler);
            }
        }
        samplers
    }

    fn figure(&self, metric: Metric, model: &str, sampler: &str, steps: u32) -> Option<&Figure> {
        self.figures.iter().find(|f| {
            f.metric == metric.name && f.model == model && f.sampler == sampler && f.steps == steps
        })
    }

    /// The teacher with its largest number of steps.
    fn reference(&self, metric: Metric) -> Option<&Figure> {
        let of_teacher = self.figures.iter().filter(|f| f.model == TEACHER);
        of_teacher
            .filter(|f| f.metric == metric.name)
            .max_by_key(|f| f.steps)
    }
}

/// The last line: the goal and whether it is reached.
pub fn verdict(rounds: &[Round<'_>]) -> String {
    let method = |i: usize| {
        let values = rounds.iter().map(|r| format!("{:.3}", r.best[i].value));
        let values: Vec<String> = values.collect();
        format!("{} {}", name_of(METHODS[i]), values.join("/"))
    };
    let missed: Vec<u32> = rounds
        .iter()
        .filter(|r| !r.holds())
        .map(|r| r.steps)
        .collect();
    let ending = if missed.is_empty() {
        String::new()
    } else {
        format!(", MISSED at {}", listed(&missed))
    };
    format!(
        "compare: {} {} {} (goal MLCM ahead at {} steps{ending})",
        method(0),
        method(1),
        method(2),
        listed(&GOAL_STEPS)
    )
}

/// How far MLCM is ahead at each number of steps, and of whom.
pub fn leads(rounds: &[Round<'_>]) -> String {
    let mut text = String::new();
    for round in rounds {
        let [mlcm, lcm, mcd] = round.best;
        let rival = if lcm.value > mcd.value { lcm } else { mcd };
        let apart = match (mlcm.interval, rival.interval) {
            (Some(a), Some(b)) if a.0 > b.1 || b.0 > a.1 => "intervals apart",
            (Some(_), Some(_)) => "intervals overlap",
            (None, _) | (_, None) => "no intervals",
        };
        let lead = if round.holds() {
            format!("ahead by {:.3}", mlcm.value - rival.value)
        } else {
            "NOT ahead".into()
        };
        let _ = writeln!(
            text,
            "{} steps: {:.3} by {} ({}), {:.3} by {} ({}): {lead}, {apart}",
            round.steps,
            mlcm.value,
            mlcm.model,
            mlcm.sampler,
            rival.value,
            rival.model,
            rival.sampler,
        );
    }
    text
}

fn row<'a>(name: &str, figures: impl Iterator<Item = Option<&'a Figure>>, text: &mut String) {
    let _ = write!(text, "{name:<NAME$}");
    for figure in figures {
        let shown = figure.map_or_else(|| "-".into(), figure_text);
        let _ = write!(text, "{shown:>COLUMN$}");
    }
    text.push('\n');
}

fn figure_text(figure: &Figure) -> String {
    let value = figure.value;
    let digits = if value < 100.0 { 3 } else { 1 };
    match figure.interval {
        Some((low, high)) => format!("{value:.digits$} {low:.digits$}…{high:.digits$}"),
        None => format!("{value:.digits$}"),
    }
}

/// `2, 4 and 8`.
fn listed(numbers: &[u32]) -> String {
    let texts: Vec<String> = numbers.iter().map(u32::to_string).collect();
    match texts.as_slice() {
        [] => String::new(),
        [only] => only.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

impl Display for Student {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noun = if self.segments == 1 {
            "segment"
        } else {
            "segments"
        };
        write!(
            f,
            "{:<19} {:<5} {} {noun}, {} optimizer steps from the teacher",
            self.name,
            name_of(self.method),
            self.segments,
            self.spent
        )
    }
}
