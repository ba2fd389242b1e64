//! What the service does by itself, and the one runner for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

use crate::error::Error;
use crate::store::StoreError;
use crate::version_manager::VersionManager;

/// Pause between two rounds. A dead writer's snapshots are failed so much later than its lease runs
/// out, at most.
pub const ROUND: Duration = Duration::from_secs(1);

/// A store that took longer to answer was away: leases could not be renewed meanwhile. Longer than a
/// sync takes on a busy disk, shorter than any lease that matters.
const AWAY: Duration = Duration::from_secs(2);

/// Runs the tasks until it is dropped, or the version manager is.
#[derive(Debug)]
pub(crate) struct Tasks(JoinHandle<()>);

impl Tasks {
    pub(crate) fn start(manager: &Arc<VersionManager>) -> Self {
        // Not kept alive by its own tasks.
        let manager = Arc::downgrade(manager);
        Self(tokio::spawn(async move {
            let mut rounds = tokio::time::interval(ROUND);
            rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut away = false;
            loop {
                rounds.tick().await;
                let Some(manager) = manager.upgrade() else { return };
                let asked = Instant::now();
                let done = match manager.reach_store().await {
                    Ok(()) => {
                        if std::mem::take(&mut away) || asked.elapsed() > AWAY {
                            tracing::warn!("the store was away: leases get their time again");
                            manager.store_is_back();
                        }
                        round(&manager).await
                    }
                    Err(error) => Err(error),
                };
                if let Err(error) = done {
                    away |= matches!(error, Error::Store(StoreError::Unavailable { .. }));
                    tracing::warn!(%error, "a round of the metadata service's tasks failed");
                }
            }
        }))
    }

    /// Stops them between two awaits of theirs, and returns when they have stopped.
    pub(crate) async fn stop(&mut self) {
        self.0.abort();
        // Cancelled, or ended by itself: either way it has stopped.
        drop((&mut self.0).await);
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One round: what dead writers left, removals that were interrupted, and tables for the nodes there
/// are.
async fn round(manager: &VersionManager) -> Result<(), Error> {
    manager.expire_leases().await?;
    manager.finish_removals().await?;
    manager.place().await?;
    Ok(())
}
