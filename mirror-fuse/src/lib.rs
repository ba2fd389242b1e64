//! The local mirror of a snapshot, and the file system that serves it to a hypervisor.
//!
//! | module | holds |
//! |---|---|
//! | [`disk`] | the local mirror: a writable disk over a snapshot; knows nothing of FUSE |
//! | [`base`] | the read-only bytes of snapshots |
//! | [`prefetch`] | fetching ahead what an earlier guest read |
//! | [`cache`] | the clean chunks of a host, shared by all its disks |
//! | [`host`] | the mirror of one host: attach, detach, checkpoint, start and stop |
//! | [`host_service`] | the same as a gRPC service |
//! | [`upstream`] | the repository as the disks see it |
//! | [`ioctl`] | CLONE, COMMIT and STATUS of a disk, as bytes |
//! | [`mount`] | the mount point: is it fit, and how to get rid of a mount |
//! | `fuse` | the front end; the only file that names the fuser crate |
//! | `file`, `listing` | what system calls on files and directories of the mount do |
//! | `view`, `images`, `registry`, `inode` | the tree of the mount |
//! | `background` | the threads that persist |
//! | `identity` | whose a mirror's directory is |

mod background;
pub mod base;
pub mod cache;
pub mod disk;
mod file;
mod fuse;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod halt_polling;
pub mod host;
pub mod host_service;
mod identity;
mod images;
mod inode;
pub mod ioctl;
mod listing;
pub mod mount;
pub mod prefetch;
mod registry;
mod ring;
pub mod upstream;
mod view;
mod waiting;

pub use background::Background;
pub use host::{Host, HostError, HostOptions};
pub use identity::DirectoryError;
