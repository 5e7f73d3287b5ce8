//! Who starts from whom, and what follows from it for segments and students.

use super::super::super::fault::Code;
use super::super::super::nearest;
use super::super::super::{Method, Recipe, Stage, StudentKind, TEACHER};
use super::super::numbers::divisors;
use super::super::resolve::Checked;
use super::super::scalar::either;
use super::{Place, Rules};

/// The stage that another one starts from.
#[derive(Clone, Copy)]
pub(super) struct Origin<'a> {
    stage: &'a Stage,
    position: usize,
}

impl Rules<'_> {
    /// The stage that `at`, the one at position `i`, starts from; none when it is the teacher, or when what is said
    /// names no earlier stage: then that is the one fault to tell.
    pub(super) fn origin<'r>(
        &mut self,
        recipe: &'r Recipe,
        at: &Place<'_>,
        i: usize,
    ) -> Option<Origin<'r>> {
        let path = at.of("from");
        let origin = at.stage.from.map(|position| Origin {
            stage: &recipe.stages[position],
            position,
        });
        let said = match self.top_at(&path).map(|said| &said.value) {
            Some(Checked::Text(name)) if name != recipe.origin_of(at.stage) => name.clone(),
            _ => return origin,
        };
        let own = &at.stage.name;
        let later = recipe.stages[i..].iter().find(|s| s.name == said);
        let (message, label) = match later {
            Some(_) if said == *own => (
                format!("stage {own} cannot start from itself"),
                "this is its own name".to_owned(),
            ),
            Some(_) => (
                format!("stage {own} cannot start from stage {said}, which comes later"),
                "not trained yet when this stage begins".to_owned(),
            ),
            None => (
                format!("stage {own} cannot start from {said}"),
                "no stage has this name".to_owned(),
            ),
        };
        let mut known = vec![TEACHER];
        known.extend(recipe.stages[..i].iter().map(|s| s.name.as_str()));
        let help = match nearest::of(&said, known.iter().copied()) {
            Some(near) if later.is_none() => format!("did you mean {near}?"),
            _ => format!("use {}", either(&known)),
        };
        let names: Vec<String> = (0..recipe.stages.len())
            .map(|n| format!("stages.{n}.name"))
            .collect();
        let paths: Vec<&str> = std::iter::once(&path)
            .chain(&names)
            .map(String::as_str)
            .collect();
        self.refuse(Code::Lineage, &paths, message, label, help);
        None
    }

    /// Coarser from finer: M divides the stored segments and, when an mlcm stage starts from another, that one's M.
    pub(super) fn segments(&mut self, recipe: &Recipe, at: &Place<'_>, origin: Option<Origin<'_>>) {
        let path = at.of("segments");
        let stored = recipe.trajectories.segments;
        let (segments, name) = (at.stage.segments, &at.stage.name);
        let is_mlcm = |stage: &Stage| stage.method == Method::Mlcm;
        let origin = origin.filter(|o| is_mlcm(o.stage) && is_mlcm(at.stage));
        let earlier = format!("stages.{}.segments", origin.map_or(0, |o| o.position));
        match origin.map(|o| o.stage) {
            Some(before) if !before.segments.is_multiple_of(segments) => {
                let mut whose = format!("stage {}", before.name);
                if before.segments == stored {
                    whose.push_str(", trajectories.segments");
                }
                let message = format!("{segments} segments cannot follow {}", before.segments);
                let label = format!("{segments} does not divide {} ({whose})", before.segments);
                let help = format!("use {}", divisors(before.segments));
                self.refuse(Code::Segments, &[&path, &earlier], message, label, help);
            }
            Some(_) | None if !stored.is_multiple_of(segments) => {
                let message = format!("stage {name} cannot use rows of {stored} segments");
                let label = format!("{segments} does not divide {stored} (trajectories.segments)");
                let help = format!("use {}, or other trajectories.segments", divisors(stored));
                self.refuse(
                    Code::Segments,
                    &[&path, "trajectories.segments"],
                    message,
                    label,
                    help,
                );
            }
            Some(_) | None => {}
        }
    }

    /// A stage goes on with the student of the stage it starts from, so its shape must be the same. From the
    /// teacher any student can start.
    pub(super) fn student(&mut self, at: &Place<'_>, origin: Option<Origin<'_>>) {
        let Some(Origin {
            stage: before,
            position,
        }) = origin
        else {
            return;
        };
        let (old, new) = (&before.student.kind, &at.stage.student.kind);
        if old == new {
            return;
        }
        let (key, message, label) = match (old, new) {
            (StudentKind::Full, StudentKind::Lora { .. }) => (
                "kind",
                format!(
                    "stage {} cannot train adapters after a full student",
                    at.stage.name
                ),
                "adapters would be measured from the teacher, and the full student lost".to_owned(),
            ),
            (StudentKind::Lora { .. }, StudentKind::Full) => (
                "kind",
                format!(
                    "stage {} cannot train every weight after adapters",
                    at.stage.name
                ),
                format!("the adapters of stage {} would be lost", before.name),
            ),
            (StudentKind::Lora { lora_rank: a, .. }, StudentKind::Lora { lora_rank: b, .. })
                if a != b =>
            {
                (
                    "lora_rank",
                    format!("adapters of rank {b} cannot follow adapters of rank {a}"),
                    format!("stage {} has lora_rank {a}", before.name),
                )
            }
            (StudentKind::Lora { lora_alpha: a, .. }, StudentKind::Lora { lora_alpha: b, .. })
                if a != b =>
            {
                (
                    "lora_alpha",
                    format!("lora_alpha {b} cannot follow lora_alpha {a}"),
                    "the student would jump: its adapters are scaled by lora_alpha / lora_rank"
                        .to_owned(),
                )
            }
            _ => (
                "targets",
                format!("stage {} cannot train other modules", at.stage.name),
                format!("stage {} has other targets", before.name),
            ),
        };
        let path = at.of(&format!("student.{key}"));
        let earlier = format!("stages.{position}.student.{key}");
        let help = "set student once, above the stages, or say from: teacher".to_owned();
        self.refuse(Code::Student, &[&path, &earlier], message, label, help);
    }
}
