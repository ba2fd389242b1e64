//! The local mirror of a snapshot, and the file system that serves it to a hypervisor.
//!
//! | module | holds |
//! |---|---|
//! | [`base`] | the read-only bytes of snapshots |
//! | [`cache`] | the clean chunks of a host, shared by all its disks |
//! | [`disk`] | the local mirror: a writable disk over a snapshot |
//! | [`ioctl`] | CLONE, COMMIT and STATUS of a disk, as bytes |

pub mod base;
pub mod cache;
pub mod disk;
pub mod ioctl;
