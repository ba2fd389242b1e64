//! Disks with an ext4 on them, looked at from the host by the tools of e2fsprogs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cluster::Ran;
use crate::disk_file::copy_sparse;

/// A file with an ext4 on it.
#[derive(Clone, Debug)]
pub struct Ext4(PathBuf);

impl Ext4 {
    /// Makes an empty one of `mib` MiB.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(path: &Path, mib: u64) -> Result<Self> {
        let size = format!("{mib}M");
        let ran = run("mke2fs", &["-q", "-F", "-t", "ext4"], path, &[&size])?;
        ensure!(ran.code == 0, "mke2fs: {}", ran.stderr);
        Ok(Self(path.to_owned()))
    }

    /// A copy of a disk, to do with as one likes.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn copy_of(disk: &Path, to: &Path) -> Result<Self> {
        copy_sparse(disk, to)?;
        Ok(Self(to.to_owned()))
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Whether its journal holds what must be replayed before it is whole.
    ///
    /// # Errors
    /// When it is no ext4.
    pub fn needs_recovery(&self) -> Result<bool> {
        let ran = run("dumpe2fs", &["-h"], &self.0, &[])?;
        let features = ran.stdout.lines().find(|line| line.starts_with("Filesystem features:"));
        let features = features.with_context(|| format!("dumpe2fs tells no features: {ran:?}"))?;
        Ok(features.split_whitespace().any(|feature| feature == "needs_recovery"))
    }

    /// Replays its journal, and mends nothing else.
    ///
    /// # Errors
    /// When it cannot be replayed.
    pub fn replay(&self) -> Result<()> {
        let ran = run("e2fsck", &["-y", "-E", "journal_only"], &self.0, &[])?;
        ensure!(ran.code <= 1, "the journal cannot be replayed: {}{}", ran.stdout, ran.stderr);
        Ok(())
    }

    /// Asserts that e2fsck finds nothing to mend, without a look at the journal.
    ///
    /// # Errors
    /// What it found.
    pub fn check(&self) -> Result<()> {
        let ran = run("e2fsck", &["-f", "-n"], &self.0, &[])?;
        ensure!(ran.code == 0, "{} is damaged: {}{}", self.0.display(), ran.stdout, ran.stderr);
        Ok(())
    }
}

fn run(tool: &str, before: &[&str], file: &Path, after: &[&str]) -> Result<Ran> {
    // Where Debian keeps them, whether or not the caller's PATH has it.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut command = Command::new(tool);
    command.args(before).arg(file).args(after).env("PATH", path).env("LC_ALL", "C");
    let output = command.output().with_context(|| format!("cannot run {tool} (tests/setup.sh)"))?;
    Ok(output.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_is_damaged_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let made = Ext4::make(&dir.path().join("fs"), 8).unwrap();
        assert!(!made.needs_recovery().unwrap());
        made.check().unwrap();
        let copy = Ext4::copy_of(made.path(), &dir.path().join("copy")).unwrap();
        // The root directory's inode and its neighbours, wherever they are.
        let mut bytes = std::fs::read(copy.path()).unwrap();
        bytes[8192..1 << 20].fill(0x55);
        std::fs::write(copy.path(), bytes).unwrap();
        assert!(copy.check().is_err());
    }
}
