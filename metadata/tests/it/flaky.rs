//! A store that a process loses in the middle of its work, or where others come first.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use blobcr_metadata::store::{Entry, Key, MetaStore, Page, StoreError, Swap, Version, Watch};

#[derive(Debug)]
enum Plan {
    Fine,
    CrashAfter { swaps: u32, applied: bool },
    Crashed,
}

type Meanwhile = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A store that a process loses in the middle of its work, or where others come first.
pub(crate) struct Flaky {
    inner: Arc<dyn MetaStore>,
    plan: Mutex<Plan>,
    meanwhile: Mutex<Option<Meanwhile>>,
}

impl std::fmt::Debug for Flaky {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flaky").field("plan", &self.plan).finish_non_exhaustive()
    }
}

pub(crate) fn flaky(inner: &Arc<dyn MetaStore>) -> Arc<Flaky> {
    Arc::new(Flaky {
        inner: Arc::clone(inner),
        plan: Mutex::new(Plan::Fine),
        meanwhile: Mutex::new(None),
    })
}

impl Flaky {
    /// After so many swaps, the next one fails for its caller, and everything after it. `applied`:
    /// it happens all the same.
    pub(crate) fn crash_after(&self, swaps: u32, applied: bool) {
        *self.plan.lock().unwrap() = Plan::CrashAfter { swaps, applied };
    }

    /// Does this first when the next swap comes: after everything that the swap was decided on.
    pub(crate) fn before_next_swap(&self, others: impl Future<Output = ()> + Send + 'static) {
        *self.meanwhile.lock().unwrap() = Some(Box::pin(others));
    }

    /// Whether what was to come first has come.
    pub(crate) fn met(&self) -> bool {
        self.meanwhile.lock().unwrap().is_none()
    }

    pub(crate) fn as_store(self: &Arc<Self>) -> Arc<dyn MetaStore> {
        Arc::clone(self) as Arc<dyn MetaStore>
    }

    fn gone() -> StoreError {
        StoreError::Unavailable { detail: "the test cut it off".to_owned() }
    }

    fn alive(&self) -> Result<(), StoreError> {
        match *self.plan.lock().unwrap() {
            Plan::Crashed => Err(Self::gone()),
            Plan::Fine | Plan::CrashAfter { .. } => Ok(()),
        }
    }

    /// `None`: go on. Otherwise crash, after the swap or before it.
    fn crash(&self) -> Option<bool> {
        let mut plan = self.plan.lock().unwrap();
        match &mut *plan {
            Plan::CrashAfter { swaps: 0, applied } => {
                let applied = *applied;
                *plan = Plan::Crashed;
                Some(applied)
            }
            Plan::CrashAfter { swaps, .. } => {
                *swaps -= 1;
                None
            }
            Plan::Fine | Plan::Crashed => None,
        }
    }
}

#[async_trait]
impl MetaStore for Flaky {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.alive()?;
        self.inner.get(key).await
    }

    async fn swap(&self, swap: Swap) -> Result<Version, StoreError> {
        self.alive()?;
        let others = self.meanwhile.lock().unwrap().take();
        if let Some(others) = others {
            others.await;
        }
        match self.crash() {
            None => self.inner.swap(swap).await,
            Some(applied) => {
                if applied {
                    // What it answered is lost.
                    drop(self.inner.swap(swap).await);
                }
                Err(Self::gone())
            }
        }
    }

    async fn list(
        &self,
        prefix: &[u8],
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        self.alive()?;
        self.inner.list(prefix, after, limit).await
    }

    async fn watch(&self, prefix: &[u8]) -> Result<Watch, StoreError> {
        self.alive()?;
        self.inner.watch(prefix).await
    }
}
