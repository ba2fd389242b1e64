//! The file system's front end. This is the only file that names the fuser crate: every minor
//! release of it changes its interface, and one day another transport may take its place.
//!
//! What is on this host is answered on the thread that took the request; a request that may wait
//! goes to the runtime and takes its reply along. A reply that is dropped answers EIO.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use fuser::{
    AccessFlags, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, MountOption,
    Notifier, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL, SessionUnmounter, TimeOrNow,
    WriteFlags,
};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::file::{Handles, OpenFile, TryRead, TryWrite, ZeroRange};
use crate::inode::{self, Inode};
use crate::ioctl;
use crate::listing::Directory;
use crate::mount::{self, MountError};
use crate::view::{Attributes, Kind, Listed, NAME_TTL, View};
use crate::waiting::Waiting;

/// Bytes of one read or write: as much as the kernel sends unless told otherwise.
const TRANSFER_BYTES_MAX: u32 = 1 << 20;
/// Requests that the kernel keeps under way for asynchronous I/O: several guests at queue depth 64.
const BACKGROUND_MAX: u16 = 256;
/// How long the threads of the mount may take to end once nothing is mounted any more.
const END_MAX: Duration = Duration::from_secs(5);
/// How often that is looked at.
const END_POLL: Duration = Duration::from_millis(1);

/// How a mount is set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrontOptions {
    pub(crate) threads: usize,
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

/// Disks are attached and detached, and images imported and removed, by commands only.
fn refusal(parent: INodeNo) -> Errno {
    if parent.0 == inode::DISKS { Errno::EPERM } else { Errno::EROFS }
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
/// `lseek`'s whence.
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

impl Front {
    pub(crate) fn new(
        view: Arc<View>,
        runtime: Handle,
        host_dir: File,
        options: FrontOptions,
    ) -> Self {
        let (files, directories) = (Arc::default(), Handles::default());
        Self { view, runtime, files, directories, waiting: Waiting::new(options.threads), host_dir }
    }

    fn file(&self, handle: FileHandle) -> Result<Arc<OpenFile>, rustix::io::Errno> {
        self.files.get(handle.0)
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

    fn write_file(&self, file: Arc<OpenFile>, offset: u64, data: &[u8], reply: ReplyWrite) {
        match file.try_write(offset, data) {
            Err(error) => reply.error(errno(error)),
            Ok(TryWrite::Done(written)) => reply.written(written as u32),
            Ok(TryWrite::Later { done, total }) => {
                let rest = Bytes::copy_from_slice(&data[done..total]);
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
            Ok(Some(answer)) => reply.ioctl(0, &answer),
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

impl Filesystem for Front {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for capability in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
        ] {
            // One by one: of several, none is added when the kernel lacks one.
            if config.add_capabilities(capability).is_err() {
                tracing::info!(?capability, "this kernel's FUSE cannot do it; going on without");
            }
        }
        let refused = |nearest| io::Error::other(format!("the nearest that fits is {nearest}"));
        config.set_max_write(TRANSFER_BYTES_MAX).map_err(refused)?;
        config.set_max_background(BACKGROUND_MAX).map_err(|nearest| refused(nearest.into()))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(name) = name.to_str() else { return reply.error(Errno::ENOENT) };
        if let Some(known) = self.view.lookup_local(parent.0, name) {
            return answer_entry(reply, known);
        }
        let (view, name) = (Arc::clone(&self.view), name.to_owned());
        self.runtime.spawn(async move { answer_entry(reply, view.lookup(parent.0, &name).await) });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if let Some(known) = self.view.attributes_local(ino.0) {
            return answer_attr(reply, known);
        }
        let view = Arc::clone(&self.view);
        self.runtime.spawn(async move { answer_attr(reply, view.attributes_of(ino.0).await) });
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(served) = self.view.disks.by_ino(ino.0) else { return reply.error(Errno::EROFS) };
        let now = served.disk.size_bytes();
        if size.is_some_and(|size| size != now) {
            tracing::info!(
                disk = served.disk.name(),
                "a disk cannot be resized while it is attached; attach it with the size you want"
            );
            return reply.error(Errno::EPERM);
        }
        served.change_access(|access| {
            access.mode = mode.map_or(access.mode, |mode| mode & 0o777);
            access.uid = uid.unwrap_or(access.uid);
            access.gid = gid.unwrap_or(access.gid);
        });
        answer_attr(reply, Ok(View::disk_attributes(&served)));
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let view = Arc::clone(&self.view);
        self.runtime.spawn(async move {
            match view.read_link(ino.0).await {
                Ok(target) => reply.data(target.as_bytes()),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if matches!(Inode::of(ino.0), Some(Inode::Disk)) {
            return self.open_disk(ino.0, reply);
        }
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        let (view, files) = (Arc::clone(&self.view), Arc::clone(&self.files));
        self.runtime.spawn(async move {
            match view.open_snapshot(ino.0).await {
                Ok(image) => {
                    let handle = files.insert(OpenFile::Image(image));
                    reply.opened(FileHandle(handle), IMAGE_FLAGS);
                }
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.file(handle) {
            Ok(file) => guarded(|| self.read_file(file, offset, size as usize, reply)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.file(handle) {
            Ok(file) => guarded(|| self.write_file(file, offset, data, reply)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Every write was answered already: closing a file promises nothing more.
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files.remove(handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        let file = match self.file(handle) {
            Ok(file) => file,
            Err(error) => return reply.error(errno(error)),
        };
        match self.waiting.permit() {
            Some(_permit) => guarded(|| answer_empty(reply, file.flush())),
            None => drop(self.runtime.spawn_blocking(move || answer_empty(reply, file.flush()))),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let file = self.file(handle).and_then(|file| {
            Ok((ZeroRange::of(mode as u32, offset, length, file.size_bytes())?, file))
        });
        match file {
            Ok((range, file)) => guarded(|| self.zero_file(file, range, reply)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let data = match whence {
            SEEK_DATA => true,
            SEEK_HOLE => false,
            _ => return reply.error(Errno::EINVAL),
        };
        let (Ok(file), Ok(offset)) = (self.file(handle), u64::try_from(offset)) else {
            return reply.error(Errno::ENXIO);
        };
        self.runtime.spawn(async move {
            match file.seek(offset, data).await {
                Ok(found) => reply.offset(found as i64),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: IoctlFlags,
        command: u32,
        input: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        let request = match ioctl::Request::parse(command, input) {
            Ok(request) => request,
            Err(ioctl::Refusal::Unknown) => return reply.error(Errno::ENOTTY),
            Err(ioctl::Refusal::Malformed) => return reply.error(Errno::EINVAL),
        };
        match self.file(handle) {
            Ok(file) => guarded(|| self.control_file(file, request, reply)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let handle = self.directories.insert(Directory::new(ino.0));
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.list(handle, offset, move |listed| match listed {
            Err(error) => reply.error(errno(error)),
            Ok(listed) => {
                for (next, Listed { name, attributes }) in listed {
                    let kind = file_type(attributes.kind);
                    if reply.add(INodeNo(attributes.ino), next, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
        });
    }

    fn readdirplus(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.list(handle, offset, move |listed| match listed {
            Err(error) => reply.error(errno(error)),
            Ok(listed) => {
                for (next, Listed { name, attributes }) in listed {
                    let generation = Generation(attributes.generation);
                    let attr = file_attr(&attributes);
                    if reply.add(attr.ino, next, name, &NAME_TTL, &attr, generation) {
                        break;
                    }
                }
                reply.ok();
            }
        });
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.directories.remove(handle.0);
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match rustix::fs::fstatvfs(&self.host_dir) {
            Ok(stat) => reply.statfs(
                stat.f_blocks,
                stat.f_bfree,
                stat.f_bavail,
                stat.f_files,
                stat.f_ffree,
                stat.f_bsize as u32,
                255,
                stat.f_frsize as u32,
            ),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks permissions itself.
        reply.ok();
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(refusal(parent));
    }

    fn mknod(
        &self,
        _: &Request,
        parent: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        reply.error(refusal(parent));
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(refusal(parent));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(refusal(parent));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(refusal(parent));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(refusal(parent));
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        // Told once, the kernel does not ask again.
        reply.error(Errno::ENOSYS);
    }
}

/// A [`Front`] that is mounted. Dropping it unmounts.
#[derive(Debug)]
pub(crate) struct Mounted {
    point: PathBuf,
    unmounter: SessionUnmounter,
    notifier: Notifier,
    /// Set when the threads of the mount have ended.
    ended: watch::Receiver<bool>,
    unmounted: bool,
}

/// Mounts at `point`, which [`mount::prepare`] has found fit.
pub(crate) fn mount(
    front: Front,
    point: &Path,
    options: FrontOptions,
) -> Result<Mounted, MountError> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(mount::SOURCE.to_owned()),
        MountOption::Subtype(mount::SOURCE.to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoAtime,
    ];
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    let refused = |source: io::Error| match source.kind() {
        io::ErrorKind::PermissionDenied if options.allow_other => MountError::AllowOther,
        _ => MountError::Refused { point: point.to_owned(), source },
    };
    let mut session = Session::new(front, point, &config).map_err(refused)?;
    let (unmounter, notifier) = (session.unmount_callable(), session.notifier());
    let (end, ended) = watch::channel(false);
    let serve = move || {
        if let Err(error) = session.run() {
            tracing::error!(%error, "the mount has ended");
        }
        end.send_replace(true);
    };
    std::thread::Builder::new().name("mount".to_owned()).spawn(serve).map_err(refused)?;
    Ok(Mounted { point: point.to_owned(), unmounter, notifier, ended, unmounted: false })
}

impl Mounted {
    /// Set when nothing is mounted any more: by us, or by somebody else.
    pub(crate) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.clone()
    }

    /// Makes the kernel forget a name that is gone. Blocks.
    pub(crate) fn forget(&self, parent: u64, name: &str) {
        if let Err(error) = self.notifier.inval_entry(INodeNo(parent), OsStr::new(name)) {
            tracing::debug!(%error, name, "the kernel was not told that a name is gone");
        }
    }

    /// Takes the mount from the tree, even when files are open: where the system lets us, whoever has
    /// them gets errors from then on. Blocks. Does nothing the second time.
    pub(crate) fn unmount(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.unmounted, true) || *self.ended.borrow() {
            return Ok(());
        }
        let Err(error) = self.unmounter.unmount() else { return Ok(()) };
        let point = self.point.display();
        tracing::warn!(%error, %point, "the mount is in use; whoever uses it gets errors from now on");
        mount::detach(&self.point, true)
    }

    /// Blocks until no request is served any more, for some seconds at most. They may be too few
    /// when files are open and only root could have aborted what their owners wait for.
    pub(crate) fn wait_ended(&self) {
        let deadline = Instant::now() + END_MAX;
        while !*self.ended.borrow() {
            if Instant::now() > deadline {
                let point = self.point.display();
                tracing::warn!(%point, "files are still open; they end with this process");
                return;
            }
            std::thread::sleep(END_POLL);
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::error!(%error, point = %self.point.display(), "cannot be unmounted");
        }
        self.wait_ended();
    }
}
