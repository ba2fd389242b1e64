//! Whether a directory can hold a role's files.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

use super::Check;
use crate::size::human_size;

/// A role refuses writes long before a disk is really full; with less than this it hardly starts.
const FREE_BYTES_MIN: u64 = 1 << 30;
/// Below this an import of one ordinary cloud image fills the disk.
const FREE_BYTES_GOOD: u64 = 10 << 30;

/// The directory itself, or the nearest parent that is there.
fn nearest_existing(dir: &Path) -> PathBuf {
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    absolute.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

/// Bytes that this user may still write below `dir`.
///
/// # Errors
/// When the file system does not tell.
pub(crate) fn free_bytes(dir: &Path) -> io::Result<u64> {
    let stat = statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Room at `dir`.
pub(super) fn free_space(dir: &Path) -> Check {
    const NAME: &str = "free space";
    let dir = nearest_existing(dir);
    match free_bytes(&dir) {
        Ok(free) => judge_free(&dir, free),
        Err(e) => Check::fail(
            NAME,
            format!("{} does not tell: {e}", dir.display()),
            "give another directory with --dir",
        ),
    }
}

fn judge_free(dir: &Path, free: u64) -> Check {
    const NAME: &str = "free space";
    let found = format!("{} at {}", human_size(free), dir.display());
    let mend = "free some, or give a directory on a larger disk with --dir";
    if free < FREE_BYTES_MIN {
        Check::fail(NAME, found, mend)
    } else if free < FREE_BYTES_GOOD {
        Check::warn(NAME, found, mend)
    } else {
        Check::ok(NAME, found)
    }
}

/// Disks and caches are sparse files whose ranges are given back: the file system must do both.
pub(super) fn sparse_files(dir: &Path) -> Check {
    const NAME: &str = "sparse files";
    let dir = nearest_existing(dir);
    match tempfile::tempfile_in(&dir).and_then(|file| punches_holes(&file)) {
        Ok(true) => Check::ok(NAME, format!("work at {}", dir.display())),
        Ok(false) => Check::fail(
            NAME,
            format!("{} does not give back the space of a punched hole", dir.display()),
            "use ext4, XFS or btrfs",
        ),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Check::fail(
            NAME,
            format!("this user may not write at {}", dir.display()),
            format!("give another directory with --dir, or `chown` {}", dir.display()),
        ),
        Err(e) => Check::fail(
            NAME,
            format!("cannot be tried at {}: {e}", dir.display()),
            "use ext4, XFS or btrfs, with some space free",
        ),
    }
}

fn punches_holes(file: &File) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    const LEN: u64 = 1 << 20;
    file.write_all_at(&vec![1; LEN as usize], 0)?;
    let before = file.metadata()?.blocks();
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, LEN)?;
    let after = file.metadata()?;
    Ok(after.blocks() <= before && after.len() == LEN && first_byte_is_zero(file)?)
}

fn first_byte_is_zero(file: &File) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let mut byte = [1];
    file.read_exact_at(&mut byte, 0)?;
    Ok(byte == [0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    #[test]
    fn free_space_is_judged_by_its_limits() {
        let dir = Path::new("/d");
        assert_eq!(judge_free(dir, FREE_BYTES_MIN - 1).state, State::Fail);
        assert_eq!(judge_free(dir, FREE_BYTES_MIN).state, State::Warn);
        assert_eq!(judge_free(dir, FREE_BYTES_GOOD).state, State::Ok);
    }

    #[test]
    fn a_directory_yet_to_be_made_is_judged_by_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(nearest_existing(&dir.path().join("a/b")), dir.path());
        assert_eq!(sparse_files(&dir.path().join("a")).state, State::Ok);
    }
}
