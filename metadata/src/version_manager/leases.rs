//! Leases: a writer's promise to be alive, and what happens when it is broken.
//!
//! A lease is *live* until its time runs out; leases get their full time again when the service
//! starts, or its store is back after it was away, because nobody could renew them meanwhile. Of
//! several services over one store, the one that ends a lease first decides: the others find it
//! closed. A lease that ran out cannot be used or
//! renewed, but it *ends* only when its record goes: first it is closed, which no swap that relied
//! on it survives, then its pending snapshots are failed, then the record is removed. Whatever was
//! stored under a lease is spared by the collector until that, so clocks decide about convenience
//! and never about data.

use std::sync::atomic::Ordering;

use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;

use super::snapshots::failed;
use super::{Held, RecordSwap, VersionManager, check_writer, until_won};
use crate::error::Error;
use crate::records::{
    Counter, CounterRecord, KeyKind, LeaseRecord, LeaseWorkRecord, Record, SnapshotRecord,
    prefix_of,
};
use crate::store::{StoreError, Swap};

/// Time of a lease that is asked for without one, in ms.
pub const LEASE_TTL_MS_DEFAULT: u64 = 30_000;
/// Shorter leases would run out under load alone.
pub const LEASE_TTL_MS_MIN: u64 = 1_000;
/// Longer leases would hold the collector back for long after a writer died.
pub const LEASE_TTL_MS_MAX: u64 = 10 * 60 * 1000;

/// Leases and their work looked at in one page.
const PAGE: usize = 64;

const ACQUIRE_ANOTHER: &str = "acquire a new one";

/// Why a lease ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Released,
    RanOut,
}

impl End {
    const fn reason(self) -> &'static str {
        match self {
            Self::Released => "its writer released the lease",
            Self::RanOut => "its writer's lease ran out",
        }
    }
}

fn describe(id: u64) -> String {
    format!("lease {id:016x}")
}

impl VersionManager {
    /// Gives a lease, with a generation above every one given before. Its time is what was asked
    /// for, moved into the range that is allowed.
    ///
    /// # Errors
    /// When the store cannot.
    pub async fn acquire_lease(&self, r: v1::AcquireLeaseRequest) -> Result<v1::Lease, Error> {
        check_writer(&r.holder)?;
        let ttl_ms = match r.ttl_ms {
            0 => LEASE_TTL_MS_DEFAULT,
            asked => asked.clamp(LEASE_TTL_MS_MIN, LEASE_TTL_MS_MAX),
        };
        let _turn = self.generation_turn.lock().await;
        until_won!(self, "the counter of generations", self.try_acquire(&r.holder, ttl_ms).await)
    }

    async fn try_acquire(&self, holder: &str, ttl_ms: u64) -> Result<v1::Lease, Error> {
        let (generation, swap) = self.count(Counter::Generation, 1, Swap::new()).await?;
        let lease = LeaseRecord {
            id: self.entropy.next_u64().max(1),
            generation,
            holder: holder.to_owned(),
            ttl_ms,
            expires_unix_ms: self.now().saturating_add(ttl_ms),
            closed: false,
        };
        self.store.swap(swap.create(&lease)).await?;
        Ok(lease.to_wire())
    }

    /// Gives a live lease its full time again.
    ///
    /// # Errors
    /// [`Error::Precondition`] when it has run out, [`Error::NotFound`] when it has ended.
    pub async fn renew_lease(&self, r: v1::RenewLeaseRequest) -> Result<v1::Lease, Error> {
        until_won!(self, describe(r.lease_id), self.try_renew(r.lease_id).await)
    }

    async fn try_renew(&self, id: u64) -> Result<v1::Lease, Error> {
        let lease = self.live_lease(id).await?;
        let expires = self.now().saturating_add(lease.value.ttl_ms);
        // A clock that was put back takes nothing away.
        let expires_unix_ms = expires.max(lease.value.expires_unix_ms);
        let renewed = LeaseRecord { expires_unix_ms, ..lease.value.clone() };
        self.store.swap(Swap::new().update(&lease, &renewed)).await?;
        Ok(renewed.to_wire())
    }

    /// Ends a lease; snapshots still pending under it fail. Nothing happens when it has ended.
    ///
    /// # Errors
    /// When the store cannot.
    pub async fn release_lease(
        &self,
        r: v1::ReleaseLeaseRequest,
    ) -> Result<v1::ReleaseLeaseResponse, Error> {
        self.end_lease(r.lease_id, End::Released).await?;
        Ok(v1::ReleaseLeaseResponse {})
    }

    /// Ends every lease that has run out. Returns how many.
    ///
    /// # Errors
    /// When the store cannot; the rest is left for the next time.
    pub async fn expire_leases(&self) -> Result<usize, Error> {
        let prefix = prefix_of(KeyKind::Lease);
        let mut after = None;
        let mut ended = 0;
        loop {
            let (leases, more) = self.page::<LeaseRecord>(&prefix, after.as_ref(), PAGE).await?;
            for lease in &leases {
                if self.is_live(&lease.value) {
                    continue;
                }
                if self.end_lease(lease.value.id, End::RanOut).await? {
                    let LeaseRecord { id, holder, .. } = &lease.value;
                    tracing::info!(lease = format!("{id:016x}"), holder, "a lease has run out");
                    ended += 1;
                }
            }
            after = leases.last().map(|lease| lease.value.key());
            if !more {
                return Ok(ended);
            }
        }
    }

    /// The generation of the oldest lease that has not ended: what was touched since then must not
    /// be collected. `None` when there is no lease.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn oldest_generation(&self) -> Result<Option<u64>, Error> {
        let prefix = prefix_of(KeyKind::Lease);
        let mut after = None;
        let mut oldest = None;
        loop {
            let (leases, more) = self.page::<LeaseRecord>(&prefix, after.as_ref(), PAGE).await?;
            let generations = leases.iter().map(|lease| lease.value.generation);
            oldest = oldest.into_iter().chain(generations).min();
            after = leases.last().map(|lease| lease.value.key());
            if !more {
                return Ok(oldest);
            }
        }
    }

    /// Asks the store for something, to see whether it is there.
    ///
    /// # Errors
    /// When it is not.
    pub async fn reach_store(&self) -> Result<(), Error> {
        self.load::<CounterRecord>(CounterRecord::key_of(Counter::Generation)).await?;
        Ok(())
    }

    /// The store was away until now: leases get their full time again.
    pub fn store_is_back(&self) {
        self.renewable_unix_ms.fetch_max(self.now(), Ordering::SeqCst);
    }

    fn is_live(&self, lease: &LeaseRecord) -> bool {
        let renewable = self.renewable_unix_ms.load(Ordering::SeqCst);
        let again = renewable.saturating_add(lease.ttl_ms);
        !lease.closed && self.now() < lease.expires_unix_ms.max(again)
    }

    /// A lease that something may be done under.
    pub(super) async fn live_lease(&self, id: u64) -> Result<Held<LeaseRecord>, Error> {
        match self.load::<LeaseRecord>(LeaseRecord::key_of(id)).await? {
            Some(lease) if self.is_live(&lease.value) => Ok(lease),
            Some(_) => {
                Err(Error::precondition(describe(id), format!("has run out; {ACQUIRE_ANOTHER}")))
            }
            None => Err(Error::precondition(describe(id), format!("has ended; {ACQUIRE_ANOTHER}"))),
        }
    }

    pub(super) async fn lease_lives(&self, id: u64) -> Result<bool, Error> {
        let lease = self.load::<LeaseRecord>(LeaseRecord::key_of(id)).await?;
        Ok(lease.is_some_and(|lease| self.is_live(&lease.value)))
    }

    /// Ends a lease, unless it has ended or was renewed meanwhile. Returns whether it did.
    async fn end_lease(&self, id: u64, end: End) -> Result<bool, Error> {
        let closed = until_won!(self, describe(id), self.try_close(id, end).await)?;
        let Some(closed) = closed else { return Ok(false) };
        while until_won!(self, describe(id), self.fail_work(id, end).await)? {}
        match self.store.swap(Swap::new().remove(&closed)).await {
            Ok(_) => Ok(true),
            // Somebody else ended it at the same time.
            Err(StoreError::Conflict { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// From here on no swap can rely on the lease.
    async fn try_close(&self, id: u64, end: End) -> Result<Option<Held<LeaseRecord>>, Error> {
        let Some(lease) = self.load::<LeaseRecord>(LeaseRecord::key_of(id)).await? else {
            return Ok(None);
        };
        if lease.value.closed {
            return Ok(Some(lease));
        }
        if matches!(end, End::RanOut) && self.is_live(&lease.value) {
            return Ok(None);
        }
        let closed = LeaseRecord { closed: true, ..lease.value.clone() };
        let version = self.store.swap(Swap::new().update(&lease, &closed)).await?;
        Ok(Some(Held { value: closed, version }))
    }

    /// Fails one page of what is pending under a closed lease; whether there is more to do.
    async fn fail_work(&self, id: u64, end: End) -> Result<bool, Error> {
        let prefix = LeaseWorkRecord::prefix_of(id);
        let (work, more) = self.page::<LeaseWorkRecord>(&prefix, None, PAGE).await?;
        for work in &work {
            let LeaseWorkRecord { image_id, number, .. } = work.value;
            let key = SnapshotRecord::key_of(image_id, number);
            let mut swap = Swap::new().remove(work);
            if let Some(snapshot) = self.load::<SnapshotRecord>(key).await?
                && snapshot.value.state() == SnapshotState::Pending
                && snapshot.value.lease_id == id
            {
                swap = swap.update(&snapshot, &failed(&snapshot.value, end.reason()));
            }
            self.store.swap(swap).await?;
        }
        Ok(more)
    }
}
