//! The library through which every part reads and writes the repository.
//!
//! | module | holds |
//! |---|---|
//! | [`catalog`], [`store`] | what a repository is made of: the mutable facts, and content-addressed objects |
//! | [`tree`] | the segment tree: which chunk is where in a disk |
//! | [`repository`] | [`Repository`], the way in |
//! | [`client`] | both over gRPC: failover, placement, replicas |
//! | [`compression`], [`placement`] | what is sent, and to which nodes |
//! | [`persist`](mod@persist) | makes a snapshot's bytes durable |
//! | [`lease`] | a writer's lease, kept alive |
//! | [`testing`] | both in memory, with faults on demand (feature `testing`) |

pub mod catalog;
pub mod client;
pub mod clock;
pub mod compression;
mod cpu;
pub mod lease;
pub mod nodes;
pub mod persist;
pub mod placement;
pub mod repository;
pub mod source;
pub mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tree;
pub mod zero;

pub use catalog::{Catalog, CatalogError};
pub use client::ConnectOptions;
pub use lease::{LEASE_TTL, LeaseKeeper};
pub use persist::{
    Bandwidth, PersistError, PersistJob, PersistLimits, Persisted, Progress, persist,
};
pub use repository::{PoolOpener, Repository};
pub use source::{ChunkSource, SourceError};
pub use store::{Object, ObjectStore, StoreError, Stored};
pub use zero::is_zero;
