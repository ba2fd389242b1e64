//! Which placement tables the callers of this node go by, so that it can tell one whose table is old.
//! It learns them from the callers: a node knows no metadata server.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

/// Pools that are remembered at most: a caller may name any number.
const POOLS_MAX: usize = 1024;

/// The newest version that was named, by pool. It is a hint, so nothing is kept over a restart.
#[derive(Debug, Default)]
pub(crate) struct Tables(RwLock<HashMap<u32, AtomicU64>>);

impl Tables {
    /// Notes what a caller goes by, and returns the newest that was noted of its pool.
    pub(crate) fn newest(&self, pool: u32, version: u64) -> u64 {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(newest) = known.get(&pool) {
            return newest.fetch_max(version, Ordering::Relaxed).max(version);
        }
        drop(known);
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() < POOLS_MAX {
            known.entry(pool).or_default().fetch_max(version, Ordering::Relaxed);
        }
        version
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_of_each_pool_is_told() {
        let tables = Tables::default();
        let told = [(1, 5), (1, 3), (2, 0), (1, 6), (1, 0), (2, 1)];
        let told = told.map(|(pool, version)| tables.newest(pool, version));
        assert_eq!(told, [5, 5, 0, 6, 6, 1]);
    }
}
