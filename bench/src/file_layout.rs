//! What files take on their file system, and in how many pieces.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use blobcr_tests::disk_file::allocated_below;

/// Contiguous pieces that a file consists of there, as `filefrag` counts them (Debian: e2fsprogs).
///
/// # Errors
/// When `filefrag` is not there, or the file system does not tell.
pub fn extents(path: &Path) -> anyhow::Result<u64> {
    let ran = Command::new("filefrag").arg(path).output();
    let ran = ran.context("run filefrag (Debian: e2fsprogs)")?;
    let said = String::from_utf8_lossy(&ran.stderr);
    ensure!(ran.status.success(), "filefrag {}: {said}", path.display());
    counted(&String::from_utf8_lossy(&ran.stdout))
}

fn counted(printed: &str) -> anyhow::Result<u64> {
    let count = printed.trim_end().rsplit_once(": ").and_then(|(_, rest)| rest.split(' ').next());
    count.and_then(|count| count.parse().ok()).with_context(|| format!("filefrag said {printed}"))
}

/// Bytes allocated to a file, or to everything below a directory; 0 where nothing is.
///
/// # Errors
/// When a directory cannot be listed.
pub fn stored_bytes(path: &Path) -> anyhow::Result<u64> {
    let Ok(found) = path.symlink_metadata() else { return Ok(0) };
    let below = if found.is_dir() { allocated_below(path)? } else { 0 };
    Ok(found.blocks() * 512 + below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_filefrag_prints() {
        assert_eq!(counted("a: b: 1 extent found\n").unwrap(), 1);
        assert_eq!(counted("/x/delta: 320 extents found\n").unwrap(), 320);
        assert!(counted("nothing").is_err());
    }

    #[test]
    fn a_tree_is_as_large_as_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let empty = stored_bytes(dir.path()).unwrap();
        std::fs::write(dir.path().join("file"), vec![1; 1 << 20]).unwrap();
        std::fs::File::create(dir.path().join("sparse")).unwrap().set_len(1 << 30).unwrap();
        assert!((1 << 20..2 << 20).contains(&(stored_bytes(dir.path()).unwrap() - empty)));
        assert_eq!(stored_bytes(&dir.path().join("none")).unwrap(), 0);
    }
}
