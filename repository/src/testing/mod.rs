//! Small, faithful stand-ins for the services, for tests of what is built upon the repository:
//! they keep every promise of the real ones but durability, and fail on demand.

mod catalog;
mod faults;
mod pool;
mod source;

pub use catalog::MemoryCatalog;
pub use faults::{Faults, Held};
pub use pool::{MemoryPool, PoolOperation};
pub use source::MemoryDisk;

use std::sync::Arc;

use crate::Repository;

/// A repository in memory with one pool, `default` (id 1, `replica:1`).
#[must_use]
pub fn memory_repository() -> (Repository, MemoryCatalog, MemoryPool) {
    let catalog = MemoryCatalog::default();
    let pool = MemoryPool::default();
    let repository = Repository::new(Arc::new(catalog.clone()), Arc::new(pool.clone()));
    (repository, catalog, pool)
}
