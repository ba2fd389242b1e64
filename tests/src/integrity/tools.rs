//! Testers by others, run on a mounted disk: fio and fsx.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cluster::Ran;

/// How fio reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// As QEMU with `aio=native`.
    Libaio,
    /// As QEMU with `aio=io_uring`.
    IoUring,
    /// One plain call after the other.
    Sync,
}

impl Engine {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Libaio, Self::IoUring, Self::Sync];

    const fn name(self) -> &'static str {
        match self {
            Self::Libaio => "libaio",
            Self::IoUring => "io_uring",
            Self::Sync => "psync",
        }
    }
}

/// Lets fio write blocks of random sizes at random places of the disk at `path` for `time`, with
/// direct I/O and now and then a flush, and read back and verify each of them. `rate` is what it writes
/// in a second at most, in bytes.
///
/// # Errors
/// What fio found.
pub fn fio(
    path: &Path,
    size: u64,
    engine: Engine,
    time: Duration,
    seed: u64,
    rate: Option<u64>,
) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let ran = Command::new("fio")
        .current_dir(&scratch)
        .args(["--name=verify", "--rw=randwrite", "--direct=1", "--fallocate=none", "--fsync=256"])
        .args(["--bsrange=512-256k", "--blockalign=512", "--verify=crc32c", "--verify_fatal=1"])
        .args(["--do_verify=1", "--verify_backlog=128", "--verify_state_save=0"])
        .args(["--time_based=1", "--output-format=terse"])
        .arg(format!("--ioengine={}", engine.name()))
        .arg(format!("--iodepth={}", if engine == Engine::Sync { 1 } else { 32 }))
        .arg(format!("--runtime={}", time.as_secs().max(1)))
        .arg(format!("--randseed={seed}"))
        .arg(format!("--size={size}"))
        .arg(format!("--filename={}", path.display()))
        .args(rate.map(|bytes| format!("--rate=,{bytes}")))
        .output()
        .context("start fio (tests/setup.sh installs it)")?;
    let ran = Ran::from(ran);
    ensure!(ran.code == 0, "fio with {engine:?} and seed {seed}: {}{}", ran.stderr, ran.stdout);
    Ok(())
}

/// Where `tests/setup.sh` installs fsx, below the directory that cargo builds in.
fn fsx_binary() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own.ancestors().map(|dir| dir.join("tools/bin/fsx")).find(|path| path.is_file());
    found.context("there is no fsx in target/tools: run tests/setup.sh")
}

/// Everything that a disk can do; its size is fixed.
const FSX_CONFIG: &str = "
blockmode = true
nosizechecks = true
[opsize]
max = 300000
min = 0
align = 1
[weights]
close_open = 0
truncate = 0
posix_fallocate = 0
read = 10
write = 10
mapread = 5
mapwrite = 5
invalidate = 1
fsync = 0.5
fdatasync = 0.5
punch_hole = 3
sendfile = 2
posix_fadvise = 1
copy_file_range = 2
";

/// Lets fsx do `operations` random ones on the disk at `path`.
///
/// # Errors
/// What fsx found, with its log.
pub fn fsx(path: &Path, operations: u64, seed: u64) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let config = scratch.path().join("fsx.toml");
    fs::write(&config, FSX_CONFIG)?;
    let ran = Command::new(fsx_binary()?)
        .current_dir(&scratch)
        .arg("-f")
        .arg(&config)
        .arg("-P")
        .arg(scratch.path())
        .args(["-N", &operations.to_string(), "-S", &seed.to_string()])
        .arg(path)
        .output()
        .context("start fsx")?;
    let ran = Ran::from(ran);
    ensure!(ran.code == 0, "fsx with seed {seed}:\n{}\n{}", ends(&ran.stdout), ends(&ran.stderr));
    Ok(())
}

/// The first lines, where fsx tells what differs, and the last ones of the operations before.
fn ends(said: &str) -> String {
    let lines: Vec<_> = said.lines().collect();
    let cut = lines.len().saturating_sub(60).max(20).min(lines.len());
    [&lines[..lines.len().min(20)], &lines[cut..]].concat().join("\n")
}
