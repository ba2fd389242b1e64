//! What the kernel asks, by kind of request.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::{
    Front, IMAGE_FLAGS, TRANSFER_BYTES_MAX, answer_attr, answer_empty, answer_entry, errno,
    file_attr, file_type, guarded,
};
use crate::file::{OpenFile, ZeroRange};
use crate::inode::{self, Inode};
use crate::ioctl;
use crate::listing::Directory;
use crate::view::{Listed, NAME_TTL, View};

/// Requests that the kernel keeps under way for asynchronous I/O: several guests at queue depth 64.
const BACKGROUND_MAX: u16 = 256;
/// `lseek`'s whence.
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

/// Disks are attached and detached, and images imported and removed, by commands only.
fn refusal(parent: INodeNo) -> Errno {
    if parent.0 == inode::DISKS { Errno::EPERM } else { Errno::EROFS }
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
            Ok(file) => self.serve(|| self.read_file(file, offset, size as usize, reply)),
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
            Ok(file) => {
                self.serve_then(|| self.write_file(&file, offset, data, reply), || file.written())
            }
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
            Some(permit) => self.serve(|| {
                answer_empty(reply, file.flush());
                drop(permit);
            }),
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
