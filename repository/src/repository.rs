//! The way into a repository: its catalog and its pools.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use blobcr_proto::v1;

use crate::client::{ConnectOptions, RemoteCatalog, RemotePools};
use crate::nodes::CachedNodes;
use crate::tree::{NodeSource, Root};
use crate::{Catalog, CatalogError, ObjectStore, SnapshotReader};

/// Makes the object store of a pool.
#[async_trait]
pub trait PoolOpener: Send + Sync + 'static {
    /// Opens `pool`. Need not reach a node: the store's calls do.
    ///
    /// # Errors
    /// When the pool's policy is not supported, or its facts cannot be had.
    async fn open(
        &self,
        catalog: &Arc<dyn Catalog>,
        pool: v1::Pool,
    ) -> Result<Arc<dyn ObjectStore>, CatalogError>;

    /// The same, over connections of its own.
    fn apart(self: Arc<Self>) -> Arc<dyn PoolOpener>;
}

/// A repository. Clones are cheap and share connections and caches.
#[derive(Clone)]
pub struct Repository(Arc<Inner>);

struct Inner {
    catalog: Arc<dyn Catalog>,
    opener: Arc<dyn PoolOpener>,
    options: ConnectOptions,
    pools: Mutex<HashMap<u32, OpenPool>>,
}

#[derive(Clone)]
struct OpenPool {
    store: Arc<dyn ObjectStore>,
    nodes: Arc<CachedNodes>,
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Repository").finish_non_exhaustive()
    }
}

impl Repository {
    /// A client of the repository whose metadata servers are at `addresses` (`host:port`).
    /// Nothing is connected before it is needed; a server that is down is passed over.
    ///
    /// # Errors
    /// When there is no address, or one makes no sense.
    #[expect(clippy::unused_async, reason = "callers may rely on it to wait later")]
    pub async fn connect(
        addresses: &[String],
        options: ConnectOptions,
    ) -> Result<Self, CatalogError> {
        let catalog = RemoteCatalog::new(addresses, &options)?;
        let pools = RemotePools::new(options.clone());
        Ok(Self::over(Arc::new(catalog), Arc::new(pools), options))
    }

    /// A repository over any catalog and pools.
    #[must_use]
    pub fn new(catalog: Arc<dyn Catalog>, pools: Arc<dyn PoolOpener>) -> Self {
        Self::over(catalog, pools, ConnectOptions::default())
    }

    fn over(
        catalog: Arc<dyn Catalog>,
        opener: Arc<dyn PoolOpener>,
        options: ConnectOptions,
    ) -> Self {
        Self(Arc::new(Inner { catalog, opener, options, pools: Mutex::default() }))
    }

    /// The same repository over connections to its nodes and caches of its own: what goes through
    /// them waits neither for what goes through these, nor for threads of whoever made these.
    #[must_use]
    pub fn apart(&self) -> Self {
        let opener = Arc::clone(&self.0.opener).apart();
        Self::over(Arc::clone(&self.0.catalog), opener, self.0.options.clone())
    }

    /// How servers are connected to, for who talks to one past its pool.
    #[must_use]
    pub fn options(&self) -> &ConnectOptions {
        &self.0.options
    }

    /// The mutable facts.
    #[must_use]
    pub fn catalog(&self) -> &Arc<dyn Catalog> {
        &self.0.catalog
    }

    fn pools(&self) -> MutexGuard<'_, HashMap<u32, OpenPool>> {
        self.0.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open_pool(&self, id: u32) -> Result<OpenPool, CatalogError> {
        if let Some(open) = self.pools().get(&id) {
            return Ok(open.clone());
        }
        let pool = self.0.catalog.get_pool(v1::PoolRef { id, name: String::new() }).await?;
        let store = self.0.opener.open(&self.0.catalog, pool).await?;
        let nodes = Arc::new(CachedNodes::new(Arc::clone(&store)));
        // Another caller may have been quicker: all share what came first.
        Ok(self.pools().entry(id).or_insert(OpenPool { store, nodes }).clone())
    }

    /// The objects of pool `id`.
    ///
    /// # Errors
    /// When there is no such pool, or the metadata service cannot be reached.
    pub async fn pool(&self, id: u32) -> Result<Arc<dyn ObjectStore>, CatalogError> {
        Ok(self.open_pool(id).await?.store)
    }

    /// The tree nodes of pool `id`, through a bounded cache that all clones share.
    ///
    /// # Errors
    /// As [`Self::pool`].
    pub async fn nodes(&self, id: u32) -> Result<Arc<dyn NodeSource>, CatalogError> {
        Ok(self.open_pool(id).await?.nodes)
    }

    /// A snapshot and its image.
    ///
    /// # Errors
    /// When there is none, or the metadata service cannot be reached.
    pub async fn snapshot(
        &self,
        snapshot: v1::SnapshotRef,
    ) -> Result<(v1::Image, v1::Snapshot), CatalogError> {
        let snapshot = self.0.catalog.get_snapshot(snapshot).await?;
        let by_id = v1::ImageRef { id: snapshot.image_id, name: String::new() };
        Ok((self.0.catalog.get_image(by_id).await?, snapshot))
    }

    /// Opens a stable snapshot for reading.
    ///
    /// # Errors
    /// When there is none, it is not stable, or the metadata service cannot be reached.
    pub async fn open(
        &self,
        snapshot: v1::SnapshotRef,
    ) -> Result<(v1::Image, v1::Snapshot, SnapshotReader), CatalogError> {
        let (image, snapshot) = self.snapshot(snapshot).await?;
        let name = format!("{}@{}", image.name, snapshot.number);
        if snapshot.state() != v1::SnapshotState::Stable {
            let text = format!("{name} is not stable: it cannot be read");
            return Err(CatalogError::Precondition(text));
        }
        let root = snapshot.root.clone().unwrap_or_default();
        let root = Root::try_from(&root)
            .map_err(|error| CatalogError::Invalid(format!("the root of {name}: {error}")))?;
        let open = self.open_pool(image.pool).await?;
        let reader = SnapshotReader::new(root, open.nodes, open.store);
        Ok((image, snapshot, reader))
    }
}
