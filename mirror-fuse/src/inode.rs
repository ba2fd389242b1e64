//! Inode numbers of the mount. They are computed, not handed out: a file has the same number for
//! as long as it exists, over restarts too, and nothing has to be remembered for the kernel.
//!
//! ```text
//! bits 63-62  00: the directories below   01: a disk, by its name   10: an image and what is in it
//! image:      bits 61-29 the image's id   bits 28-0  0: its directory, all ones: `latest.raw`,
//!                                                    otherwise the number of the snapshot
//! ```

use blobcr_proto::Hash;

/// MOUNT.
pub(crate) const ROOT: u64 = 1;
/// MOUNT/images.
pub(crate) const IMAGES: u64 = 2;
/// MOUNT/disks.
pub(crate) const DISKS: u64 = 3;

const KIND_SHIFT: u32 = 62;
const DISK: u64 = 1;
const IMAGE: u64 = 2;
const NUMBER_BITS: u32 = 29;
const NUMBER_MASK: u64 = (1 << NUMBER_BITS) - 1;
const ID_MAX: u64 = (1 << (KIND_SHIFT - NUMBER_BITS)) - 1;

/// What an inode number stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inode {
    Root,
    Images,
    Disks,
    /// Found in the registry by the number itself.
    Disk,
    Image {
        id: u64,
    },
    Latest {
        id: u64,
    },
    Snapshot {
        id: u64,
        number: u64,
    },
}

impl Inode {
    pub(crate) fn of(ino: u64) -> Option<Self> {
        let id = (ino >> NUMBER_BITS) & ID_MAX;
        Some(match (ino >> KIND_SHIFT, ino & NUMBER_MASK) {
            (0, ROOT) => Self::Root,
            (0, IMAGES) => Self::Images,
            (0, DISKS) => Self::Disks,
            (DISK, _) => Self::Disk,
            (IMAGE, 0) => Self::Image { id },
            (IMAGE, NUMBER_MASK) => Self::Latest { id },
            (IMAGE, number) => Self::Snapshot { id, number },
            _ => return None,
        })
    }
}

/// Of a disk's file.
pub(crate) fn of_disk(name: &str) -> u64 {
    (DISK << KIND_SHIFT) | (Hash::of(name.as_bytes()).prefix() >> 2)
}

fn of_image(id: u64, number: u64) -> Option<u64> {
    (id <= ID_MAX).then_some((IMAGE << KIND_SHIFT) | (id << NUMBER_BITS) | number)
}

/// Of an image's directory. `None` for an id that no service will ever reach.
pub(crate) fn of_image_dir(id: u64) -> Option<u64> {
    of_image(id, 0)
}

/// Of an image's `latest.raw`.
pub(crate) fn of_latest(id: u64) -> Option<u64> {
    of_image(id, NUMBER_MASK)
}

/// Of a snapshot's file.
pub(crate) fn of_snapshot(id: u64, number: u64) -> Option<u64> {
    (number > 0 && number < NUMBER_MASK).then(|| of_image(id, number)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_number_leads_back_to_its_file(id in 0..=ID_MAX, number in 1..NUMBER_MASK) {
            prop_assert_eq!(Inode::of(of_image_dir(id).unwrap()), Some(Inode::Image { id }));
            prop_assert_eq!(Inode::of(of_latest(id).unwrap()), Some(Inode::Latest { id }));
            let snapshot = of_snapshot(id, number).unwrap();
            prop_assert_eq!(Inode::of(snapshot), Some(Inode::Snapshot { id, number }));
        }

        #[test]
        fn any_number_is_taken_apart_without_harm(ino: u64) {
            let _ = Inode::of(ino);
        }

        #[test]
        fn disks_are_apart_from_all_else(name in "[a-z0-9]{1,20}") {
            prop_assert_eq!(Inode::of(of_disk(&name)), Some(Inode::Disk));
        }
    }

    #[test]
    fn what_does_not_fit_has_no_number() {
        assert_eq!(of_snapshot(1, 0), None);
        assert_eq!(of_snapshot(1, NUMBER_MASK), None);
        assert_eq!(of_image_dir(ID_MAX + 1), None);
        assert_eq!(Inode::of(ROOT), Some(Inode::Root));
        assert_eq!(Inode::of(0), None);
        assert_eq!(Inode::of(4), None);
        assert_eq!(Inode::of(u64::MAX), None);
    }
}
