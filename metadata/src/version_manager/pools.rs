//! Pools.

use blobcr_proto::{PoolName, v1};

use super::{Held, RecordSwap, VersionManager, until_won};
use crate::error::Error;
use crate::records::{Counter, KeyKind, PoolNameRecord, PoolRecord, prefix_of};
use crate::store::Swap;
use blobcr_proto::policy::{Compression, Policy};

/// Partitions of a pool's placement table: enough to balance the largest pool that a table can
/// hold, few enough that readers keep the whole of it.
pub const PARTITIONS: u32 = 1024;

/// Pools at most: each costs a placement table, and one reply lists all.
pub const POOLS_MAX: u64 = 256;

const LIST_POOLS: &str = "`blobcr pool list` shows what there is";

impl VersionManager {
    /// Makes a pool.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when the name is taken, [`Error::Invalid`] for a bad policy.
    pub async fn create_pool(&self, r: v1::CreatePoolRequest) -> Result<v1::Pool, Error> {
        let name = PoolName::new(r.name.as_str())
            .map_err(|error| Error::invalid(format!("pool: {error}")))?;
        let policy: Policy = r.policy.parse().map_err(Error::invalid)?;
        let compression: Compression = match r.compression.as_str() {
            "" => Compression::default(),
            text => text.parse().map_err(Error::invalid)?,
        };
        let pool = PoolRecord {
            id: 0,
            name: name.into(),
            policy: policy.to_string(),
            partitions: self.partitions,
            compression: compression.to_string(),
        };
        until_won!(self, format!("pool {:?}", pool.name), self.try_create_pool(&pool).await)
    }

    async fn try_create_pool(&self, pool: &PoolRecord) -> Result<v1::Pool, Error> {
        let key = PoolNameRecord::key_of(&pool.name);
        if self.load::<PoolNameRecord>(key).await?.is_some() {
            let object = format!("pool {:?}", pool.name);
            return Err(Error::AlreadyExists { object, advice: "choose another name" });
        }
        let (id, swap) = self.count(Counter::Pool, 1, Swap::new()).await?;
        let id =
            u32::try_from(id).ok().filter(|id| u64::from(*id) <= POOLS_MAX).ok_or_else(|| {
                let problem = format!("cannot be made: there are {POOLS_MAX} pools already");
                Error::precondition(format!("pool {:?}", pool.name), problem)
            })?;
        let pool = PoolRecord { id, ..pool.clone() };
        let name = PoolNameRecord { name: pool.name.clone(), pool_id: id };
        self.store.swap(swap.create(&pool).create(&name)).await?;
        Ok(pool.to_wire())
    }

    /// The pool of that name, which is made when it is not there.
    ///
    /// # Errors
    /// [`Error::Precondition`] when it is there with another policy.
    pub async fn ensure_pool(&self, name: &str, policy: &str) -> Result<v1::Pool, Error> {
        let wanted: Policy = policy.parse().map_err(Error::invalid)?;
        let request = v1::CreatePoolRequest {
            name: name.to_owned(),
            policy: policy.to_owned(),
            compression: String::new(),
        };
        match self.create_pool(request).await {
            Err(Error::AlreadyExists { .. }) => {}
            done => return done,
        }
        let pool = self.pool_record(&v1::PoolRef { name: name.to_owned(), id: 0 }).await?.value;
        if pool.policy != wanted.to_string() {
            let problem = format!("has the policy {}; make another pool for {wanted}", pool.policy);
            return Err(Error::precondition(format!("pool {name:?}"), problem));
        }
        Ok(pool.to_wire())
    }

    /// A pool by name or id.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none.
    pub async fn get_pool(&self, r: v1::PoolRef) -> Result<v1::Pool, Error> {
        Ok(self.pool_record(&r).await?.value.to_wire())
    }

    pub(super) async fn pool_record(&self, r: &v1::PoolRef) -> Result<Held<PoolRecord>, Error> {
        let not_found = || match r.name.as_str() {
            "" => Error::not_found(format!("pool with the id {}", r.id), LIST_POOLS),
            name => Error::not_found(format!("pool {name:?}"), LIST_POOLS),
        };
        let id = if r.name.is_empty() {
            r.id
        } else {
            PoolName::new(r.name.as_str())
                .map_err(|error| Error::invalid(format!("pool: {error}")))?;
            let name = self.load::<PoolNameRecord>(PoolNameRecord::key_of(&r.name)).await?;
            name.ok_or_else(not_found)?.value.pool_id
        };
        self.load::<PoolRecord>(PoolRecord::key_of(id)).await?.ok_or_else(not_found)
    }

    /// All pools (at most [`POOLS_MAX`]), in order of id.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn list_pools(
        &self,
        _: v1::ListPoolsRequest,
    ) -> Result<v1::ListPoolsResponse, Error> {
        let pools = self.all::<PoolRecord>(&prefix_of(KeyKind::Pool)).await?;
        Ok(v1::ListPoolsResponse { pools: pools.iter().map(|pool| pool.value.to_wire()).collect() })
    }
}
