//! Bytes that neither compress nor repeat.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rand::RngCore;

const MIB: u64 = 1 << 20;

/// Writes random bytes into these MiB of a file.
///
/// # Errors
/// When it cannot be written.
pub fn fill(file: &File, mib: Range<u64>) -> anyhow::Result<()> {
    let mut block = vec![0; MIB as usize];
    for index in mib {
        rand::rng().fill_bytes(&mut block);
        file.write_all_at(&block, index * MIB)?;
    }
    Ok(())
}
