//! Files that stand for disks.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

/// Bytes that look like no others: a xorshift sequence, the same for the same seed.
#[must_use]
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    // Any odd multiplier spreads small seeds; zero would stay zero for ever.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A sparse file of `size` bytes with these pieces of data.
///
/// # Errors
/// When it cannot be written.
pub fn sparse(path: &Path, size: u64, pieces: &[(u64, &[u8])]) -> anyhow::Result<PathBuf> {
    let file = File::create(path)?;
    file.set_len(size)?;
    for (offset, bytes) in pieces {
        file.write_all_at(bytes, *offset)?;
    }
    file.sync_all()?;
    Ok(path.to_owned())
}

/// Copies a file with its holes.
///
/// # Errors
/// When it cannot be copied.
pub fn copy_sparse(from: &Path, to: &Path) -> anyhow::Result<()> {
    let status = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .args([from, to])
        .status()
        .context("cannot run cp")?;
    ensure!(status.success(), "cannot copy {} to {}", from.display(), to.display());
    Ok(())
}

/// What a file takes of its disk, in bytes.
///
/// # Errors
/// When it is not there.
pub fn allocated(path: &Path) -> anyhow::Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

/// What the files and directories below a directory take of their disk, in bytes.
///
/// # Errors
/// When one cannot be looked at.
pub fn allocated_below(dir: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let found = entry.metadata()?;
        bytes += found.blocks() * 512;
        if found.is_dir() {
            bytes += allocated_below(&entry.path())?;
        }
    }
    Ok(bytes)
}

/// Asserts that two files hold the same bytes. Reads both whole.
///
/// # Errors
/// Where they differ.
pub fn same(a: &Path, b: &Path) -> anyhow::Result<()> {
    let (a, b) = (File::open(a)?, File::open(b)?);
    let (size, other) = (a.metadata()?.len(), b.metadata()?.len());
    ensure!(size == other, "{size} bytes and {other} bytes");
    let (mut in_a, mut in_b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < size {
        let len = (size - at).min(1 << 20) as usize;
        a.read_exact_at(&mut in_a[..len], at)?;
        b.read_exact_at(&mut in_b[..len], at)?;
        let differs = in_a[..len].iter().zip(&in_b[..len]).position(|(x, y)| x != y);
        ensure!(differs.is_none(), "byte {} differs", at + differs.unwrap_or(0) as u64);
        at += len as u64;
    }
    Ok(())
}
