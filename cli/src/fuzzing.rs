//! Doors to private decoders, for the fuzzers in `tests/fuzz`.

use std::path::Path;

use crate::image_file;
use crate::role::cluster_file;

/// The size of the disk in a qcow2 file that begins with `bytes`, when it may be read without
/// leave to read other files.
#[must_use]
pub fn qcow2(bytes: &[u8]) -> Option<u64> {
    image_file::qcow2_size(bytes)
}

/// The repository that the node in `dir` belongs to, when its file is there and sound.
#[must_use]
pub fn read_cluster(dir: &Path) -> Option<String> {
    cluster_file::read(dir).ok().flatten()
}

/// Makes the node in `dir` one of the repository `id`; says whether that could be written.
#[must_use]
pub fn write_cluster(dir: &Path, id: &str) -> bool {
    cluster_file::write(dir, id).is_ok()
}
