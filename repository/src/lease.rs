//! A writer's lease, kept alive in the background.

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::v1;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use crate::{Catalog, CatalogError};

/// The time to live that writers ask for: long enough to ride out a restart of the metadata
/// service, short enough that a dead host holds the collector back only so long.
pub const LEASE_TTL: Duration = Duration::from_secs(60);

/// A lease is renewed after this part of its time, so that two renewals may fail.
const RENEW_AFTER_PART: u32 = 3;

/// How long to wait after a failed attempt, at first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// How long the release of a lease at the end may take: it runs out by itself anyway.
const RELEASE_DEADLINE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone)]
enum State {
    /// None yet, or the last one ran out.
    Waiting,
    Live {
        lease: v1::Lease,
        until: Instant,
    },
    /// The service refuses; it is asked again now and then.
    Refused(CatalogError),
}

/// Acquires one lease and renews it in the background until it is dropped or shut down. When the
/// lease ran out (the service was away for too long), a new one with a new generation is acquired;
/// what was stored under the old generation must then be stored, or touched, again.
#[derive(Debug)]
pub struct LeaseKeeper {
    state: watch::Receiver<State>,
    stop: watch::Sender<bool>,
    task: Option<JoinHandle<()>>,
}

impl LeaseKeeper {
    /// Starts a keeper for `holder` (a name for the operator). Needs a tokio runtime.
    #[must_use]
    pub fn start(catalog: Arc<dyn Catalog>, holder: impl Into<String>, ttl: Duration) -> Self {
        let (state_sender, state) = watch::channel(State::Waiting);
        let (stop, stopped) = watch::channel(false);
        let keeper = Keeper { catalog, holder: holder.into(), ttl, state: state_sender };
        let task = Some(tokio::spawn(keeper.run(stopped)));
        Self { state, stop, task }
    }

    /// A lease that is alive now; waits for one while the service cannot be reached.
    ///
    /// # Errors
    /// When the service refuses to give one, or the keeper's runtime has ended.
    pub async fn current(&self) -> Result<v1::Lease, CatalogError> {
        let mut state = self.state.clone();
        loop {
            let seen = state.borrow_and_update().clone();
            match seen {
                State::Live { lease, until } if Instant::now() < until => return Ok(lease),
                State::Refused(error) => return Err(error),
                State::Live { .. } | State::Waiting => {}
            }
            if state.changed().await.is_err() {
                return Err(CatalogError::Unavailable("the keeper of the lease has ended".into()));
            }
        }
    }

    /// Ends without releasing the lease: what was begun under it stays pending until the lease has
    /// run out, so that the same writer may take it up again after a restart.
    pub fn abandon(mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }

    /// Releases the lease (which fails what is still pending under it) and ends. Dropping the keeper does the same in the background.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        if let Some(task) = self.task.take() {
            // It ends by itself; a panic in it was reported where it happened.
            let _ = task.await;
        }
    }
}

impl Drop for LeaseKeeper {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

struct Keeper {
    catalog: Arc<dyn Catalog>,
    holder: String,
    ttl: Duration,
    state: watch::Sender<State>,
}

/// When the lease ends: by its own time where it says one, counted from before the question (the
/// service counts from a later moment).
fn ends(asked: Instant, lease: &v1::Lease, ttl: Duration) -> Instant {
    let lives = if lease.ttl_ms == 0 { ttl } else { Duration::from_millis(lease.ttl_ms) };
    // A time that no clock can hold would be a faulty service's.
    asked.checked_add(lives).unwrap_or(asked + ttl)
}

impl Keeper {
    async fn run(self, mut stop: watch::Receiver<bool>) {
        tokio::select! {
            biased;
            () = self.keep() => {}
            // An error means that the owner is gone: the same.
            _ = stop.wait_for(|stop| *stop) => {}
        }
        let last = self.state.borrow().clone();
        if let State::Live { lease, .. } = last {
            let request = v1::ReleaseLeaseRequest { lease_id: lease.id };
            let release = self.catalog.release_lease(request);
            if let Ok(Err(error)) = tokio::time::timeout(RELEASE_DEADLINE, release).await {
                tracing::debug!(lease = lease.id, %error, "lease not released: it will run out");
            }
        }
    }

    /// Never returns.
    async fn keep(&self) {
        loop {
            let (lease, until) = self.acquire().await;
            tracing::debug!(lease = lease.id, generation = lease.generation, "lease acquired");
            self.state.send_replace(State::Live { lease, until });
            self.renew(lease, until).await;
            self.state.send_replace(State::Waiting);
        }
    }

    async fn acquire(&self) -> (v1::Lease, Instant) {
        let mut wait = RETRY_FIRST;
        loop {
            let asked = Instant::now();
            let request = v1::AcquireLeaseRequest {
                holder: self.holder.clone(),
                ttl_ms: u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX),
            };
            match self.catalog.acquire_lease(request).await {
                Ok(lease) => {
                    let until = ends(asked, &lease, self.ttl);
                    return (lease, until);
                }
                Err(error) if error.is_transient() || matches!(error, CatalogError::Timeout(_)) => {
                    tracing::debug!(%error, "no lease yet");
                }
                Err(error) => {
                    tracing::warn!(%error, holder = self.holder, "the lease was refused");
                    self.state.send_replace(State::Refused(error));
                }
            }
            sleep(wait).await;
            wait = (wait * 2).min(RETRY_MAX);
        }
    }

    /// Returns when the lease has run out.
    async fn renew(&self, lease: v1::Lease, mut until: Instant) {
        loop {
            sleep((until - Instant::now()) / RENEW_AFTER_PART).await;
            let mut wait = RETRY_FIRST;
            loop {
                let asked = Instant::now();
                let request = v1::RenewLeaseRequest { lease_id: lease.id };
                match timeout_at(until, self.catalog.renew_lease(request)).await {
                    Ok(Ok(renewed)) => {
                        until = ends(asked, &renewed, self.ttl);
                        self.state.send_replace(State::Live { lease: renewed, until });
                        break;
                    }
                    Ok(Err(error))
                        if error.is_transient() || matches!(error, CatalogError::Timeout(_)) =>
                    {
                        tracing::debug!(lease = lease.id, %error, "lease not renewed yet");
                    }
                    Ok(Err(error)) => {
                        tracing::warn!(lease = lease.id, %error, "the lease is lost");
                        return;
                    }
                    Err(_) => return,
                }
                if Instant::now() + wait >= until {
                    tokio::time::sleep_until(until).await;
                    tracing::warn!(lease = lease.id, "the lease ran out");
                    return;
                }
                sleep(wait).await;
                wait = (wait * 2).min(RETRY_MAX);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemoryCatalog;

    fn start(catalog: &MemoryCatalog) -> LeaseKeeper {
        LeaseKeeper::start(Arc::new(catalog.clone()), "a test", LEASE_TTL)
    }

    async fn after(time: Duration) {
        sleep(time).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_renewed_for_as_long_as_it_is_kept() {
        let catalog = MemoryCatalog::default();
        let keeper = start(&catalog);
        let first = keeper.current().await.unwrap();
        after(Duration::from_secs(610)).await;
        assert_eq!(keeper.current().await.unwrap(), first);
        // Every 20 s.
        assert_eq!(catalog.faults().calls("renew_lease"), 30);
        assert_eq!(catalog.faults().calls("acquire_lease"), 1);
        keeper.shutdown().await;
        assert_eq!(catalog.faults().calls("release_lease"), 1);
        after(Duration::from_secs(600)).await;
        assert_eq!(catalog.faults().calls("renew_lease"), 30, "nobody keeps it any more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_keeper_releases_its_lease() {
        let catalog = MemoryCatalog::default();
        let keeper = start(&catalog);
        keeper.current().await.unwrap();
        drop(keeper);
        after(Duration::from_secs(1)).await;
        assert_eq!(catalog.faults().calls("release_lease"), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_abandoned_lease_is_neither_renewed_nor_released() {
        let catalog = MemoryCatalog::default();
        let keeper = start(&catalog);
        let lease = keeper.current().await.unwrap();
        keeper.abandon();
        after(Duration::from_secs(59)).await;
        assert_eq!(catalog.faults().calls("renew_lease"), 0);
        assert_eq!(catalog.faults().calls("release_lease"), 0);
        catalog.renew_lease(v1::RenewLeaseRequest { lease_id: lease.id }).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_short_absence_of_the_service_is_ridden_out() {
        let catalog = MemoryCatalog::default();
        let keeper = start(&catalog);
        let first = keeper.current().await.unwrap();
        after(Duration::from_secs(15)).await;
        catalog.faults().down(CatalogError::Unavailable("away".into()));
        after(Duration::from_secs(40)).await;
        assert_eq!(keeper.current().await.unwrap(), first, "it is alive for 60 s");
        catalog.faults().up();
        after(Duration::from_secs(300)).await;
        assert_eq!(keeper.current().await.unwrap(), first);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_ran_out_is_replaced_by_one_of_a_later_generation() {
        let catalog = MemoryCatalog::default();
        let keeper = start(&catalog);
        let first = keeper.current().await.unwrap();
        catalog.faults().down(CatalogError::Unavailable("away".into()));
        after(Duration::from_secs(120)).await;
        let waited = tokio::time::timeout(Duration::from_secs(60), keeper.current()).await;
        assert!(waited.is_err(), "no lease is alive, so it waits");
        catalog.faults().up();
        let second = keeper.current().await.unwrap();
        assert!(second.generation > first.generation);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_the_service_forgot_is_replaced() {
        let catalog = MemoryCatalog::default();
        let keeper = start(&catalog);
        let first = keeper.current().await.unwrap();
        catalog.expire_lease(first.id);
        after(Duration::from_secs(21)).await;
        assert!(keeper.current().await.unwrap().generation > first.generation);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_told_and_asked_again() {
        let catalog = MemoryCatalog::default();
        let refusal = CatalogError::Invalid("no such thing".into());
        catalog.faults().fail_next("acquire_lease", 2, refusal.clone());
        let keeper = start(&catalog);
        assert_eq!(keeper.current().await.unwrap_err(), refusal);
        after(Duration::from_secs(5)).await;
        keeper.current().await.unwrap();
    }

    /// A lease counts from before the question: the service may have given it just then.
    #[tokio::test(start_paused = true)]
    async fn a_slow_answer_shortens_the_lease() {
        let catalog = MemoryCatalog::default();
        let held = catalog.faults().hold_next("acquire_lease", 1);
        catalog.faults().fail_next("renew_lease", 1000, CatalogError::Unavailable("away".into()));
        let begin = Instant::now();
        let keeper = start(&catalog);
        held.arrived(1).await;
        after(Duration::from_secs(50)).await;
        held.release();
        let first = keeper.current().await.unwrap();
        after(Duration::from_secs(10)).await;
        let second = keeper.current().await.unwrap();
        assert!(second.generation > first.generation, "after {:?}", begin.elapsed());
    }
}
