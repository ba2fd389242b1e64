//! qcow2 files: checked, then unpacked by `qemu-img` into an unnamed raw file.
//!
//! The header is read here first, because a qcow2 file may name other files of this machine: an
//! image from elsewhere could so copy anything that the operator may read.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;

use super::{ReadAt, qemu_img, spool};
use crate::args::ImportArgs;
use crate::exit::{Exit, Refusal};
use crate::progress::Progress;
use crate::size::human_size;

/// The first bytes of every qcow2 file.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// What of the header decides whether the file may be read (docs/interop/qcow2.txt of QEMU).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Header {
    virtual_size: u64,
    has_backing_file: bool,
    has_data_file: bool,
    encrypted: bool,
}

/// Bytes of a version 3 header without extensions; a version 2 header is shorter.
const HEADER_BYTES: usize = 104;
const HEADER_BYTES_V2: usize = 72;
/// Bit 2 of the incompatible features.
const EXTERNAL_DATA_FILE: u64 = 1 << 2;

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        let u32_at = |at: usize| -> Option<u32> {
            Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        let u64_at = |at: usize| -> Option<u64> {
            Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
        };
        if !bytes.starts_with(&MAGIC) {
            return Err("it is no qcow2 file (give --format raw if it is a raw one)");
        }
        let cut = "its header is cut off";
        let version = u32_at(4).ok_or(cut)?;
        let needed = match version {
            2 => HEADER_BYTES_V2,
            3 => HEADER_BYTES,
            _ => return Err("its qcow2 version is neither 2 nor 3"),
        };
        if bytes.len() < needed {
            return Err(cut);
        }
        let features = if version == 3 { u64_at(72).ok_or(cut)? } else { 0 };
        Ok(Self {
            has_backing_file: u64_at(8).ok_or(cut)? != 0,
            virtual_size: u64_at(24).ok_or(cut)?,
            encrypted: u32_at(32).ok_or(cut)? != 0,
            has_data_file: features & EXTERNAL_DATA_FILE != 0,
        })
    }

    fn read(file: &File) -> anyhow::Result<Self> {
        use std::io::Read;
        let mut bytes = Vec::new();
        ReadAt { file, at: 0 }.take(HEADER_BYTES as u64).read_to_end(&mut bytes)?;
        Ok(Self::parse(&bytes).map_err(|reason| Refusal::new(Exit::Integrity, reason))?)
    }

    fn check_allowed(&self, allow_other_files: bool) -> Result<(), Refusal> {
        if self.encrypted {
            return Err(Refusal::new(
                Exit::Usage,
                "it is encrypted; decrypt it first with `qemu-img convert`",
            ));
        }
        if (self.has_backing_file || self.has_data_file) && !allow_other_files {
            return Err(Refusal::new(
                Exit::Usage,
                "it names other files of this machine that would be read too; if you trust it, \
                 give --allow-backing-file",
            ));
        }
        Ok(())
    }
}

/// As [`unpack`] reads and judges the header, without leave to read other files.
#[cfg(feature = "fuzzing")]
pub(crate) fn allowed_size(bytes: &[u8]) -> Option<u64> {
    let header = Header::parse(bytes).ok()?;
    header.check_allowed(false).ok()?;
    Some(header.virtual_size)
}

/// Checks the qcow2 file at `path` and unpacks it into an unnamed sparse raw file.
pub(super) async fn unpack(path: &Path, file: &File, args: &ImportArgs) -> anyhow::Result<File> {
    let header = Header::read(file)?;
    header.check_allowed(args.allow_backing_file)?;
    let path = &qemu_img::plain_path(path)?;
    check(path).await?;
    let data_bytes = find_data(path, &header, file.metadata()?.len()).await?;
    let raw = spool::unnamed(&args.temp_dir)?;
    check_room(&args.temp_dir, data_bytes)?;
    raw.set_len(header.virtual_size).with_context(|| {
        format!(
            "a sparse file of {} cannot be made at {}",
            human_size(header.virtual_size),
            args.temp_dir.display()
        )
    })?;
    convert(path, &raw, data_bytes).await?;
    Ok(raw)
}

/// Exit codes of `qemu-img check` (its manual page).
const CHECK_LEAKS_ONLY: i32 = 3;

async fn check(path: &Path) -> anyhow::Result<()> {
    let output = qemu_img::run(qemu_img::args(["check", "-f", "qcow2"], &[path])).await?;
    match output.status.code() {
        Some(0 | CHECK_LEAKS_ONLY) => Ok(()),
        _ if is_locked(&output.stderr) => {
            let message = "another process writes to it; stop that and try again";
            Err(Refusal::new(Exit::Conflict, message).into())
        }
        _ => {
            let message = format!(
                "the qcow2 file is truncated or corrupt: {}; get it again, or try `qemu-img check \
                 -r all` on a copy",
                qemu_img::complaint(&output)
            );
            Err(Refusal::new(Exit::Integrity, message).into())
        }
    }
}

fn is_locked(stderr: &[u8]) -> bool {
    // Failed to get shared "write" lock
    String::from_utf8_lossy(stderr).contains("\" lock")
}

/// A line of `qemu-img map --output=json`.
#[derive(Debug, Deserialize)]
struct Extent {
    length: u64,
    depth: u64,
    data: bool,
    /// Where in the file; absent for compressed data.
    offset: Option<u64>,
}

impl Extent {
    fn parse(line: &str) -> anyhow::Result<Option<Self>> {
        let object = line.trim().trim_start_matches('[').trim_end_matches([',', ']']);
        if object.is_empty() {
            return Ok(None);
        }
        serde_json::from_str(object).map(Some).context("qemu-img map said something unexpected")
    }
}

/// How many bytes the disk has. `check` does not miss a cluster behind the file's end, but it
/// does not see the last one cut short: its missing bytes would read as zeros.
async fn find_data(path: &Path, header: &Header, file_len: u64) -> anyhow::Result<u64> {
    let mut data_bytes = 0;
    let args = qemu_img::args(["map", "-f", "qcow2", "--output=json"], &[path]);
    qemu_img::lines(args, |line| {
        let Some(extent) = Extent::parse(line)?.filter(|extent| extent.data) else { return Ok(()) };
        data_bytes += extent.length;
        let end = extent.offset.map_or(0, |offset| offset.saturating_add(extent.length));
        if end > file_len && extent.depth == 0 && !header.has_data_file {
            let missing = end - file_len;
            let message = format!(
                "the qcow2 file is truncated: {missing} bytes of data are missing at its end"
            );
            return Err(Refusal::new(Exit::Integrity, message).into());
        }
        Ok(())
    })
    .await?;
    Ok(data_bytes)
}

fn check_room(temp_dir: &Path, needed: u64) -> anyhow::Result<()> {
    let free = crate::doctor::free_bytes(temp_dir)?;
    if needed <= free {
        return Ok(());
    }
    let message = format!(
        "unpacking it needs {} at {}, where {} are free; give another --temp-dir",
        human_size(needed),
        temp_dir.display(),
        human_size(free)
    );
    Err(Refusal::new(Exit::Other, message).into())
}

async fn convert(path: &Path, raw: &File, data_bytes: u64) -> anyhow::Result<()> {
    let words = ["convert", "-f", "qcow2", "-O", "raw", "-n", "--target-is-zero"];
    let args: Vec<OsString> = qemu_img::args(words, &[path, &qemu_img::path_of(raw)]);
    let progress = Progress::bytes("unpack", data_bytes);
    let output = watch_growth(raw, &progress, qemu_img::run(args)).await?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = qemu_img::complaint(&output);
    let exit = if complaint.contains("No space left") { Exit::Other } else { Exit::Integrity };
    Err(Refusal::new(exit, format!("the qcow2 file cannot be read whole: {complaint}")).into())
}

/// How often the progress of another process is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The unit of `st_blocks`.
const BLOCK_BYTES: u64 = 512;

/// What a file takes of its disk; 0 when it cannot be told.
pub(super) fn allocated_bytes(file: &File) -> u64 {
    file.metadata().map_or(0, |meta| meta.blocks() * BLOCK_BYTES)
}

/// Runs `work` and shows how the file grows meanwhile.
pub(super) async fn watch_growth<T>(
    file: &File,
    progress: &Progress,
    work: impl Future<Output = T>,
) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(LOOK_EVERY) => {
                progress.set(allocated_bytes(file));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&version.to_be_bytes());
        bytes[24..32].copy_from_slice(&(10u64 << 30).to_be_bytes());
        bytes
    }

    #[test]
    fn a_plain_header_is_allowed() {
        for version in [2, 3] {
            let parsed = Header::parse(&header(version)).unwrap();
            assert_eq!(parsed.virtual_size, 10 << 30);
            parsed.check_allowed(false).unwrap();
        }
    }

    #[test]
    fn other_files_are_read_only_when_allowed() {
        let mut backing = header(3);
        backing[15] = 1;
        let mut data = header(3);
        data[79] = 4;
        for bytes in [backing, data] {
            let parsed = Header::parse(&bytes).unwrap();
            assert_eq!(parsed.check_allowed(false).unwrap_err().exit, Exit::Usage);
            parsed.check_allowed(true).unwrap();
        }
        // Version 2 has no features: what is there belongs to an extension.
        let mut old = header(2);
        old[79] = 4;
        assert!(!Header::parse(&old).unwrap().has_data_file);
    }

    #[test]
    fn encrypted_files_are_refused() {
        let mut bytes = header(3);
        bytes[35] = 2;
        let refusal = Header::parse(&bytes).unwrap().check_allowed(true).unwrap_err();
        assert!(refusal.message.contains("qemu-img convert"));
    }

    #[test]
    fn extents_parse_in_every_position_of_the_array() {
        for line in [
            r#"[{ "start": 0, "length": 10, "depth": 0, "present": true, "zero": false, "data": true, "compressed": false, "offset": 327680},"#,
            r#"{ "start": 0, "length": 10, "depth": 0, "present": true, "zero": false, "data": true, "compressed": true}]"#,
        ] {
            assert_eq!(Extent::parse(line).unwrap().unwrap().length, 10);
        }
        assert!(Extent::parse("]").unwrap().is_none());
        assert!(Extent::parse("{").is_err());
    }

    proptest::proptest! {
        #[test]
        fn rubbish_never_panics(mut bytes in proptest::collection::vec(0u8..=255, 0..120), qcow2: bool) {
            if qcow2 && bytes.len() >= 8 {
                bytes[..8].copy_from_slice(&header(3)[..8]);
            }
            let _ = Header::parse(&bytes).map(|header| header.check_allowed(false));
        }
    }
}
