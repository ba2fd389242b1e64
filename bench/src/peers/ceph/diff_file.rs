//! The files that `rbd import-diff` reads: "rbd diff v1" of Ceph's documentation.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

/// As much as an object of an image holds.
const EXTENT_BYTES: usize = 4 << 20;

/// Writes a file at `diff` that makes an image what `image` holds, and then takes a snapshot of it.
///
/// # Errors
/// When one of the files cannot be read or written.
pub fn write(diff: &Path, image: &Path, snapshot: &str) -> anyhow::Result<()> {
    let mut image = File::open(image)?;
    let size = image.metadata()?.len();
    let mut diff = BufWriter::new(File::create(diff)?);
    diff.write_all(b"rbd diff v1\nt")?;
    diff.write_all(&u32::try_from(snapshot.len())?.to_le_bytes())?;
    diff.write_all(snapshot.as_bytes())?;
    diff.write_all(b"s")?;
    diff.write_all(&size.to_le_bytes())?;
    let mut offset = 0;
    let mut extent = Vec::with_capacity(EXTENT_BYTES);
    loop {
        extent.clear();
        (&mut image).take(EXTENT_BYTES as u64).read_to_end(&mut extent)?;
        let length = extent.len() as u64;
        if length == 0 {
            break;
        }
        let zeros = extent.iter().all(|byte| *byte == 0);
        diff.write_all(if zeros { b"z" } else { b"w" })?;
        diff.write_all(&u64::to_le_bytes(offset))?;
        diff.write_all(&length.to_le_bytes())?;
        if !zeros {
            diff.write_all(&extent)?;
        }
        offset += length;
    }
    diff.write_all(b"e")?;
    Ok(diff.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_and_zeros_are_records_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let (image, diff) = (dir.path().join("image"), dir.path().join("diff"));
        let mut bytes = vec![0; EXTENT_BYTES];
        bytes.extend(b"data");
        std::fs::write(&image, bytes).unwrap();
        write(&diff, &image, "one").unwrap();
        let extent = EXTENT_BYTES as u64;
        let mut expected = b"rbd diff v1\nt\x03\0\0\0ones".to_vec();
        expected.extend((extent + 4).to_le_bytes());
        expected.push(b'z');
        expected.extend([0, extent].map(u64::to_le_bytes).concat());
        expected.push(b'w');
        expected.extend([extent, 4].map(u64::to_le_bytes).concat());
        expected.extend(b"datae");
        assert_eq!(std::fs::read(&diff).unwrap(), expected);
    }
}
