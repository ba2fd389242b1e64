//! The store under the metadata servers: the one in memory, which outlives them all, behind a way to
//! it that is slow, fails, and may lose the answer to a swap that happened.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use blobcr_metadata::store::memory::MemoryStore;
use blobcr_metadata::store::{Entry, Key, MetaStore, Page, StoreError, Swap, Version, Watch};
use tokio::time::sleep;

use crate::dice::Dice;
use crate::oracle::Oracle;

/// Probabilities of one call.
const FAILS: f64 = 0.004;
const IS_SLOW: f64 = 0.02;

/// The store as one server reaches it.
#[derive(Debug)]
pub struct ServerStore {
    store: Arc<MemoryStore>,
    oracle: Oracle,
    dice: Dice,
    /// Whether the way to it is bad.
    shaky: Arc<AtomicBool>,
}

impl ServerStore {
    /// The way of one server.
    #[must_use]
    pub fn new(
        store: Arc<MemoryStore>,
        oracle: Oracle,
        dice: Dice,
        shaky: Arc<AtomicBool>,
    ) -> Self {
        Self { store, oracle, dice, shaky }
    }

    /// The way there, or back.
    async fn way(&self) -> Result<(), StoreError> {
        if !self.shaky.load(Ordering::SeqCst) {
            return Ok(());
        }
        if self.dice.chance(IS_SLOW) {
            sleep(self.dice.ms(1..300)).await;
        }
        if self.dice.chance(FAILS) {
            sleep(Duration::from_millis(50)).await;
            return Err(StoreError::Unavailable { detail: "as the seed has it".into() });
        }
        Ok(())
    }
}

#[async_trait]
impl MetaStore for ServerStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.way().await?;
        self.store.get(key).await
    }

    async fn swap(&self, swap: Swap) -> Result<Version, StoreError> {
        self.way().await?;
        let done = self.store.swap(swap.clone()).await?;
        // It happened, whether its server hears of it or not.
        self.oracle.swapped(&swap);
        self.way().await?;
        Ok(done)
    }

    async fn list(
        &self,
        prefix: &[u8],
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        self.way().await?;
        self.store.list(prefix, after, limit).await
    }

    async fn watch(&self, prefix: &[u8]) -> Result<Watch, StoreError> {
        self.store.watch(prefix).await
    }
}
