//! The auditor bites: each way of damaging a good run is reported under its own name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use distillery_common::ids::Digest;
use distillery_tests::harness::{EngineKind, Run, sim_recipe};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);

/// A copy of a good run that may be damaged.
struct Copy(tempfile::TempDir);

impl Copy {
    fn of(run: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let copied = Command::new("cp")
            .arg("-r")
            .arg(run)
            .arg(folder.path())
            .status();
        assert!(copied.expect("cp is there").success());
        Self(folder)
    }

    fn root(&self) -> PathBuf {
        self.0.path().join("run")
    }

    /// The first object whose key ends so, and begins so.
    fn find(&self, start: &str, end: &str) -> PathBuf {
        let mut folders = vec![self.root()];
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("readable") {
                let path = entry.expect("readable").path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    found.push(path);
                }
            }
        }
        found.sort();
        let fits = |path: &PathBuf| {
            let key = path.strip_prefix(self.root()).expect("below");
            let key = key.display().to_string();
            key.starts_with(start) && key.ends_with(end)
        };
        found.into_iter().find(fits).expect("the run has one")
    }

    fn segment(&self, seq: usize) -> PathBuf {
        self.root().join(format!("journal/{seq:020}"))
    }

    /// Number of the first segment that holds a record of this kind, of this stage.
    fn segment_of(&self, kind: &str, stage: Option<&str>) -> usize {
        let holds = |seq: &usize| {
            let segment = read(&self.segment(*seq));
            let records = segment["records"].as_array().expect("records");
            records
                .iter()
                .any(|r| r["record"] == kind && stage.is_none_or(|stage| r["stage"] == stage))
        };
        (0..100).find(holds).expect("the journal has one")
    }

    fn change(&self, path: &Path, change: impl FnOnce(&mut Value)) {
        let mut value = read(path);
        change(&mut value);
        let mut text = serde_json::to_vec(&value).expect("JSON");
        text.push(b'\n');
        std::fs::write(path, text).expect("writable");
    }

    fn change_segment(&self, seq: usize, change: impl FnOnce(&mut Value)) {
        self.change(&self.segment(seq), change);
    }

    fn swap(&self, one: usize, other: usize) {
        let aside = self.root().join("aside");
        std::fs::rename(self.segment(one), &aside).expect("there");
        std::fs::rename(self.segment(other), self.segment(one)).expect("there");
        std::fs::rename(&aside, self.segment(other)).expect("there");
    }

    /// Drops a segment, and moves those behind it up.
    fn drop_segment(&self, seq: usize) {
        std::fs::remove_file(self.segment(seq)).expect("there");
        for later in seq + 1.. {
            if std::fs::rename(self.segment(later), self.segment(later - 1)).is_err() {
                return;
            }
        }
    }

    /// Changes a curve, and the COMMIT that names it, so that nothing but the curve is wrong.
    fn change_curve(&self, stage: &str, change: impl FnOnce(&mut Vec<String>)) {
        let curve = self.find(&format!("checkpoints/{stage}/0000000040"), "metrics.jsonl");
        let text = std::fs::read_to_string(&curve).expect("text");
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        change(&mut lines);
        let text = lines.join("\n") + "\n";
        std::fs::write(&curve, &text).expect("writable");
        let commit = curve.with_file_name("COMMIT");
        self.change(&commit, |commit| {
            let files = commit["files"].as_array_mut().expect("files");
            let named = files.last_mut().expect("the curve is last");
            named["bytes"] = json!(text.len());
            named["sha256"] = json!(Digest::of(text.as_bytes()).to_string());
        });
    }

    /// What the auditor complains of, by the names of its checks, and its exit code.
    fn audit(&self, against: &Path) -> (Vec<String>, Option<i32>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_audit"))
            .arg(self.root())
            .arg("--against")
            .arg(against)
            .output()
            .expect("the auditor starts");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let names = said.lines().filter(|line| line.contains(" VIOLATED "));
        let names = names.filter_map(|line| Some(line.split_whitespace().next()?.to_owned()));
        (names.collect(), output.status.code(), said + &errors)
    }
}

fn read(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or(json!({"records": []}))
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).expect("readable");
    let at = at.min(bytes.len() - 1);
    bytes[at] ^= 4;
    std::fs::write(path, bytes).expect("writable");
}

type Damage = (&'static str, &'static str, fn(&Copy));

/// What is done, what it is called, and how it is done.
const DAMAGES: [Damage; 23] = [
    ("a shard's rows deleted", "I1", |run| {
        std::fs::remove_file(run.find("trajectories", ".parquet")).expect("there");
    }),
    ("a bit of a shard flipped", "I1", |run| {
        flip(&run.find("trajectories", ".parquet"), 500);
    }),
    ("a COMMIT under another task", "I1", |run| {
        let one = run.find("trajectories", "shard-00000001/COMMIT");
        let other = run.find("trajectories", "shard-00000002/COMMIT");
        std::fs::copy(one, other).expect("writable");
    }),
    ("a COMMIT of a task that is none", "I1", |run| {
        let one = run.find("trajectories", "shard-00000001/COMMIT");
        let folder = one
            .parent()
            .expect("a shard")
            .with_file_name("shard-00000900");
        std::fs::create_dir(&folder).expect("new");
        std::fs::copy(one, folder.join("COMMIT")).expect("writable");
    }),
    ("a COMMIT lost", "I1", |run| {
        std::fs::remove_file(run.find("trajectories", "COMMIT")).expect("there");
    }),
    ("a task twice in the manifest", "I1", |run| {
        run.change(&run.find("trajectories", "MANIFEST"), |manifest| {
            let shards = manifest["shards"].as_array_mut().expect("shards");
            shards.push(shards[0].clone());
        });
    }),
    ("a task left out of the manifest", "I1", |run| {
        run.change(&run.find("trajectories", "MANIFEST"), |manifest| {
            manifest["shards"].as_array_mut().expect("shards").remove(3);
        });
    }),
    ("another manifest than was sealed", "sealed", |run| {
        run.change(&run.find("trajectories", "MANIFEST"), |manifest| {
            manifest["rows"] = json!(321);
        });
    }),
    ("a hole in the journal", "journal", |run| {
        std::fs::remove_file(run.segment(3)).expect("there");
    }),
    ("a truncated segment", "journal", |run| {
        let bytes = std::fs::read(run.segment(4)).expect("readable");
        std::fs::write(run.segment(4), &bytes[..bytes.len() / 2]).expect("writable");
    }),
    ("segments in another order", "I8", |run| {
        let sealed = run.segment_of("stage_sealed", Some("seg4"));
        let started = run.segment_of("stage_started", Some("seg2"));
        run.swap(sealed, started);
    }),
    (
        "a stage that started before its input was sealed",
        "I8",
        |run| {
            let sealed = run.segment_of("stage_sealed", Some("trajectories"));
            let started = run.segment_of("stage_started", Some("seg4"));
            run.swap(sealed, started);
        },
    ),
    ("a generation used again", "I2", |run| {
        let formed = run.segment_of("generation_formed", Some("seg2"));
        run.change_segment(formed, |segment| {
            segment["records"][0]["generation"] = json!(1)
        });
    }),
    ("a term claimed again", "I2", |run| {
        let claim = read(&run.segment(0));
        let end = run.segment_of("run_finished", None);
        run.change_segment(end + 1, |segment| *segment = claim);
    }),
    ("a lower term behind a higher claim", "I11", |run| {
        let claim = read(&run.segment(0));
        let end = run.segment_of("run_finished", None);
        run.change_segment(end + 1, |segment| {
            *segment = claim;
            segment["term"] = json!(7);
            segment["records"][0]["term"] = json!(7);
        });
        let last = read(&run.segment(end));
        run.change_segment(end + 2, |segment| *segment = last);
    }),
    ("a second writer of one term", "I11", |run| {
        run.change_segment(5, |segment| segment["writer"] = json!("somebody else"));
    }),
    ("a file of a checkpoint deleted", "I9", |run| {
        std::fs::remove_file(run.find("checkpoints/seg2", ".safetensors")).expect("there");
    }),
    ("a bit of a checkpoint flipped", "I9", |run| {
        flip(&run.find("checkpoints/seg2", ".safetensors"), 300);
    }),
    ("a step taken twice", "I12", |run| {
        run.change_curve("seg2", |lines| lines.insert(20, lines[20].clone()));
    }),
    ("a step left out", "I12", |run| {
        run.change_curve("seg2", |lines| drop(lines.remove(20)));
    }),
    ("a step over rows that are not its own", "I12", |run| {
        run.change_curve("seg2", |lines| {
            let mut line: serde_json::Value = serde_json::from_str(&lines[20]).expect("JSON");
            let sum = line["rows"][3].as_u64().expect("a ledger");
            line["rows"][3] = json!(sum + 1);
            lines[20] = line.to_string();
        });
    }),
    ("a stage that was not sealed", "sealed", |run| {
        run.drop_segment(run.segment_of("stage_sealed", Some("seg2")));
    }),
    ("a run that failed", "outcome", |run| {
        let end = run.segment_of("run_finished", None);
        run.change_segment(end, |segment| {
            segment["records"][0]["outcome"] = json!({"failed": {"message": "no"}});
        });
    }),
];

#[test]
fn a_good_run_passes_and_every_damage_is_called_by_its_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), sim_recipe(), EngineKind::Sim);
    let mut run = run.expect("the programs are built");
    run.finish(PATIENCE).expect("it finishes");
    let (named, code, said) = Copy::of(&run.output()).audit(&run.output());
    assert_eq!((named.len(), code), (0, Some(0)), "{said}");

    let mut missed = BTreeMap::new();
    for (what, name, damage) in DAMAGES {
        let copy = Copy::of(&run.output());
        damage(&copy);
        let (named, code, said) = copy.audit(&run.output());
        if code != Some(1) || !named.iter().any(|found| found == name) {
            missed.insert(what, said);
        }
    }
    assert!(
        missed.is_empty(),
        "not reported as they should be: {missed:#?}"
    );
}

/// Two runs that both kept every promise, and still did not make the same.
#[test]
fn a_run_that_made_something_else_is_not_equal() {
    let made = [
        sim_recipe().to_owned(),
        sim_recipe().replace("seed: 7", "seed: 8"),
    ]
    .map(|recipe| {
        let folder = tempfile::tempdir().expect("a folder");
        let run = Run::new(folder.path(), &recipe, EngineKind::Sim);
        let mut run = run.expect("the programs are built");
        run.finish(PATIENCE).expect("it finishes");
        (folder, run)
    });
    let (named, code, said) = Copy::of(&made[0].1.output()).audit(&made[1].1.output());
    assert_eq!((named, code), (vec!["equal".to_owned()], Some(1)), "{said}");
}
