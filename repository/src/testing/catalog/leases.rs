//! Leases.

use std::time::Duration;

use blobcr_proto::v1;
use tokio::time::Instant;

use super::{Answer, ById, precondition};

/// Times to live that the real service gives.
const TTL_MS_DEFAULT: u64 = 30_000;
const TTL_MS_MIN: u64 = 1000;
const TTL_MS_MAX: u64 = 600_000;

#[derive(Debug, Default)]
pub(super) struct Leases {
    live: ById<u64, (v1::Lease, Instant)>,
    last: u64,
}

impl Leases {
    pub(super) fn acquire(&mut self, r: &v1::AcquireLeaseRequest) -> Answer<v1::Lease> {
        let ttl_ms = match r.ttl_ms {
            0 => TTL_MS_DEFAULT,
            asked => asked.clamp(TTL_MS_MIN, TTL_MS_MAX),
        };
        self.last += 1;
        let lease = v1::Lease { id: self.last, generation: self.last, ttl_ms };
        self.live.insert(lease.id, (lease, Instant::now() + Duration::from_millis(ttl_ms)));
        Ok(lease)
    }

    pub(super) fn renew(&mut self, id: u64) -> Answer<v1::Lease> {
        self.check_live(id)?;
        let Some((lease, until)) = self.live.get_mut(&id) else {
            return precondition(format!("lease {id} has ended"));
        };
        *until = Instant::now() + Duration::from_millis(lease.ttl_ms);
        Ok(*lease)
    }

    pub(super) fn check_live(&self, id: u64) -> Answer<()> {
        match self.live.get(&id) {
            Some((_, until)) if Instant::now() < *until => Ok(()),
            _ => precondition(format!("lease {id} has ended; acquire a new one")),
        }
    }

    /// The generation of the newest lease.
    pub(super) const fn newest(&self) -> u64 {
        self.last
    }

    /// The generation from which on what was touched may be in use.
    pub(super) fn bound(&self) -> v1::CollectionBound {
        let oldest = self.live.values().map(|(lease, _)| lease.generation).min();
        v1::CollectionBound { generation: oldest.unwrap_or(self.last + 1) }
    }

    pub(super) fn remove(&mut self, id: u64) {
        self.live.remove(&id);
    }

    /// Removes the leases whose time has passed.
    pub(super) fn take_expired(&mut self) -> Vec<u64> {
        let now = Instant::now();
        let expired: Vec<u64> =
            self.live.values().filter(|(_, until)| *until <= now).map(|(l, _)| l.id).collect();
        for id in &expired {
            self.live.remove(id);
        }
        expired
    }
}
