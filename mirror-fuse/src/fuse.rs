//! The file system's front end. Nothing but this module names the fuser crate: every minor release of
//! it changes its interface, and one day another transport may take its place.
//!
//! What is on this host is answered on the thread that took the request; a request that may wait
//! goes to the runtime and takes its reply along. A reply that is dropped answers EIO.

mod filesystem;
mod mounted;

use std::cell::RefCell;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyData,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyOpen, ReplyWrite,
};
pub(crate) use mounted::{Mounted, mount};
use tokio::runtime::Handle;

use crate::file::{Handles, OpenFile, TryRead, TryWrite, ZeroRange};
use crate::halt_polling::HaltPolling;
use crate::ioctl;
use crate::listing::Directory;
use crate::view::{Attributes, Kind, Listed, NAME_TTL, View};
use crate::waiting::Waiting;

/// Bytes of one read or write: as much as the kernel sends unless told otherwise.
const TRANSFER_BYTES_MAX: u32 = 1 << 20;

/// How a mount is set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrontOptions {
    pub(crate) threads: usize,
    pub(crate) halt_poll: Duration,
    pub(crate) allow_other: bool,
}

/// Serves a [`View`].
#[derive(Debug)]
pub(crate) struct Front {
    view: Arc<View>,
    runtime: Handle,
    files: Arc<Handles<OpenFile>>,
    directories: Handles<Directory>,
    waiting: Waiting,
    polling: Arc<HaltPolling>,
    /// Whose file system `statfs` tells of.
    host_dir: File,
}

thread_local! {
    /// Where a thread of the mount assembles what it reads.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_i32(errno.raw_os_error())
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
    }
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.size,
        blocks: attributes.blocks,
        atime: attributes.modified,
        mtime: attributes.modified,
        ctime: attributes.modified,
        crtime: attributes.modified,
        kind: file_type(attributes.kind),
        perm: (attributes.mode & 0o7777) as u16,
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// Runs the part of a request that is served at once. A fault in it must not end the thread, which
/// serves all disks: the request is answered with EIO, because its reply is dropped.
fn guarded(serve: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(serve)).is_err() {
        tracing::error!("a request failed by a fault of the mirror");
    }
}

fn answer_entry(reply: ReplyEntry, found: Result<Attributes, rustix::io::Errno>) {
    match found {
        Ok(found) => reply.entry(&NAME_TTL, &file_attr(&found), Generation(found.generation)),
        Err(error) => reply.error(errno(error)),
    }
}

fn answer_attr(reply: ReplyAttr, found: Result<Attributes, rustix::io::Errno>) {
    match found {
        Ok(found) => reply.attr(&NAME_TTL, &file_attr(&found)),
        Err(error) => reply.error(errno(error)),
    }
}

/// Reads what may need the network, or a device.
fn read_later(runtime: &Handle, file: Arc<OpenFile>, offset: u64, len: usize, reply: ReplyData) {
    runtime.spawn(async move {
        match file.read(offset, len).await {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(errno(error)),
        }
    });
}

fn answer_empty(reply: ReplyEmpty, done: Result<(), rustix::io::Errno>) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

/// Of an open disk: what is written must be in a COMMIT that follows, so the kernel keeps nothing
/// back, and hypervisors cache for themselves.
const DISK_FLAGS: FopenFlags =
    FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
/// Of an open snapshot: its bytes never change, so the kernel may keep them.
const IMAGE_FLAGS: FopenFlags = FopenFlags::FOPEN_KEEP_CACHE;
impl Front {
    pub(crate) fn new(
        view: Arc<View>,
        runtime: Handle,
        host_dir: File,
        options: FrontOptions,
    ) -> Self {
        let (files, directories) = (Arc::default(), Handles::default());
        let waiting = Waiting::new(options.threads);
        let polling = Arc::new(HaltPolling::new(options.halt_poll));
        Self { view, runtime, files, directories, waiting, polling, host_dir }
    }

    fn file(&self, handle: FileHandle) -> Result<Arc<OpenFile>, rustix::io::Errno> {
        self.files.get(handle.0)
    }

    /// Serves one of those requests that a guest makes again and again.
    fn serve(&self, serve: impl FnOnce()) {
        self.serve_then(serve, || {});
    }

    /// The same; `then` is done after it was answered.
    fn serve_then(&self, serve: impl FnOnce(), then: impl FnOnce()) {
        self.polling.serve(|| guarded(serve), || guarded(then));
    }

    fn open_disk(&self, ino: u64, reply: ReplyOpen) {
        let Some(served) = self.view.disks.by_ino(ino) else { return reply.error(Errno::ENOENT) };
        match served.open() {
            Some(open) => {
                let handle = self.files.insert(OpenFile::Disk(open));
                reply.opened(FileHandle(handle), DISK_FLAGS);
            }
            None => reply.error(Errno::EBUSY),
        }
    }

    fn read_file(&self, file: Arc<OpenFile>, offset: u64, len: usize, reply: ReplyData) {
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < len {
                buffer.resize(len.max(TRANSFER_BYTES_MAX as usize), 0);
            }
            match file.try_read(offset, &mut buffer[..len]) {
                Ok(TryRead::Done(read)) => reply.data(&buffer[..read]),
                Ok(TryRead::Later) => read_later(&self.runtime, file, offset, len, reply),
                Ok(TryRead::Cold(cold)) => {
                    let runtime = self.runtime.clone();
                    self.waiting.read(cold, buffer, move |read| match read {
                        Ok(bytes) => reply.data(bytes),
                        // Whatever it was, the other way fails with the right error.
                        Err(_) => read_later(&runtime, file, offset, len, reply),
                    });
                }
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn write_file(&self, file: &Arc<OpenFile>, offset: u64, data: &[u8], reply: ReplyWrite) {
        match file.try_write(offset, data) {
            Err(error) => reply.error(errno(error)),
            Ok(TryWrite::Done(written)) => reply.written(written as u32),
            Ok(TryWrite::Later { done, total }) => {
                let rest = Bytes::copy_from_slice(&data[done..total]);
                let file = Arc::clone(file);
                self.runtime.spawn(async move {
                    match file.write(offset + done as u64, rest).await {
                        Ok(()) => reply.written(total as u32),
                        Err(error) => reply.error(errno(error)),
                    }
                });
            }
        }
    }

    fn zero_file(&self, file: Arc<OpenFile>, range: ZeroRange, reply: ReplyEmpty) {
        match file.try_zero(range) {
            Err(error) => reply.error(errno(error)),
            Ok(None) => reply.ok(),
            Ok(Some(rest)) => {
                self.runtime.spawn(async move { answer_empty(reply, file.zero(rest).await) });
            }
        }
    }

    fn control_file(&self, file: Arc<OpenFile>, request: ioctl::Request, reply: ReplyIoctl) {
        match file.try_ioctl(request) {
            Err(error) => reply.error(errno(error)),
            Ok(Some(answer)) => {
                reply.ioctl(0, &answer.bytes);
                drop(answer.persist);
            }
            Ok(None) => {
                self.runtime.spawn(async move {
                    match file.ioctl(request).await {
                        Ok(answer) => reply.ioctl(0, &answer),
                        Err(error) => reply.error(errno(error)),
                    }
                });
            }
        }
    }

    /// Reads a directory and hands what there is to `answer`.
    fn list(
        &self,
        handle: FileHandle,
        offset: u64,
        answer: impl FnOnce(Result<Vec<(u64, Listed)>, rustix::io::Errno>) + Send + 'static,
    ) {
        let directory = match self.directories.get(handle.0) {
            Ok(directory) => directory,
            Err(error) => return answer(Err(error)),
        };
        let view = Arc::clone(&self.view);
        self.runtime.spawn(async move { answer(directory.read(&view, offset).await) });
    }
}
