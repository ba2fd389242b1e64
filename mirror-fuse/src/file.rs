//! What system calls on an open file of the mount do, whatever carries them here.
//!
//! Each call has a first form that answers at once from what is on this host, and a second one, for
//! the rest, that may wait for the network.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use blobcr_proto::v1::SnapshotState;
use bytes::Bytes;
use rustix::io::Errno;

use crate::disk::{
    Attempt, BaseError, CheckpointImage, ColdRead, Committed, DiskError, PersistOnDrop, QuickRead,
    Settled, UpstreamError, Zero,
};
use crate::images::ImageFile;
use crate::ioctl;
use crate::registry::OpenDisk;

/// `BLOBCR_COMMIT_WAIT` without a time, in the words of the header.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// Open files or directories by handle. Looking one up takes no lock; opening copies the table.
#[derive(Debug)]
pub(crate) struct Handles<T> {
    next: AtomicU64,
    open: ArcSwap<HashMap<u64, Arc<T>>>,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self { next: AtomicU64::new(1), open: ArcSwap::default() }
    }
}

impl<T> Handles<T> {
    pub(crate) fn insert(&self, value: T) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        let value = Arc::new(value);
        self.open.rcu(|open| {
            let mut open = HashMap::clone(open);
            open.insert(handle, Arc::clone(&value));
            open
        });
        handle
    }

    pub(crate) fn get(&self, handle: u64) -> Result<Arc<T>, Errno> {
        self.open.load().get(&handle).cloned().ok_or(Errno::BADF)
    }

    pub(crate) fn remove(&self, handle: u64) {
        self.open.rcu(|open| {
            let mut open = HashMap::clone(open);
            open.remove(&handle);
            open
        });
    }
}

/// An open file.
#[derive(Debug)]
pub(crate) enum OpenFile {
    Disk(OpenDisk),
    Image(Arc<ImageFile>),
}

/// Zeros asked for by `fallocate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ZeroRange {
    offset: u64,
    len: u64,
}

/// Tells the log of a failed call: once a second at most, for a guest may repeat it without end.
fn complain(what: &str, error: &dyn std::error::Error) {
    static LAST_SECOND: AtomicU64 = AtomicU64::new(0);
    static UNTOLD: AtomicU64 = AtomicU64::new(0);
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if LAST_SECOND.swap(since.as_secs(), Ordering::Relaxed) == since.as_secs() {
        UNTOLD.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let untold = UNTOLD.swap(0, Ordering::Relaxed);
    tracing::warn!(%error, untold, "{what}");
}

fn image_errno(image: &ImageFile, error: &BaseError) -> Errno {
    complain(&format!("snapshot {} cannot be read", image.name), error);
    Errno::IO
}

/// What the caller sees; the log has the rest.
fn disk_errno(error: &DiskError) -> Errno {
    complain("a call on a disk failed", error);
    match error {
        DiskError::OutOfRange { .. } | DiskError::Invalid { .. } => Errno::INVAL,
        DiskError::NoSpace { .. } => Errno::NOSPC,
        DiskError::NoSnapshot { .. } => Errno::NOENT,
        DiskError::Upstream { source: UpstreamError::Unavailable(_), .. } => Errno::HOSTUNREACH,
        DiskError::Stopped(_) => Errno::SHUTDOWN,
        _ => Errno::IO,
    }
}

impl ZeroRange {
    /// Reads the arguments of `fallocate` on a file of `size` bytes. Hypervisors discard with
    /// `PUNCH_HOLE | KEEP_SIZE` and write zeros with that or with `ZERO_RANGE`: both promise that
    /// every byte of the range reads as zero. Nothing can be reserved ahead, and no disk grows.
    pub(crate) fn of(mode: u32, offset: u64, len: u64, size: u64) -> Result<Self, Errno> {
        use rustix::fs::FallocateFlags;
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        let keep = FallocateFlags::KEEP_SIZE;
        let end = offset.checked_add(len).filter(|_| len > 0).ok_or(Errno::INVAL)?;
        match mode.difference(keep) {
            FallocateFlags::PUNCH_HOLE if mode.contains(keep) => {}
            FallocateFlags::ZERO_RANGE if end <= size || mode.contains(keep) => {}
            FallocateFlags::ZERO_RANGE => return Err(Errno::NOSPC),
            _ => return Err(Errno::OPNOTSUPP),
        }
        let offset = offset.min(size);
        Ok(Self { offset, len: end.min(size) - offset })
    }
}

impl OpenFile {
    pub(crate) fn size_bytes(&self) -> u64 {
        match self {
            Self::Disk(disk) => disk.disk.size_bytes(),
            Self::Image(image) => image.size_bytes(),
        }
    }

    /// The disk, for calls that only a disk takes.
    fn writable(&self) -> Result<&OpenDisk, Errno> {
        match self {
            Self::Disk(disk) => Ok(disk),
            Self::Image(_) => Err(Errno::ROFS),
        }
    }

    /// How many bytes from `offset` on are within the file, of `len`.
    fn clip(&self, offset: u64, len: usize) -> usize {
        self.size_bytes().saturating_sub(offset).min(len as u64) as usize
    }

    /// Reads into `out` what is in this host's memory.
    pub(crate) fn try_read(&self, offset: u64, out: &mut [u8]) -> Result<TryRead, Errno> {
        let len = self.clip(offset, out.len());
        if len == 0 {
            return Ok(TryRead::Done(0));
        }
        match self {
            Self::Image(image) => match image.try_read(offset, &mut out[..len]) {
                Ok(read) => Ok(read.map_or(TryRead::Later, TryRead::Done)),
                Err(error) => Err(image_errno(image, &error)),
            },
            Self::Disk(disk) => match disk.disk.quick_read(offset, &mut out[..len]) {
                Ok(QuickRead::Done) => Ok(TryRead::Done(len)),
                Ok(QuickRead::Cold(cold)) => Ok(TryRead::Cold(cold)),
                Ok(QuickRead::NeedsAsync) => Ok(TryRead::Later),
                Err(error) => Err(disk_errno(&error)),
            },
        }
    }

    pub(crate) async fn read(&self, offset: u64, len: usize) -> Result<Bytes, Errno> {
        let len = self.clip(offset, len);
        match self {
            Self::Image(image) => {
                image.read(offset, len).await.map_err(|error| image_errno(image, &error))
            }
            Self::Disk(disk) => {
                disk.disk.read(offset, len).await.map_err(|error| disk_errno(&error))
            }
        }
    }

    /// Writes `data`: how many bytes are done, which may be fewer where the file ends.
    /// `Err(Later)`: the rest, from `done` on, is for [`Self::write`].
    pub(crate) fn try_write(&self, offset: u64, data: &[u8]) -> Result<TryWrite, Errno> {
        let served = self.writable()?;
        let len = self.clip(offset, data.len());
        if len == 0 && !data.is_empty() {
            // As a block device answers behind its end.
            return Err(Errno::NOSPC);
        }
        served.touch();
        match served.disk.try_write(offset, &data[..len]) {
            Ok(Attempt::Done) => Ok(TryWrite::Done(len)),
            Ok(Attempt::NeedsAsync { done }) => {
                Ok(TryWrite::Later { done: done as usize, total: len })
            }
            // The cache may give way.
            Err(error) if is_full(&error) => Ok(TryWrite::Later { done: 0, total: len }),
            Err(error) => Err(disk_errno(&error)),
        }
    }

    /// What can be done after a write was answered, for what is likely to come next.
    pub(crate) fn written(&self) {
        if let Self::Disk(served) = self {
            served.disk.write_out_early();
        }
    }

    pub(crate) async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        let served = self.writable()?;
        loop {
            match served.disk.write(offset, data.clone()).await {
                Err(error) if made_room(served, &error).await => {}
                written => return written.map_err(|error| disk_errno(&error)),
            }
        }
    }

    /// Zeros a range; `None`: [`Self::zero`] must do the rest, which is returned.
    pub(crate) fn try_zero(&self, range: ZeroRange) -> Result<Option<ZeroRange>, Errno> {
        let served = self.writable()?;
        if range.len == 0 {
            return Ok(None);
        }
        served.touch();
        match served.disk.try_zero(range.offset, range.len, Zero::WriteZeroes) {
            Ok(Attempt::Done) => Ok(None),
            Ok(Attempt::NeedsAsync { done }) => {
                Ok(Some(ZeroRange { offset: range.offset + done, len: range.len - done }))
            }
            Err(error) if is_full(&error) => Ok(Some(range)),
            Err(error) => Err(disk_errno(&error)),
        }
    }

    pub(crate) async fn zero(&self, range: ZeroRange) -> Result<(), Errno> {
        let served = self.writable()?;
        loop {
            match served.disk.zero(range.offset, range.len, Zero::WriteZeroes).await {
                Err(error) if made_room(served, &error).await => {}
                zeroed => return zeroed.map_err(|error| disk_errno(&error)),
            }
        }
    }

    /// Blocks until what was written is durable.
    pub(crate) fn flush(&self) -> Result<(), Errno> {
        match self {
            Self::Image(_) => Ok(()),
            Self::Disk(served) => loop {
                match served.disk.flush() {
                    Err(error) if is_full(&error) && served.make_room() => {}
                    flushed => return flushed.map_err(|error| disk_errno(&error)),
                }
            },
        }
    }

    /// `lseek` to data or to a hole.
    pub(crate) async fn seek(&self, offset: u64, data: bool) -> Result<u64, Errno> {
        if offset >= self.size_bytes() {
            return Err(Errno::NXIO);
        }
        let found = match self {
            Self::Image(image) => {
                image.seek(offset, data).await.map_err(|error| image_errno(image, &error))?
            }
            Self::Disk(disk) if data => disk.disk.seek_data(offset),
            Self::Disk(disk) => Some(disk.disk.seek_hole(offset)),
        };
        found.ok_or(Errno::NXIO)
    }

    /// Answers an ioctl at once; `None`: [`Self::ioctl`] must.
    pub(crate) fn try_ioctl(&self, request: ioctl::Request) -> Result<Option<Answer>, Errno> {
        let Self::Disk(served) = self else { return Err(Errno::NOTTY) };
        match request {
            ioctl::Request::Commit { wait_ms: None } => match served.disk.try_commit_held() {
                Ok(Some((committed, persist))) => {
                    let bytes = commit_reply(&committed, SnapshotState::Pending);
                    Ok(Some(Answer { bytes, persist: Some(persist) }))
                }
                Ok(None) | Err(DiskError::NotCloned(_) | DiskError::NoSpace { .. }) => Ok(None),
                Err(error) => Err(disk_errno(&error)),
            },
            ioctl::Request::Clone => {
                let image = served.disk.checkpoint_image();
                Ok(image.map(|image| Answer { bytes: clone_reply(&image), persist: None }))
            }
            ioctl::Request::Commit { wait_ms: Some(_) } | ioctl::Request::Status { .. } => Ok(None),
        }
    }

    pub(crate) async fn ioctl(&self, request: ioctl::Request) -> Result<Vec<u8>, Errno> {
        let Self::Disk(served) = self else { return Err(Errno::NOTTY) };
        match request {
            ioctl::Request::Clone => {
                let image = served.disk.ensure_clone().await.map_err(|error| disk_errno(&error))?;
                Ok(clone_reply(&image))
            }
            ioctl::Request::Commit { wait_ms } => {
                let commit = loop {
                    match served.disk.commit().await {
                        Err(error) if made_room(served, &error).await => {}
                        made => break made.map_err(|error| disk_errno(&error))?,
                    }
                };
                let state = match wait_ms {
                    None => SnapshotState::Pending,
                    Some(ms) => wait(served, commit.number, ms).await?,
                };
                Ok(commit_reply(&commit, state))
            }
            ioctl::Request::Status { number } => status_reply(served, number).await,
        }
    }
}

/// To an ioctl.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) bytes: Vec<u8>,
    /// To be dropped once the answer is given.
    pub(crate) persist: Option<PersistOnDrop>,
}

/// How far [`OpenFile::try_read`] got.
#[derive(Debug)]
pub(crate) enum TryRead {
    /// So many bytes are read, up to the end of the file.
    Done(usize),
    /// A device has to be waited for.
    Cold(ColdRead),
    /// [`OpenFile::read`] must.
    Later,
}

/// How far [`OpenFile::try_write`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TryWrite {
    /// So many bytes are written, and no more fit.
    Done(usize),
    /// `done` of `total` bytes are written; the rest has to wait for something.
    Later { done: usize, total: usize },
}

const fn is_full(error: &DiskError) -> bool {
    matches!(error, DiskError::NoSpace { .. })
}

/// Whether it helps to try again what failed: the host was full, and the cache has given way.
async fn made_room(served: &OpenDisk, error: &DiskError) -> bool {
    let served = Arc::clone(served);
    is_full(error) && tokio::task::spawn_blocking(move || served.make_room()).await.unwrap_or(false)
}

async fn wait(served: &OpenDisk, number: u64, wait_ms: u64) -> Result<SnapshotState, Errno> {
    let limit = if wait_ms == 0 { WAIT_MAX } else { Duration::from_millis(wait_ms).min(WAIT_MAX) };
    match tokio::time::timeout(limit, served.disk.wait_stable(number)).await {
        Err(_) => Ok(SnapshotState::Pending),
        Ok(Ok(Settled::Stable)) => Ok(SnapshotState::Stable),
        Ok(Ok(Settled::Failed { .. })) => Ok(SnapshotState::Failed),
        Ok(Err(error)) => Err(disk_errno(&error)),
    }
}

fn clone_reply(image: &CheckpointImage) -> Vec<u8> {
    ioctl::CloneReply { image_id: image.id, image: &image.name }.encode().to_vec()
}

fn commit_reply(commit: &Committed, state: SnapshotState) -> Vec<u8> {
    let reply = ioctl::CommitReply {
        state,
        number: commit.number,
        image_id: commit.image_id,
        dirty_bytes: commit.dirty_bytes,
        downtime_ns: u64::try_from(commit.downtime.as_nanos()).unwrap_or(u64::MAX),
        image: &commit.image,
    };
    reply.encode().to_vec()
}

async fn status_reply(served: &OpenDisk, number: u64) -> Result<Vec<u8>, Errno> {
    let status = served.disk.status();
    let image = served.disk.checkpoint_image();
    let asked = if number == 0 { status.last_stable } else { number };
    let state = if asked == 0 {
        SnapshotState::Unspecified
    } else if status.pending.contains(&asked) {
        SnapshotState::Pending
    } else if asked == status.last_stable {
        SnapshotState::Stable
    } else {
        // It is settled, so nothing is waited for.
        wait(served, asked, 1).await?
    };
    let reply = ioctl::StatusReply {
        state,
        number: asked,
        image_id: image.as_ref().map_or(0, |image| image.id),
        last_stable: status.last_stable,
        pending: status.pending.len() as u64,
        disk_bytes: status.size_bytes,
        dirty_bytes: status.dirty_bytes,
        local_bytes: status.local_bytes,
        image: &status.checkpoint_image,
        reason: &status.stalled,
    };
    Ok(reply.encode().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUNCH: u32 = 0x03;
    const ZERO: u32 = 0x10;
    const ZERO_KEEP: u32 = 0x11;

    #[test]
    fn fallocate_zeros_and_discards_and_does_nothing_else() {
        let range = |mode, offset, len| ZeroRange::of(mode, offset, len, 1000);
        let zeroes = |offset, len| Ok(ZeroRange { offset, len });
        assert_eq!(range(PUNCH, 10, 20), zeroes(10, 20));
        assert_eq!(range(PUNCH, 900, 200), zeroes(900, 100));
        assert_eq!(range(PUNCH, 2000, 200), zeroes(1000, 0));
        assert_eq!(range(ZERO, 10, 20), zeroes(10, 20));
        assert_eq!(range(ZERO, 900, 100), zeroes(900, 100));
        assert_eq!(range(ZERO_KEEP, 900, 101), zeroes(900, 100));
        assert_eq!(range(ZERO, 900, 101), Err(Errno::NOSPC));
        assert_eq!(range(PUNCH, 10, 0), Err(Errno::INVAL));
        assert_eq!(range(PUNCH, u64::MAX, 2), Err(Errno::INVAL));
        // Reserve, reserve behind the end, collapse, insert, unshare, punch and grow, nonsense.
        for mode in [0, 1, 0x08, 0x20, 0x40, 0x02, 0x13, 1 << 31] {
            assert_eq!(range(mode, 10, 20), Err(Errno::OPNOTSUPP), "{mode:#x}");
        }
    }

    #[test]
    fn handles_are_found_until_they_are_removed() {
        let handles = Handles::default();
        let (a, b) = (handles.insert("a"), handles.insert("b"));
        assert_ne!(a, b);
        assert_eq!((*handles.get(a).unwrap(), *handles.get(b).unwrap()), ("a", "b"));
        handles.remove(a);
        assert_eq!(handles.get(a), Err(Errno::BADF));
        assert_eq!(*handles.get(b).unwrap(), "b");
        assert_ne!(handles.insert("c"), a, "a handle is not used again");
    }
}
