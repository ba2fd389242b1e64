//! Programs that keep the changes of an image file: restic, borg (Debian: restic, borgbackup), Ceph
//! RBD, and `qemu-img convert`, which writes all of it anew.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, ensure};
use blobcr_tests::disk_file::allocated;
use tempfile::TempDir;

use super::{BORG, PROGRAMS, QEMU, QEMU_COMPRESSED, RBD, RESTIC, Took, quiet};
use crate::peers::ceph::{Ceph, write_diff_file};
use crate::peers::installed;
use crate::processor_time;
use crate::report::Report;
use crate::suite::Settings;

/// The file, and the repositories of those programs that are installed.
pub(super) struct Peers {
    file: PathBuf,
    restic: bool,
    borg: bool,
    ceph: Option<Ceph>,
    dir: TempDir,
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
        let ceph = settings.ceph(report)?;
        let peers = Self { file, restic, borg, ceph, dir };
        if restic {
            peers.run("restic", &["-r", "restic", "init"])?;
        }
        if borg {
            peers.run("borg", &["init", "-e", "none", "borg"])?;
        }
        if let Some(ceph) = &peers.ceph {
            ceph.rbd(&["create", "image", "--size", &format!("{}M", bytes >> 20)])?;
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

    /// Has each of them keep the file as it is, full of that kind; what they wrote must be on the disk in
    /// the end.
    pub(super) fn keep(&self, kind: usize) -> anyhow::Result<Vec<(usize, Took)>> {
        let mut all = Vec::new();
        if self.restic {
            let args = ["-r", "restic", "backup", "-q", "image"];
            all.push((RESTIC, self.timed("restic", &args, "restic")?));
        }
        if self.borg {
            let name = format!("borg::{}", rand::random::<u64>());
            all.push((BORG, self.timed("borg", &["create", &name, "image"], "borg")?));
        }
        let whole = ["convert", "-f", "raw", "-O", "qcow2"];
        all.push((QEMU, self.convert(&whole)?));
        if kind == PROGRAMS {
            // The quicker one of its compressors.
            let how = ["-c", "-o", "compression_type=zstd"];
            all.push((QEMU_COMPRESSED, self.convert(&[&whole[..], &how].concat())?));
        }
        if let Some(ceph) = &self.ceph {
            all.push((RBD, self.import_diff(ceph)?));
        }
        Ok(all)
    }

    fn convert(&self, args: &[&str]) -> anyhow::Result<Took> {
        let copy = self.dir.path().join("convert");
        std::fs::create_dir_all(&copy)?;
        let args = [args, &["image", "convert/qcow2"]].concat();
        let took = self.timed("qemu-img", &args, "convert")?;
        std::fs::remove_dir_all(copy)?;
        Ok(took)
    }

    /// The changes come to it in a file, as another cluster's `rbd export-diff` would send them; what it
    /// has taken is durable.
    fn import_diff(&self, ceph: &Ceph) -> anyhow::Result<Took> {
        let diff = self.dir.path().join("diff");
        write_diff_file(&diff, &self.file, &format!("s{}", rand::random::<u64>()))?;
        let cpu = || {
            let daemons = ceph.processes().map(processor_time::of).sum::<anyhow::Result<f64>>();
            anyhow::Ok(daemons? + processor_time::of_children()?)
        };
        let (stored, cpu_before) = (ceph.stored_bytes()?, cpu()?);
        let path = diff.to_str().context("a path of the benchmark is no UTF-8")?;
        let took = ceph.rbd(&["import-diff", path, "image"])?;
        let cpu_seconds = (cpu()? - cpu_before).max(0.01);
        let stored_bytes = ceph.stored_bytes()? as f64 - stored as f64;
        std::fs::remove_file(diff)?;
        Ok(Took { seconds: took.as_secs_f64(), cpu_seconds, stored_bytes })
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
