//! What keys mean to each other: grid, batches, exports, and in `lineage` what stages mean to each other.
//!
//! A rule that touches a value with a fault of its own stays silent, so that one mistake is told once. This
//! module must never touch a disk.

mod kubernetes;
mod lineage;
mod slurm;

use std::collections::BTreeMap;

use super::super::fault::{Code, Fault};
use super::super::table::RESERVED_STAGES;
use super::super::{
    Evaluate, ExportFormat, Method, Optimizer, Recipe, Sampler, Stage, StudentKind,
};
use super::numbers::{first_off_grid, near_divisors};
use super::resolve::{Checked, Resolved};
use super::scalar::either;
use super::sections::TIMES;

/// Step counts that the official lists of sampler tlcm9 know (algorithm.md §6.1).
const TLCM9_STEPS: u32 = 8;
/// Entries of the grid that sampler lcm picks from (formats.md §6).
const LCM_STEPS: u32 = 40;

/// Checks `recipe`, which was built from `top`.
pub(super) fn check(recipe: &Recipe, top: &Resolved) -> Vec<Fault> {
    let mut rules = Rules {
        top,
        faults: Vec::new(),
    };
    rules.names(recipe);
    rules.grid(recipe);
    rules.shards(recipe);
    for (i, stage) in recipe.stages.iter().enumerate() {
        let place = Place {
            stage,
            path: format!("stages.{i}"),
        };
        rules.method(&place);
        let origin = rules.origin(recipe, &place, i);
        rules.segments(recipe, &place, origin);
        rules.skip(recipe, &place);
        rules.student(&place, origin);
        rules.batch(recipe, &place);
        rules.schedule(&place);
        rules.moments(recipe, &place);
    }
    rules.sampling(recipe);
    rules.export(recipe);
    rules.cluster(recipe);
    rules.kubernetes(&recipe.cluster);
    rules.slurm(recipe);
    rules.faults
}

/// A stage and its path in the recipe.
struct Place<'a> {
    stage: &'a Stage,
    path: String,
}

impl Place<'_> {
    fn of(&self, key: &str) -> String {
        format!("{}.{key}", self.path)
    }
}

struct Rules<'a> {
    top: &'a Resolved,
    faults: Vec<Fault>,
}

impl Rules<'_> {
    /// Reports a fault at the first of `paths`, unless one of them has a fault already.
    fn refuse(
        &mut self,
        code: Code,
        paths: &[&str],
        message: String,
        label: String,
        help: impl Into<Option<String>>,
    ) {
        if paths.iter().any(|path| self.is_faulty(path)) {
            return;
        }
        // A default stands nowhere: then the value it does not go with is the place to look at.
        let own = |path: &&str| self.top_at(path).and_then(|value| value.span);
        let span = paths
            .iter()
            .find_map(own)
            .or_else(|| super::place(self.top, paths[0]));
        // What stages inherit is told once.
        let told = |f: &Fault| f.code == code && f.message == message && f.span == span;
        if self.faults.iter().any(told) {
            return;
        }
        self.faults.push(Fault {
            code,
            path: paths[0].into(),
            message,
            label,
            help: help.into(),
            span,
        });
    }

    fn is_faulty(&self, path: &str) -> bool {
        let mut at = self.top;
        for key in path.split('.') {
            if at.faulty && !matches!(at.value, Checked::List(_)) {
                return true;
            }
            match at.child(key) {
                Some(child) => at = child,
                None => return false,
            }
        }
        at.faulty
    }

    fn names(&mut self, recipe: &Recipe) {
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        for (i, stage) in recipe.stages.iter().enumerate() {
            let path = format!("stages.{i}.name");
            let name = stage.name.as_str();
            if RESERVED_STAGES.contains(&name) {
                let message = format!("a stage cannot be named {name}");
                let label = format!("reserved, like {}", either(&RESERVED_STAGES));
                self.refuse(Code::StageName, &[&path], message, label, None);
            } else if let Some(first) = seen.insert(name, i) {
                let message = format!("two stages are named {name}");
                let label = format!("stage {} has this name too", first + 1);
                let help = "names tell checkpoints and exports apart".to_owned();
                self.refuse(Code::StageName, &[&path], message, label, help);
            }
        }
    }

    /// Milestones tau_k = trunc(k 999 / M), k ≥ 1, must be points (1000 / n) i - 1 of a grid of n.
    fn grid(&mut self, recipe: &Recipe) {
        let Some(grid) = recipe.trajectories.time_grid.map(u64::from) else {
            return;
        };
        let path = "trajectories.time_grid";
        if !TIMES.is_multiple_of(grid) {
            let message = format!("a grid of {grid} times does not divide {TIMES}");
            let help = format!("use {}", near_divisors(grid));
            self.refuse(
                Code::Grid,
                &[path],
                message,
                format!("must divide {TIMES}"),
                help,
            );
            return;
        }
        let segments = u64::from(recipe.trajectories.segments);
        let Some(off) = first_off_grid(grid, segments) else {
            return;
        };
        let fitting: Vec<String> = (1..=TIMES)
            .filter(|n| TIMES.is_multiple_of(*n) && first_off_grid(*n, segments).is_none())
            .take(3)
            .map(|n| n.to_string())
            .collect();
        let help = if fitting.is_empty() {
            format!("set time_grid: none, or use segments that divide {grid}")
        } else {
            let fitting: Vec<&str> = fitting.iter().map(String::as_str).collect();
            format!("use a grid of {}, or time_grid: none", either(&fitting))
        };
        let message = format!("a grid of {grid} times lacks milestones of {segments} segments");
        let label = format!("time {off} is not among {}i - 1", TIMES / grid);
        self.refuse(
            Code::Grid,
            &[path, "trajectories.segments"],
            message,
            label,
            help,
        );
    }

    fn shards(&mut self, recipe: &Recipe) {
        let t = &recipe.trajectories;
        if t.shard_trajectories.is_multiple_of(t.batch) {
            return;
        }
        let path = "trajectories.shard_trajectories";
        let message = format!(
            "shards of {} cut batches of {} in two",
            t.shard_trajectories, t.batch
        );
        let label = format!("not a multiple of trajectories.batch ({})", t.batch);
        let next = t.shard_trajectories.next_multiple_of(t.batch);
        let help = format!("use {next}");
        self.refuse(
            Code::Shards,
            &[path, "trajectories.batch"],
            message,
            label,
            help,
        );
    }

    fn method(&mut self, at: &Place<'_>) {
        let (segments, path) = (at.stage.segments, at.of("segments"));
        let method = at.of("method");
        let given = self
            .top_at(&path)
            .is_some_and(|r| matches!(r.value, Checked::Whole(_)));
        match at.stage.method {
            Method::Lcm if segments != 1 => {
                let message = format!("lcm cannot train {segments} segments");
                let help = "remove segments, or use method mcd or mlcm".to_owned();
                let label = "lcm has 1 segment".to_owned();
                self.refuse(Code::Method, &[&path, &method], message, label, help);
            }
            Method::Mlcm | Method::Mcd if !given => {
                let message = format!("stage {} lacks segments", at.stage.name);
                let help = "segments: number of segments of this stage".to_owned();
                let label = "segments is missing".to_owned();
                self.refuse(Code::Missing, &[&path, &method], message, label, help);
            }
            Method::Lcm | Method::Mlcm | Method::Mcd => {}
        }
    }

    fn skip(&mut self, recipe: &Recipe, at: &Place<'_>) {
        let Some(grid) = recipe.trajectories.time_grid.map(u64::from) else {
            return;
        };
        if !TIMES.is_multiple_of(grid) {
            return;
        }
        let spacing = TIMES / grid;
        let skip = u64::from(at.stage.skip);
        if !skip.is_multiple_of(spacing) {
            let message = format!("a skip of {skip} leaves the grid of {grid} times");
            let label = format!("not a multiple of {spacing}");
            let near = skip.next_multiple_of(spacing).min(TIMES - spacing);
            let help = format!("use {near}, or trajectories.time_grid: none");
            let path = at.of("skip");
            self.refuse(
                Code::Skip,
                &[&path, "trajectories.time_grid"],
                message,
                label,
                help,
            );
        }
    }

    fn batch(&mut self, recipe: &Recipe, at: &Place<'_>) {
        let path = at.of("batch.global");
        let (min, max) = (recipe.cluster.min_workers, recipe.cluster.max_workers);
        let global = at.stage.batch.global;
        let bounds = ["cluster.workers.min", "cluster.workers.max"];
        let stage = &at.stage.name;
        if global < u64::from(max) {
            let message = format!("a batch of {global} cannot feed {max} workers");
            let label = format!("less than cluster.workers.max ({max}), stage {stage}");
            let help = format!("use at least {max}, or fewer workers");
            self.refuse(Code::Batch, &[&path, bounds[1]], message, label, help);
        }
        if let Some(ranks) = at.stage.batch.virtual_ranks {
            self.virtual_ranks(at, ranks, (min, max));
        }
    }

    /// Every engine has rows, and so has every virtual rank.
    fn virtual_ranks(&mut self, at: &Place<'_>, ranks: u32, (_, max): (u32, u32)) {
        let path = at.of("batch.virtual_ranks");
        let global = at.stage.batch.global;
        if ranks < max {
            let message = format!("{ranks} virtual ranks cannot be shared by {max} workers");
            let label = format!("less than cluster.workers.max ({max})");
            let help = format!("use at least {max}, or fewer workers");
            self.refuse(
                Code::Batch,
                &[&path, "cluster.workers.max"],
                message,
                label,
                help,
            );
        } else if u64::from(ranks) > global {
            let message = format!("a batch of {global} cannot feed {ranks} virtual ranks");
            let label = format!("more than batch.global ({global})");
            let help = format!("use at most {global}, or a larger batch");
            let batch = at.of("batch.global");
            self.refuse(Code::Batch, &[&path, &batch], message, label, help);
        }
    }

    fn schedule(&mut self, at: &Place<'_>) {
        let Optimizer { warmup, .. } = at.stage.optimizer;
        if warmup > at.stage.steps {
            let path = at.of("optimizer.schedule.warmup");
            let message = format!("warm-up of {warmup} steps outlasts stage {}", at.stage.name);
            let label = format!("more than its {} steps", at.stage.steps);
            let steps = at.of("steps");
            self.refuse(
                Code::Schedule,
                &[&path, &steps],
                message,
                label,
                "use auto".to_owned(),
            );
        }
    }

    /// Nobody holds all moments where they are shared out, so that nobody could write a whole checkpoint.
    fn moments(&mut self, recipe: &Recipe, at: &Place<'_>) {
        if at.stage.optimizer.sharded && !recipe.checkpoint.sharded {
            let path = at.of("optimizer.sharded");
            let message = "sharded moments need sharded checkpoints".to_owned();
            let label = "no engine could write a whole checkpoint".to_owned();
            let help = "set checkpoint.sharded: true, or leave out optimizer.sharded".to_owned();
            let paths = [&*path, "checkpoint.sharded"];
            self.refuse(Code::Moments, &paths, message, label, help);
        }
    }

    fn sampling(&mut self, recipe: &Recipe) {
        let preview = &recipe.preview;
        self.steps_of("preview.steps", preview.sampler, &preview.steps);
        let Some(Evaluate {
            samplers, steps, ..
        }) = &recipe.evaluate
        else {
            return;
        };
        for sampler in samplers {
            self.steps_of("evaluate.steps", *sampler, steps);
        }
    }

    fn steps_of(&mut self, path: &str, sampler: Sampler, steps: &[u32]) {
        let (name, most) = match sampler {
            Sampler::Tlcm9 => ("tlcm9", TLCM9_STEPS),
            Sampler::Lcm => ("lcm", LCM_STEPS),
            Sampler::Ddim | Sampler::Segments => return,
        };
        let Some((i, over)) = steps.iter().enumerate().find(|(_, n)| **n > most) else {
            return;
        };
        let message = format!("sampler {name} has no list for {over} steps");
        let label = format!("at most {most}");
        let help = "use fewer steps, or sampler segments".to_owned();
        let item = format!("{path}.{i}");
        self.refuse(Code::Sampling, &[&item, path], message, label, help);
    }

    fn export(&mut self, recipe: &Recipe) {
        let (Some(export), Some(last)) = (&recipe.export, recipe.stages.last()) else {
            return;
        };
        let full = last.student.kind == StudentKind::Full;
        let at = export
            .formats
            .iter()
            .position(|f| *f == ExportFormat::LoraUniversal);
        if let (true, Some(i)) = (full, at) {
            let item = format!("export.formats.{i}");
            let kind = format!("stages.{}.student.kind", recipe.stages.len() - 1);
            let message = "a full student has no adapters to export".to_owned();
            let label = format!("stage {} trains every weight", last.name);
            let help = "use diffusers, or student kind lora".to_owned();
            self.refuse(
                Code::Export,
                &[&item, "export.formats", &kind],
                message,
                label,
                help,
            );
        }
    }

    fn cluster(&mut self, recipe: &Recipe) {
        let cluster = &recipe.cluster;
        if cluster.max_workers < cluster.min_workers {
            let (min, max) = (cluster.min_workers, cluster.max_workers);
            let message = format!("at most {max} workers, but at least {min}");
            let label = format!("less than cluster.workers.min ({min})");
            let paths = ["cluster.workers.max", "cluster.workers.min"];
            self.refuse(
                Code::OutOfRange,
                &paths,
                message,
                label,
                format!("use {min} or more"),
            );
        }
        let help = "write HOST:PORT, like 127.0.0.1:0; port 0 picks a free one";
        self.address("cluster.listen", &cluster.listen, help);
        if let Some(http) = &cluster.http {
            self.address("cluster.http", http, &format!("{help}; or write off"));
        }
    }

    fn address(&mut self, path: &str, address: &str, help: &str) {
        let port = address.rsplit_once(':');
        let usable =
            port.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        if !usable {
            let message = format!("{path} {address:?} is not an address");
            let label = "expected host:port".to_owned();
            self.refuse(Code::Address, &[path], message, label, help.to_owned());
        }
    }

    fn top_at(&self, path: &str) -> Option<&Resolved> {
        path.split('.').try_fold(self.top, Resolved::child)
    }
}
