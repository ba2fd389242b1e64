//! The library through which every part reads and writes the repository.
//!
//! | module | holds |
//! |---|---|
//! | [`catalog`], [`store`] | what a repository is made of: the mutable facts, and content-addressed objects |
//! | [`tree`] | the segment tree: which chunk is where in a disk |
//! | [`repository`] | [`Repository`], the way in |
//! | [`client`] | both over gRPC: failover, placement, replicas |
//! | [`compression`], [`stripe`], [`placement`] | what is sent, and to which nodes |
//! | [`persist`](mod@persist) | makes a snapshot's bytes durable |
//! | [`mod@import`], [`reader`], [`mod@verify`] | a new image from a disk; any bytes of a snapshot; whether it is whole |
//! | [`lease`] | a writer's lease, kept alive |
//! | [`testing`] | both in memory, with faults on demand (feature `testing`) |

pub mod catalog;
pub mod client;
pub mod clock;
pub mod compression;
pub mod cpu;
pub mod import;
pub mod lease;
pub mod nodes;
pub mod persist;
pub mod placement;
pub mod reader;
pub mod repository;
pub mod source;
pub mod store;
pub mod stripe;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tree;
pub mod verify;
pub mod zero;

pub use catalog::{Catalog, CatalogError};
pub use client::ConnectOptions;
pub use import::{ImportError, NewImage, SparseSource, import};
pub use lease::{LEASE_TTL, LeaseKeeper};
pub use persist::{
    Bandwidth, PersistError, PersistJob, PersistLimits, Persisted, Progress, persist,
};
pub use reader::{ReadError, SnapshotReader};
pub use repository::{PoolOpener, Repository};
pub use source::{ChunkSource, Identified, SourceError};
pub use store::{Object, ObjectStore, StoreError, Stored};
pub use verify::{Damage, Verification, verify};
pub use zero::is_zero;
