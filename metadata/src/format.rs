//! The line that says what a directory, or a part of an etcd, holds.
//!
//! ```text
//! blobcr-metadata VERSION WHAT CRC
//! ```
//! `CRC` is the CRC-32C of everything before it, without the space, in hex. What may stand for `WHAT`
//! is the business of who reads it.

use blobcr_proto::codec::crc32c;

/// The version of the formats that this program writes.
pub(crate) const VERSION: u32 = 1;
const MAGIC: &str = "blobcr-metadata";

/// The longest line, in bytes: it may name an etcd by the addresses of its members.
pub(crate) const LINE_BYTES_MAX: usize = 4 << 10;

/// Why a line does not say what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LineError {
    /// A newer program wrote it.
    Newer(u32),
    /// It is damaged, or another's.
    Damaged(&'static str),
}

/// The line for `what`.
pub(crate) fn line(what: &str) -> String {
    line_of(VERSION, what)
}

pub(crate) fn line_of(version: u32, what: &str) -> String {
    let line = format!("{MAGIC} {version} {what}");
    format!("{line} {:08x}\n", crc32c(line.as_bytes()))
}

/// What the line names, whatever the bytes are.
pub(crate) fn read(line: &[u8]) -> Result<&str, LineError> {
    let text = std::str::from_utf8(line).ok().and_then(|line| line.strip_suffix('\n'));
    let Some((line, sum)) = text.and_then(|text| text.rsplit_once(' ')) else {
        return Err(LineError::Damaged("is not one line of text"));
    };
    if format!("{:08x}", crc32c(line.as_bytes())) != sum {
        return Err(LineError::Damaged("has a checksum that does not match"));
    }
    let mut words = line.splitn(3, ' ');
    let version = (words.next() == Some(MAGIC)).then(|| words.next()?.parse::<u32>().ok());
    match (version.flatten(), words.next()) {
        (Some(version), _) if version > VERSION => Err(LineError::Newer(version)),
        (Some(VERSION), Some(what)) => Ok(what),
        _ => Err(LineError::Damaged("is not that of a metadata store")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_reads_back_and_any_other_is_refused() {
        for what in ["sled", "moved etcd:http://a:1,http://b:2#x"] {
            assert_eq!(read(line(what).as_bytes()), Ok(what));
        }
        assert_eq!(read(line_of(2, "sled").as_bytes()), Err(LineError::Newer(2)));
        let good = line("sled").into_bytes();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(matches!(read(&bad), Err(LineError::Damaged(_))), "byte {at}");
        }
        for bad in [&b""[..], b"\n", b" \n", b"\xff \n", b"blobcr-metadata"] {
            assert!(matches!(read(bad), Err(LineError::Damaged(_))), "{bad:?}");
        }
    }
}
