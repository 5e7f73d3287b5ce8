//! A disk that is full for a while: the run goes on, or stops with a clear message and is resumed.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::site::{Setting, Site};
use super::{Context, Score};

/// A small file system in memory, which is gone when this is.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new() -> anyhow::Result<Option<Self>> {
        let folder = tempfile::Builder::new().prefix("chaos-disk-").tempdir()?;
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=6m", "chaos"])
            .arg(folder.path())
            .stderr(std::process::Stdio::null())
            .status();
        Ok(done
            .is_ok_and(|status| status.success())
            .then_some(Self(folder)))
    }

    fn ballast(&self) -> PathBuf {
        self.0.path().join("ballast")
    }

    /// Leaves no byte free.
    fn fill(&self) {
        // It ends with an error when the disk is full, which is the point.
        let _ = Command::new("dd")
            .args(["if=/dev/zero", "bs=4096"])
            .arg(format!("of={}", self.ballast().display()))
            .stderr(std::process::Stdio::null())
            .status();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// Fills the disk of a run, and frees it again.
pub(crate) fn fill(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let mut setting = Setting::small(&context.base, &[]);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    setting.pace = (150, 20);
    let (mut number, mut resumed) = (0, 0);
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        number += 1;
        let Some(mount) = Mount::new()? else {
            score.skipped("a file system cannot be mounted here (it takes root)");
            return Ok(());
        };
        setting.output = None;
        setting.base = mount.0.path().to_owned();
        // Logs of ours must not be on the disk that is full.
        let mut site = Site::new(&Setting {
            base: context.base.clone(),
            ..setting.clone()
        })?;
        let output = mount.0.path().join("run");
        site.setting.output = Some(output.display().to_string());
        site.join_beside_run = true;
        site.coordinate(&[])?;
        site.hire(setting.workers)?;
        score.runs += 1;
        std::thread::sleep(Duration::from_millis(100 + u64::from(stream.below(1500))));
        mount.fill();
        score.faults += 1;
        std::thread::sleep(Duration::from_millis(500 + u64::from(stream.below(3000))));
        std::fs::remove_file(mount.ballast())?;
        let before = site.lives.len();
        if let Err(error) = finish(&mut site) {
            score.violated(format!("{error:#}"));
            continue;
        }
        resumed += u32::from(site.lives.len() > before);
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
        drop(site);
    }
    score.note(format!("{resumed} runs had to be resumed"));
    Ok(())
}

/// A run that has failed may be tried again: its message must say why.
fn finish(site: &mut Site) -> anyhow::Result<()> {
    match site.finish() {
        Ok(()) => Ok(()),
        Err(error) => {
            let said = format!("{error:#}");
            anyhow::ensure!(
                said.contains("No space left") || said.contains("StorageFull"),
                "a full disk is not what the run says it ended of: {said}"
            );
            site.coordinate(&[])?;
            site.finish()
        }
    }
}
