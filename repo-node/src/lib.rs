//! The chunk server: an append-only chunk store behind gRPC.
//!
//! | module | holds |
//! |---|---|
//! | [`store`] | [`ChunkStore`]: what others call |
//! | `format` | the files, byte for byte |
//! | `writer` | the one thread that appends: groups, syncs, a full disk, poison |
//! | `index` | where every record is, in memory |
//! | `recovery` | from files to an index at start, and what was found wrong |
//! | `compact` | winning back the room of what was deleted |
//! | `disk` | the file system, as a trait that tests replace |
//! | `stepper` | the work of the store's threads, for who decides when each step happens |
//! | `testing` | a disk that loses, tears, flips and fails (feature `testing`) |
//! | `service` | the gRPC service |
//!
//! *Invariants.* Only the writer's thread appends, changes the index and answers. The index never
//! points to what is not durable. The log is totally ordered: what comes later counts. Every copy of
//! a record that does not count is hidden by a tombstone that outlives it, or lies in a segment
//! that is known to be left over. Nothing is unlinked before what replaces it is durable.

mod compact;
mod core;
pub mod disk;
mod error;
mod format;
mod index;
mod options;
mod queue;
mod read;
mod recovery;
mod segments;
pub mod service;
mod stepper;
pub mod store;
mod tables;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod writer;

pub use compact::CompactionReport;
pub use error::{OpenError, StoreError};
pub use format::{FormatError, Key, StoreId};
pub use options::Options;
pub use queue::{DeleteOutcome, PutOutcome};
pub use recovery::{Finding, RecoveryReport};
pub use service::{server_builder, service, service_that_gives_way};
pub use stepper::Stepper;
pub use store::{ChunkStore, Counters, Fetched};
