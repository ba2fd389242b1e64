//! Programs that keep the changes of an image file: restic, borg (Debian: restic, borgbackup), and
//! `qemu-img convert`, which writes all of it anew.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use blobcr_tests::disk_file::allocated;
use tempfile::TempDir;

use super::{BORG, QEMU, RESTIC, Took, quiet};
use crate::processor_time;
use crate::report::Report;
use crate::suite::Settings;

/// The file, and the repositories of those programs that are installed.
pub(super) struct Peers {
    file: PathBuf,
    restic: bool,
    borg: bool,
    dir: TempDir,
}

/// Whether it says its version.
fn installed(program: &str, version: &str) -> bool {
    let tried = Command::new(program).arg(version).stdout(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

/// Everything below.
fn stored(dir: &Path) -> anyhow::Result<f64> {
    let mut bytes = 0.0;
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        bytes += if path.is_dir() { stored(&path)? } else { allocated(&path)? as f64 };
    }
    Ok(bytes)
}

impl Peers {
    pub(super) fn new(
        settings: &Settings,
        bytes: u64,
        report: &mut Report,
    ) -> anyhow::Result<Self> {
        let dir = settings.scratch(&settings.disk_dir)?;
        let file = dir.path().join("image");
        File::create(&file)?.set_len(bytes)?;
        let (restic, borg) = (installed("restic", "version"), installed("borg", "--version"));
        for (there, name) in [(restic, "restic"), (borg, "borg (Debian: borgbackup)")] {
            if !there {
                report.setup.push(format!("{name} is not installed, and was not measured."));
            }
        }
        let peers = Self { file, restic, borg, dir };
        if restic {
            peers.run("restic", &["-r", "restic", "init"])?;
        }
        if borg {
            peers.run("borg", &["init", "-e", "none", "borg"])?;
        }
        Ok(peers)
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    fn run(&self, program: &str, args: &[&str]) -> anyhow::Result<()> {
        let said = quiet(self.dir.path())?;
        let status = Command::new(program)
            .args(args)
            .current_dir(self.dir.path())
            .env("RESTIC_PASSWORD", "benchmark")
            .env("RESTIC_CACHE_DIR", self.dir.path().join("restic-cache"))
            .env("BORG_BASE_DIR", self.dir.path().join("borg-base"))
            .stdout(said.try_clone()?)
            .stderr(said)
            .status()
            .with_context(|| format!("run {program}"))?;
        let said = || std::fs::read_to_string(self.dir.path().join("said")).unwrap_or_default();
        ensure!(status.success(), "{program} {args:?} failed: {}", said());
        Ok(())
    }

    /// Has each of them keep the file as it is; what they wrote must be on the disk in the end.
    pub(super) fn keep(&self) -> anyhow::Result<Vec<(usize, Took)>> {
        let mut all = Vec::new();
        if self.restic {
            let args = ["-r", "restic", "backup", "-q", "image"];
            all.push((RESTIC, self.timed("restic", &args, "restic")?));
        }
        if self.borg {
            let name = format!("borg::{}", rand::random::<u64>());
            all.push((BORG, self.timed("borg", &["create", &name, "image"], "borg")?));
        }
        let copy = self.dir.path().join("convert");
        std::fs::create_dir_all(&copy)?;
        let args = ["convert", "-f", "raw", "-O", "qcow2", "image", "convert/qcow2"];
        all.push((QEMU, self.timed("qemu-img", &args, "convert")?));
        std::fs::remove_dir_all(copy)?;
        Ok(all)
    }

    fn timed(&self, program: &str, args: &[&str], repository: &str) -> anyhow::Result<Took> {
        let repository = self.dir.path().join(repository);
        let (before, cpu) = (stored(&repository)?, processor_time::of_children()?);
        let began = Instant::now();
        self.run(program, args)?;
        // They do not all sync what they write.
        rustix::fs::syncfs(File::open(&repository)?)?;
        let seconds = began.elapsed().as_secs_f64();
        Ok(Took {
            seconds,
            cpu_seconds: (processor_time::of_children()? - cpu).max(0.01),
            stored_bytes: stored(&repository)? - before,
        })
    }
}
