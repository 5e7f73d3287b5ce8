//! Wall clocks that are hours off, and jump while a run goes on: they must not matter.

use std::path::Path;
use std::process::Command;

use super::site::{Setting, Site};
use super::{Context, Score};

/// Offsets in seconds.
const OFFSETS: [&str; 5] = ["+25200", "-25200", "+864000", "-864000", "+3"];

/// The library that shifts clocks, if it is installed.
fn library() -> Option<String> {
    let found = Command::new("sh")
        .args(["-c", "ls /usr/lib/*/faketime/libfaketime.so.1 | head -1"])
        .output()
        .ok()?;
    let path = String::from_utf8(found.stdout).ok()?.trim().to_owned();
    Path::new(&path).is_file().then_some(path)
}

/// Coordinators and workers whose clocks differ and jump.
pub(crate) fn shift(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let Some(library) = library() else {
        score.skipped("no libfaketime (Debian: apt-get install faketime)");
        return Ok(());
    };
    let mut setting = Setting::small(&context.base, &[]);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    setting.pace = (150, 20);
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        number += 1;
        let mut site = Site::new(&setting)?;
        score.runs += 1;
        let files = ["coordinator", "worker"].map(|who| site.folder().join(format!("{who}.clock")));
        for (file, offset) in files.iter().zip(["+0", "+18000"]) {
            std::fs::write(file, offset)?;
        }
        let wrap = |file: &Path| {
            let variable = |name: &str, value: String| format!("{name}={value}");
            vec![
                "env".to_owned(),
                variable("LD_PRELOAD", library.clone()),
                variable("FAKETIME_TIMESTAMP_FILE", file.display().to_string()),
                variable("FAKETIME_NO_CACHE", "1".into()),
                variable("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
                variable("DONT_FAKE_MONOTONIC", "1".into()),
            ]
        };
        site.wrap.coordinator = wrap(&files[0]);
        site.wrap.worker = wrap(&files[1]);
        site.coordinate(&[])?;
        site.hire(setting.workers)?;
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(stream.below(800).into()));
            let file = &files[stream.below(2) as usize];
            std::fs::write(file, OFFSETS[stream.below(OFFSETS.len() as u32) as usize])?;
            score.faults += 1;
        }
        site.finish()?;
        if site.lives.len() > 1 {
            score.violated(format!(
                "a coordinator ended because of a clock:\n{}",
                site.tail()
            ));
        }
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    Ok(())
}
