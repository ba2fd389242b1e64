//! The ioctls of a disk, as bytes. `guest/include/blobcr.h` defines them; a test compiles that
//! header and compares every number in here with it.
//!
//! All fields are in the byte order of the machine: an ioctl never leaves it.

use std::ops::Range;

use blobcr_proto::v1::SnapshotState;

/// The layout of all structures (`BLOBCR_ABI_VERSION`).
const ABI_VERSION: u32 = 1;
/// `BLOBCR_COMMIT_WAIT`.
const COMMIT_WAIT: u32 = 1;
/// `BLOBCR_IOC_MAGIC`.
const MAGIC: u32 = 0xBC;

/// Where the fields lie that all structures share.
mod common {
    use super::Range;
    pub(super) const VERSION: Range<usize> = 0..4;
    pub(super) const SIZE: Range<usize> = 4..8;
    pub(super) const FLAGS: Range<usize> = 8..12;
    pub(super) const STATE: Range<usize> = 12..16;
}

mod clone {
    use super::Range;
    pub(super) const RESERVED: Range<usize> = 12..16;
    pub(super) const IMAGE_ID: Range<usize> = 16..24;
    pub(super) const IMAGE: Range<usize> = 24..160;
    pub(super) const LEN: usize = 160;
}

mod commit {
    use super::Range;
    pub(super) const TIMEOUT_MS: Range<usize> = 16..24;
    pub(super) const NUMBER: Range<usize> = 24..32;
    pub(super) const IMAGE_ID: Range<usize> = 32..40;
    pub(super) const DIRTY_BYTES: Range<usize> = 40..48;
    pub(super) const DOWNTIME_NS: Range<usize> = 48..56;
    pub(super) const IMAGE: Range<usize> = 56..192;
    pub(super) const LEN: usize = 192;
}

mod status {
    use super::Range;
    pub(super) const NUMBER: Range<usize> = 16..24;
    pub(super) const IMAGE_ID: Range<usize> = 24..32;
    pub(super) const LAST_STABLE: Range<usize> = 32..40;
    pub(super) const PENDING: Range<usize> = 40..48;
    pub(super) const DISK_BYTES: Range<usize> = 48..56;
    pub(super) const DIRTY_BYTES: Range<usize> = 56..64;
    pub(super) const LOCAL_BYTES: Range<usize> = 64..72;
    pub(super) const IMAGE: Range<usize> = 72..208;
    pub(super) const REASON: Range<usize> = 208..448;
    pub(super) const LEN: usize = 448;
}

/// `_IOWR(MAGIC, number, len)`: direction in the upper two bits, then 14 bits of length.
const fn request_number(number: u32, len: usize) -> u32 {
    (3 << 30) | ((len as u32) << 16) | (MAGIC << 8) | number
}

/// `BLOBCR_IOC_CLONE`.
pub const CLONE: u32 = request_number(1, clone::LEN);
/// `BLOBCR_IOC_COMMIT`.
pub const COMMIT: u32 = request_number(2, commit::LEN);
/// `BLOBCR_IOC_STATUS`.
pub const STATUS: u32 = request_number(3, status::LEN);

/// What a caller asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Make the checkpoint image, and tell which it is.
    Clone,
    /// Make a snapshot.
    Commit {
        /// Milliseconds to wait until it is stable (0: as long as the mirror likes); `None`: do
        /// not wait.
        wait_ms: Option<u64>,
    },
    /// Tell the state of a snapshot and of the disk.
    Status {
        /// 0: the newest stable one.
        number: u64,
    },
}

/// Why a request is not one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Another kind of ioctl: `ENOTTY`.
    Unknown,
    /// A version, size or flag that is not known here: `EINVAL`.
    Malformed,
}

/// The answer to [`Request::Clone`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloneReply<'a> {
    /// Never reused.
    pub image_id: u64,
    /// Name of the checkpoint image.
    pub image: &'a str,
}

/// The answer to [`Request::Commit`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitReply<'a> {
    /// When the call returned.
    pub state: SnapshotState,
    /// Of the snapshot.
    pub number: u64,
    /// Of the checkpoint image.
    pub image_id: u64,
    /// Changed since the commit before.
    pub dirty_bytes: u64,
    /// How long the commit held the disk.
    pub downtime_ns: u64,
    /// Name of the checkpoint image.
    pub image: &'a str,
}

/// The answer to [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusReply<'a> {
    /// Of snapshot `number`.
    pub state: SnapshotState,
    /// The snapshot that was asked about.
    pub number: u64,
    /// 0 before the first clone.
    pub image_id: u64,
    /// 0 before the first.
    pub last_stable: u64,
    /// Snapshots being persisted.
    pub pending: u64,
    /// Size of the disk.
    pub disk_bytes: u64,
    /// Changed since the last commit.
    pub dirty_bytes: u64,
    /// Written here and kept here.
    pub local_bytes: u64,
    /// Empty before the first clone.
    pub image: &'a str,
    /// Why nothing moves just now.
    pub reason: &'a str,
}

fn number<const N: usize>(input: &[u8], at: Range<usize>) -> Result<[u8; N], Refusal> {
    input.get(at).and_then(|bytes| bytes.try_into().ok()).ok_or(Refusal::Malformed)
}

fn u32_at(input: &[u8], at: Range<usize>) -> Result<u32, Refusal> {
    number(input, at).map(u32::from_ne_bytes)
}

fn u64_at(input: &[u8], at: Range<usize>) -> Result<u64, Refusal> {
    number(input, at).map(u64::from_ne_bytes)
}

impl Request {
    /// Reads the request number and the caller's structure.
    ///
    /// # Errors
    /// When it is none of ours, or malformed.
    pub fn parse(command: u32, input: &[u8]) -> Result<Self, Refusal> {
        let len = match command {
            CLONE => clone::LEN,
            COMMIT => commit::LEN,
            STATUS => status::LEN,
            _ => return Err(Refusal::Unknown),
        };
        let version = u32_at(input, common::VERSION)?;
        let size = u32_at(input, common::SIZE)?;
        if input.len() != len || size as usize != len || version != ABI_VERSION {
            return Err(Refusal::Malformed);
        }
        let flags = u32_at(input, common::FLAGS)?;
        match (command, flags) {
            (CLONE, 0) if u32_at(input, clone::RESERVED)? == 0 => Ok(Self::Clone),
            (COMMIT, 0) => Ok(Self::Commit { wait_ms: None }),
            (COMMIT, COMMIT_WAIT) => {
                Ok(Self::Commit { wait_ms: Some(u64_at(input, commit::TIMEOUT_MS)?) })
            }
            (STATUS, 0) => Ok(Self::Status { number: u64_at(input, status::NUMBER)? }),
            _ => Err(Refusal::Malformed),
        }
    }
}

struct Structure<const LEN: usize>([u8; LEN]);

impl<const LEN: usize> Structure<LEN> {
    fn new() -> Self {
        let mut structure = Self([0; LEN]);
        structure.u32(common::VERSION, ABI_VERSION);
        structure.u32(common::SIZE, LEN as u32);
        structure
    }

    fn u32(&mut self, at: Range<usize>, value: u32) {
        self.0[at].copy_from_slice(&value.to_ne_bytes());
    }

    fn u64(&mut self, at: Range<usize>, value: u64) {
        self.0[at].copy_from_slice(&value.to_ne_bytes());
    }

    /// Cuts a text that is too long at a character, and leaves a NUL at its end.
    fn text(&mut self, at: Range<usize>, text: &str) {
        let mut len = text.len().min(at.len() - 1);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        self.0[at.start..at.start + len].copy_from_slice(&text.as_bytes()[..len]);
    }
}

impl CloneReply<'_> {
    /// `struct blobcr_clone`.
    #[must_use]
    pub fn encode(&self) -> [u8; clone::LEN] {
        let mut out = Structure::<{ clone::LEN }>::new();
        out.u64(clone::IMAGE_ID, self.image_id);
        out.text(clone::IMAGE, self.image);
        out.0
    }
}

impl CommitReply<'_> {
    /// `struct blobcr_commit`.
    #[must_use]
    pub fn encode(&self) -> [u8; commit::LEN] {
        let mut out = Structure::<{ commit::LEN }>::new();
        out.u32(common::STATE, self.state as u32);
        out.u64(commit::NUMBER, self.number);
        out.u64(commit::IMAGE_ID, self.image_id);
        out.u64(commit::DIRTY_BYTES, self.dirty_bytes);
        out.u64(commit::DOWNTIME_NS, self.downtime_ns);
        out.text(commit::IMAGE, self.image);
        out.0
    }
}

impl StatusReply<'_> {
    /// `struct blobcr_status`.
    #[must_use]
    pub fn encode(&self) -> [u8; status::LEN] {
        let mut out = Structure::<{ status::LEN }>::new();
        out.u32(common::STATE, self.state as u32);
        out.u64(status::NUMBER, self.number);
        out.u64(status::IMAGE_ID, self.image_id);
        out.u64(status::LAST_STABLE, self.last_stable);
        out.u64(status::PENDING, self.pending);
        out.u64(status::DISK_BYTES, self.disk_bytes);
        out.u64(status::DIRTY_BYTES, self.dirty_bytes);
        out.u64(status::LOCAL_BYTES, self.local_bytes);
        out.text(status::IMAGE, self.image);
        out.text(status::REASON, self.reason);
        out.0
    }
}

#[cfg(test)]
mod tests;
