//! The tree of MOUNT, whatever serves it:
//!
//! ```text
//! MOUNT/images/IMAGE/N.raw        each stable snapshot, read-only
//! MOUNT/images/IMAGE/latest.raw   → N.raw
//! MOUNT/disks/DISK.raw            the writable disks of this host
//! ```

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blobcr_proto::{ImageName, v1};
use rustix::io::Errno;

use crate::images::{ImageFile, Images};
use crate::inode::{self, Inode};
use crate::registry::{Access, Disks, Served};

/// Every file's name ends so.
const SUFFIX: &str = ".raw";
const LATEST: &str = "latest.raw";
/// How long the kernel may believe what it was told of a name. A disk that is detached is taken
/// from the kernel's cache at once; images and snapshots come and go on other hosts.
pub(crate) const NAME_TTL: Duration = Duration::from_secs(1);

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File,
    Link,
}

/// The attributes of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes {
    pub(crate) ino: u64,
    pub(crate) kind: Kind,
    pub(crate) size: u64,
    pub(crate) blocks: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) modified: SystemTime,
    pub(crate) nlink: u32,
    /// Tells the kernel two files apart that had the same name and number one after the other.
    pub(crate) generation: u64,
}

/// A name in a directory.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) attributes: Attributes,
}

/// Where the listing of a directory goes on.
#[derive(Clone, Debug)]
pub(crate) enum Cursor {
    Start,
    AfterImage(String),
    AfterSnapshot(u64),
    End,
}

/// The tree.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) disks: Arc<Disks>,
    pub(crate) images: Images,
    /// Who owns everything but the disks.
    owner: (u32, u32),
    mounted: SystemTime,
}

fn from_ms(unix_ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(unix_ms)
}

impl View {
    pub(crate) fn new(disks: Arc<Disks>, images: Images) -> Self {
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { disks, images, owner, mounted: SystemTime::now() }
    }

    fn attributes(&self, ino: u64, kind: Kind, size: u64, modified: SystemTime) -> Attributes {
        let (mode, nlink) = match kind {
            Kind::Directory => (0o555, 2),
            Kind::File => (0o444, 1),
            Kind::Link => (0o777, 1),
        };
        let (uid, gid) = self.owner;
        let blocks = 0;
        Attributes { ino, kind, size, blocks, mode, uid, gid, modified, nlink, generation: 0 }
    }

    fn directory(&self, ino: u64) -> Attributes {
        self.attributes(ino, Kind::Directory, 0, self.mounted)
    }

    pub(crate) fn disk_attributes(served: &Served) -> Attributes {
        let Access { mode, uid, gid } = served.access();
        let size = served.disk.size_bytes();
        Attributes {
            ino: served.ino,
            kind: Kind::File,
            size,
            blocks: sparse_blocks(size),
            mode,
            uid,
            gid,
            modified: served.modified(),
            nlink: 1,
            generation: served.disk.spec().created_unix_ms,
        }
    }

    fn image_attributes(&self, image: &v1::Image) -> Option<Attributes> {
        let ino = inode::of_image_dir(image.id)?;
        Some(self.attributes(ino, Kind::Directory, 0, from_ms(image.created_unix_ms)))
    }

    fn latest_attributes(&self, image: &v1::Image) -> Option<Attributes> {
        let target = link_target(image)?;
        let ino = inode::of_latest(image.id)?;
        Some(self.attributes(ino, Kind::Link, target.len() as u64, from_ms(image.created_unix_ms)))
    }

    fn snapshot_attributes(&self, snapshot: &v1::Snapshot) -> Option<Attributes> {
        let ino = inode::of_snapshot(snapshot.image_id, snapshot.number)?;
        let size = snapshot.root.as_ref()?.size_bytes;
        let modified = from_ms(snapshot.stable_unix_ms.max(snapshot.created_unix_ms));
        let attributes = self.attributes(ino, Kind::File, size, modified);
        Some(Attributes { blocks: sparse_blocks(size), ..attributes })
    }

    /// What needs no question to the repository; `None` for what does.
    pub(crate) fn lookup_local(
        &self,
        parent: u64,
        name: &str,
    ) -> Option<Result<Attributes, Errno>> {
        match (Inode::of(parent)?, name) {
            (Inode::Root, "images") => Some(Ok(self.directory(inode::IMAGES))),
            (Inode::Root, "disks") => Some(Ok(self.directory(inode::DISKS))),
            (Inode::Root, _) => Some(Err(Errno::NOENT)),
            (Inode::Disks, name) => {
                let served = name.strip_suffix(SUFFIX).and_then(|disk| self.disks.served(disk));
                Some(served.map(|served| Self::disk_attributes(&served)).ok_or(Errno::NOENT))
            }
            (Inode::Images, name) => ImageName::new(name).is_err().then_some(Err(Errno::NOENT)),
            (Inode::Image { .. }, name) => {
                let known = name == LATEST || snapshot_number(name).is_some();
                (!known).then_some(Err(Errno::NOENT))
            }
            (Inode::Disk | Inode::Latest { .. } | Inode::Snapshot { .. }, _) => {
                Some(Err(Errno::NOTDIR))
            }
        }
    }

    /// The file of this name.
    pub(crate) async fn lookup(&self, parent: u64, name: &str) -> Result<Attributes, Errno> {
        if let Some(known) = self.lookup_local(parent, name) {
            return known;
        }
        let found = match Inode::of(parent) {
            Some(Inode::Images) => self.image_attributes(&self.images.by_name(name).await?),
            Some(Inode::Image { id }) if name == LATEST => {
                self.latest_attributes(&self.images.by_id(id).await?)
            }
            Some(Inode::Image { id }) => match snapshot_number(name) {
                Some(number) => self.snapshot_attributes(&self.images.snapshot(id, number).await?),
                None => None,
            },
            _ => None,
        };
        found.ok_or(Errno::NOENT)
    }

    /// Attributes that need no question to the repository; `None` for those that do.
    pub(crate) fn attributes_local(&self, ino: u64) -> Option<Result<Attributes, Errno>> {
        match Inode::of(ino) {
            None => Some(Err(Errno::NOENT)),
            Some(Inode::Root | Inode::Images | Inode::Disks) => Some(Ok(self.directory(ino))),
            Some(Inode::Disk) => {
                let served = self.disks.by_ino(ino);
                Some(served.map(|served| Self::disk_attributes(&served)).ok_or(Errno::NOENT))
            }
            Some(Inode::Image { .. } | Inode::Latest { .. }) => None,
            Some(Inode::Snapshot { id, number }) => {
                let known = self.images.known_snapshot(id, number)?;
                Some(self.snapshot_attributes(&known).ok_or(Errno::NOENT))
            }
        }
    }

    pub(crate) async fn attributes_of(&self, ino: u64) -> Result<Attributes, Errno> {
        if let Some(known) = self.attributes_local(ino) {
            return known;
        }
        let found = match Inode::of(ino) {
            Some(Inode::Image { id }) => self.image_attributes(&self.images.by_id(id).await?),
            Some(Inode::Latest { id }) => self.latest_attributes(&self.images.by_id(id).await?),
            Some(Inode::Snapshot { id, number }) => {
                self.snapshot_attributes(&self.images.snapshot(id, number).await?)
            }
            _ => None,
        };
        found.ok_or(Errno::NOENT)
    }

    /// Where `latest.raw` leads.
    pub(crate) async fn read_link(&self, ino: u64) -> Result<String, Errno> {
        let Some(Inode::Latest { id }) = Inode::of(ino) else { return Err(Errno::INVAL) };
        // Not from memory: who follows the link wants the newest one.
        link_target(&self.images.by_id_now(id).await?).ok_or(Errno::NOENT)
    }

    /// Opens a snapshot's file.
    pub(crate) async fn open_snapshot(&self, ino: u64) -> Result<Arc<ImageFile>, Errno> {
        match Inode::of(ino) {
            Some(Inode::Snapshot { id, number }) => self.images.open(id, number).await,
            Some(Inode::Root | Inode::Images | Inode::Disks | Inode::Image { .. }) => {
                Err(Errno::ISDIR)
            }
            _ => Err(Errno::NOENT),
        }
    }

    /// The next names of a directory, and where to go on. Never an empty page but at the end.
    pub(crate) async fn list(
        &self,
        ino: u64,
        from: &Cursor,
    ) -> Result<(Vec<Listed>, Cursor), Errno> {
        let listed = |name: &str, attributes| Listed { name: name.to_owned(), attributes };
        match (Inode::of(ino), from) {
            (_, Cursor::End) => Ok((Vec::new(), Cursor::End)),
            (Some(Inode::Root), _) => {
                let all = vec![
                    listed("images", self.directory(inode::IMAGES)),
                    listed("disks", self.directory(inode::DISKS)),
                ];
                Ok((all, Cursor::End))
            }
            (Some(Inode::Disks), _) => {
                let all = self.disks.all_served().into_iter().map(|served| {
                    let name = format!("{}{SUFFIX}", served.disk.name());
                    Listed { name, attributes: Self::disk_attributes(&served) }
                });
                Ok((all.collect(), Cursor::End))
            }
            (Some(Inode::Images), from) => self.list_images(from).await,
            (Some(Inode::Image { id }), from) => self.list_snapshots(id, from).await,
            _ => Err(Errno::NOTDIR),
        }
    }

    async fn list_images(&self, from: &Cursor) -> Result<(Vec<Listed>, Cursor), Errno> {
        let after = if let Cursor::AfterImage(name) = from { name.as_str() } else { "" };
        let (images, more) = self.images.list(after).await?;
        let next = match images.last() {
            Some(last) if more => Cursor::AfterImage(last.name.clone()),
            _ => Cursor::End,
        };
        let listed = images.into_iter().filter_map(|image| {
            let attributes = self.image_attributes(&image)?;
            Some(Listed { name: image.name, attributes })
        });
        Ok((listed.collect(), next))
    }

    async fn list_snapshots(&self, id: u64, from: &Cursor) -> Result<(Vec<Listed>, Cursor), Errno> {
        let mut listed = Vec::new();
        let mut after = 0;
        if let Cursor::AfterSnapshot(number) = from {
            after = *number;
        } else {
            let image = self.images.by_id_now(id).await?;
            let latest = self.latest_attributes(&image);
            listed.extend(latest.map(|attributes| Listed { name: LATEST.to_owned(), attributes }));
        }
        let (snapshots, more) = self.images.list_snapshots(id, after).await?;
        let next = match snapshots.last() {
            Some(last) if more => Cursor::AfterSnapshot(last.number),
            _ => Cursor::End,
        };
        let stable =
            snapshots.iter().filter(|snapshot| snapshot.state() == v1::SnapshotState::Stable);
        listed.extend(stable.filter_map(|snapshot| {
            let attributes = self.snapshot_attributes(snapshot)?;
            Some(Listed { name: format!("{}{SUFFIX}", snapshot.number), attributes })
        }));
        Ok((listed, next))
    }
}

fn link_target(image: &v1::Image) -> Option<String> {
    (image.latest > 0).then(|| format!("{}{SUFFIX}", image.latest))
}

/// `7.raw` → 7; only as we would write it.
fn snapshot_number(name: &str) -> Option<u64> {
    let number = name.strip_suffix(SUFFIX)?.parse().ok().filter(|number| *number > 0)?;
    (format!("{number}{SUFFIX}") == name).then_some(number)
}

/// What `stat` says of the space of a file that may have holes: a little less than its size, so
/// that tools which copy sparse files look for the holes.
fn sparse_blocks(size: u64) -> u64 {
    const BLOCK: u64 = 512;
    (size / BLOCK).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_we_write_are_snapshots() {
        assert_eq!(snapshot_number("1.raw"), Some(1));
        assert_eq!(snapshot_number("18446744073709551615.raw"), Some(u64::MAX));
        for name in
            ["0.raw", "01.raw", "+1.raw", "1", ".raw", "1.raw.raw", "-1.raw", "1.RAW", "٣.raw"]
        {
            assert_eq!(snapshot_number(name), None, "{name}");
        }
    }
}
