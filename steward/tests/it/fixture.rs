//! A real version manager over a store in memory with a clock that stands still, and real nodes,
//! behind sockets.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use blobcr_metadata::MetadataService;
use blobcr_metadata::clock::testing::{ManualClock, SeededEntropy};
use blobcr_metadata::store::memory::MemoryStore;
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::RecordKind;
use blobcr_proto::{ChunkSize, Hash, v1};
use blobcr_repo_node::ChunkStore;
use blobcr_repository::client::{RemoteCatalog, RemotePools};
use blobcr_repository::testing::MemoryDisk;
use blobcr_repository::tree::{FanOut, Reached, Root, for_each_node};
use blobcr_repository::{
    Catalog, CatalogError, ConnectOptions, LeaseKeeper, NewImage, Object, ObjectStore,
    PersistLimits, PoolOpener, Repository, StoreError, Stored, import,
};
use blobcr_steward::{CollectOptions, Collection, collect};
use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;

pub(crate) const CHUNK: usize = ChunkSize::MIN.len();
/// Of what the tests store.
pub(crate) const POOL: u32 = 1;
pub(crate) const TTL_MS: u64 = 10_000;

pub(crate) struct Fixture {
    pub(crate) service: MetadataService,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) stores: Vec<Arc<ChunkStore>>,
    nodes: Vec<v1::RegisterNodeRequest>,
    /// What serves each node; `None` while it is away.
    served: Vec<Option<Runtime>>,
    address: String,
    _dirs: Vec<tempfile::TempDir>,
}

impl Fixture {
    pub(crate) async fn new(nodes: usize, policy: &str) -> Self {
        let clock = Arc::new(ManualClock::new(1_700_000_000_000));
        let options = blobcr_metadata::Options {
            clock: Arc::<ManualClock>::clone(&clock),
            entropy: Arc::new(SeededEntropy::new(1)),
            ..Default::default()
        };
        let service = MetadataService::over(Arc::new(MemoryStore::new()), options);
        // A lease that ran out ends when a test says so.
        service.clone().close().await;
        service.ensure_pool("default", policy).await.unwrap();
        let router = tonic::transport::Server::builder()
            .add_service(blobcr_metadata::service(service.clone()));
        let address = serve(router).await;
        let mut fixture = Self {
            service,
            clock,
            stores: Vec::new(),
            nodes: Vec::new(),
            served: Vec::new(),
            address,
            _dirs: Vec::new(),
        };
        for _ in 0..nodes {
            fixture.add_node().await;
        }
        fixture
    }

    /// A node that is new, and empty. Returns its place.
    pub(crate) async fn add_node(&mut self) -> usize {
        let dir = tempfile::tempdir().unwrap();
        let options =
            blobcr_repo_node::Options { reserve_bytes: Some(1 << 20), ..Default::default() };
        let store = Arc::new(ChunkStore::open(dir.path(), options).unwrap().0);
        let (address, served) = serve_node(&store);
        self.served.push(Some(served));
        let id = store.node_id();
        let domain = id.clone();
        let request = v1::RegisterNodeRequest { id, address, domain, cluster: String::new() };
        self.nodes.push(request);
        self.nodes_are_there().await;
        self.stores.push(store);
        self._dirs.push(dir);
        self.nodes.len() - 1
    }

    /// The node does not answer any more, nor say that it is there.
    pub(crate) fn stop_node(&mut self, node: usize) {
        self.served[node].take().unwrap().shutdown_background();
    }

    /// It answers again, elsewhere.
    pub(crate) async fn start_node(&mut self, node: usize) {
        let (address, served) = serve_node(&self.stores[node]);
        self.served[node] = Some(served);
        self.nodes[node].address = address;
        self.nodes_are_there().await;
    }

    pub(crate) fn id(&self, node: usize) -> String {
        self.nodes[node].id.clone()
    }

    /// As each node says every few seconds.
    pub(crate) async fn nodes_are_there(&self) {
        for (node, served) in self.nodes.iter().zip(&self.served) {
            if served.is_some() {
                self.service.manager().register_node(node.clone()).await.unwrap();
            }
        }
    }

    /// Those that are away are down, and what they hold moves.
    pub(crate) async fn place(&self) -> usize {
        self.clock.advance_ms(61_000);
        self.nodes_are_there().await;
        self.service.manager().place().await.unwrap()
    }

    fn catalog(&self) -> Arc<dyn Catalog> {
        let addresses = [self.address.clone()];
        Arc::new(RemoteCatalog::new(&addresses, &ConnectOptions::default()).unwrap())
    }

    /// A client that has nothing in its caches.
    pub(crate) fn repository(&self) -> Repository {
        Repository::new(self.catalog(), Arc::new(RemotePools::new(ConnectOptions::default())))
    }

    /// A client that does something before it opens a pool, and before it reads tree nodes.
    pub(crate) fn hooked(&self, before_roots: Hook, before_nodes: Hook) -> Repository {
        let pools = RemotePools::new(ConnectOptions::default());
        let hooks = Hooked { pools, before_roots, before_nodes: Arc::new(before_nodes) };
        Repository::new(self.catalog(), Arc::new(hooks))
    }

    pub(crate) async fn import(&self, name: &str, bytes: &[u8]) -> v1::Image {
        let repository = self.repository();
        let lease = LeaseKeeper::start(
            Arc::clone(repository.catalog()),
            "a test",
            blobcr_repository::LEASE_TTL,
        );
        let disk = MemoryDisk::new(bytes.to_vec(), ChunkSize::MIN);
        let image = NewImage {
            name: name.into(),
            pool: "default".into(),
            chunk_size: ChunkSize::MIN,
            fan_out: FanOut::new(2).unwrap(),
            writer: String::new(),
        };
        let limits = PersistLimits::default();
        let done = import(&repository, &lease, &disk, image, limits, &|_| ()).await;
        lease.shutdown().await;
        done.unwrap().0
    }

    pub(crate) async fn read(&self, name: &str, number: u64) -> Vec<u8> {
        let (_, snapshot, reader) = self.repository().open(at(name, number)).await.unwrap();
        let mut bytes = vec![0xAA; snapshot.root.unwrap().size_bytes as usize];
        reader.read(0, &mut bytes).await.unwrap();
        bytes
    }

    pub(crate) async fn lease(&self) -> v1::Lease {
        let request = v1::AcquireLeaseRequest { holder: "a writer".into(), ttl_ms: TTL_MS };
        self.service.manager().acquire_lease(request).await.unwrap()
    }

    pub(crate) async fn release(&self, lease_id: u64) {
        let request = v1::ReleaseLeaseRequest { lease_id };
        self.service.manager().release_lease(request).await.unwrap();
    }

    /// The writers of all leases die.
    pub(crate) async fn end_leases(&self) {
        self.clock.advance_ms(1_000_000);
        self.nodes_are_there().await;
        self.service.manager().expire_leases().await.unwrap();
    }

    pub(crate) async fn remove_image(&self, name: &str) {
        self.service.manager().remove_image(named(name)).await.unwrap();
    }

    pub(crate) async fn collect(&self) -> Collection {
        collect(&self.repository(), small()).await.unwrap()
    }

    /// A node loses records, whatever they are.
    pub(crate) async fn lose(&self, node: usize, ids: impl IntoIterator<Item = Hash>) {
        let both =
            |id| [RecordKind::Chunk, RecordKind::TreeNode].map(|kind| RecordKey::whole(kind, id));
        let keys: Vec<RecordKey> = ids.into_iter().flat_map(both).collect();
        let store = Arc::clone(&self.stores[node]);
        let lost = tokio::task::spawn_blocking(move || store.delete(POOL, u64::MAX, &keys));
        lost.await.unwrap().unwrap();
    }

    /// Every record that is anywhere.
    pub(crate) fn records(&self) -> BTreeSet<(RecordKind, Hash)> {
        let mut all = BTreeSet::new();
        for (store, kind) in self
            .stores
            .iter()
            .flat_map(|store| [RecordKind::Chunk, RecordKind::TreeNode].map(|kind| (store, kind)))
        {
            for record in store.list(POOL, kind, None, usize::MAX).0 {
                all.insert((kind, Hash::from_slice(&record.r#ref.unwrap().id).unwrap()));
            }
        }
        all
    }

    /// Every shard of a chunk, and its node.
    pub(crate) fn all_shards(&self) -> BTreeSet<(usize, RecordKey)> {
        let of = |(at, store): (usize, &Arc<ChunkStore>)| {
            let (listed, _) = store.list(POOL, RecordKind::Chunk, None, usize::MAX);
            let key = move |record: v1::ListedRecord| {
                (at, RecordKey::try_from(&record.r#ref.unwrap()).unwrap())
            };
            listed.into_iter().map(key).collect::<Vec<_>>()
        };
        self.stores.iter().enumerate().flat_map(of).collect()
    }

    pub(crate) async fn lose_shard(&self, node: usize, key: RecordKey) {
        let store = Arc::clone(&self.stores[node]);
        let lost = tokio::task::spawn_blocking(move || store.delete(POOL, u64::MAX, &[key]));
        assert_eq!(lost.await.unwrap().unwrap().deleted, 1);
    }

    /// A node's disk gives back another shard, with a checksum that fits.
    pub(crate) async fn replace_shard(&self, node: usize, key: RecordKey) {
        let store = Arc::clone(&self.stores[node]);
        let replaced = tokio::task::spawn_blocking(move || {
            let blobcr_repo_node::Fetched::Found(mut record) = store.get(POOL, key) else {
                panic!("{key:?} is not there");
            };
            let mut payload = record.payload.to_vec();
            *payload.last_mut().unwrap() ^= 1;
            record.payload_crc32c = blobcr_proto::codec::crc32c(&payload);
            record.payload = payload.into();
            store.delete(POOL, u64::MAX, &[key]).unwrap();
            store.put(POOL, 1, &[record]).unwrap();
        });
        replaced.await.unwrap();
    }

    /// What the nodes hold, by node.
    pub(crate) fn held(&self) -> Vec<BTreeSet<Hash>> {
        let of_kind = |store: &ChunkStore, kind| {
            let (records, more) = store.list(POOL, kind, None, usize::MAX);
            assert!(!more);
            let id =
                |record: v1::ListedRecord| Hash::from_slice(&record.r#ref.unwrap().id).unwrap();
            records.into_iter().map(id).collect::<Vec<_>>()
        };
        let of = |store: &Arc<ChunkStore>| {
            [RecordKind::Chunk, RecordKind::TreeNode]
                .into_iter()
                .flat_map(|kind| of_kind(store, kind))
                .collect()
        };
        self.stores.iter().map(of).collect()
    }

    pub(crate) fn all_held(&self) -> BTreeSet<Hash> {
        self.held().into_iter().flatten().collect()
    }

    /// What a root reaches.
    pub(crate) async fn reached(&self, root: &v1::TreeRoot) -> BTreeSet<Hash> {
        let repository = self.repository();
        let nodes = repository.nodes(POOL).await.unwrap();
        let mut found = BTreeSet::new();
        let mut visit = |reached| {
            match reached {
                Reached::Node { id, .. } | Reached::Chunk { id, .. } => found.insert(id),
            };
            true
        };
        for_each_node(&*nodes, &Root::try_from(root).unwrap(), &mut visit).await.unwrap();
        found
    }

    pub(crate) async fn root(&self, name: &str, number: u64) -> v1::TreeRoot {
        self.service.manager().get_snapshot(at(name, number)).await.unwrap().root.unwrap()
    }
}

/// So little memory that a collection needs several passes.
pub(crate) fn small() -> CollectOptions {
    CollectOptions { mark_bytes: 0, visited_bytes: 1000, ..CollectOptions::default() }
}

/// Serves in a runtime of its own: with it go its connections.
fn serve_node(store: &Arc<ChunkStore>) -> (String, Runtime) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let service = blobcr_repo_node::service(Arc::clone(store));
    let router = blobcr_repo_node::server_builder().add_service(service);
    runtime.spawn(async move {
        let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
        router.serve_with_incoming(incoming).await
    });
    (address, runtime)
}

async fn serve(router: tonic::transport::server::Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    // It ends with the test's runtime.
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.served.drain(..).flatten().for_each(Runtime::shutdown_background);
    }
}

pub(crate) fn named(name: &str) -> v1::ImageRef {
    v1::ImageRef { name: name.into(), id: 0 }
}

pub(crate) fn at(name: &str, number: u64) -> v1::SnapshotRef {
    v1::SnapshotRef { image: Some(named(name)), number }
}

/// A chunk for each letter; `0` is a hole.
pub(crate) fn disk(letters: &[u8]) -> Vec<u8> {
    letters
        .iter()
        .flat_map(|letter| match letter {
            0 => vec![0; CHUNK],
            letter => Hash::of(&[*letter]).0.repeat(CHUNK / Hash::LEN),
        })
        .collect()
}

pub(crate) type Hook = Box<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

pub(crate) fn nothing() -> Hook {
    Box::new(|| Box::pin(async {}))
}

struct Hooked {
    pools: RemotePools,
    before_roots: Hook,
    before_nodes: Arc<Hook>,
}

#[async_trait]
impl PoolOpener for Hooked {
    async fn open(
        &self,
        catalog: &Arc<dyn Catalog>,
        pool: v1::Pool,
    ) -> Result<Arc<dyn ObjectStore>, CatalogError> {
        (self.before_roots)().await;
        let store = self.pools.open(catalog, pool).await?;
        Ok(Arc::new(HookedStore { store, before_nodes: Arc::clone(&self.before_nodes) }))
    }

    fn apart(self: Arc<Self>) -> Arc<dyn PoolOpener> {
        self
    }
}

struct HookedStore {
    store: Arc<dyn ObjectStore>,
    before_nodes: Arc<Hook>,
}

#[async_trait]
impl ObjectStore for HookedStore {
    async fn put(&self, generation: u64, objects: Vec<Object>) -> Result<Stored, StoreError> {
        self.store.put(generation, objects).await
    }

    async fn get(&self, kind: RecordKind, id: &Hash) -> Result<Bytes, StoreError> {
        self.store.get(kind, id).await
    }

    async fn get_many(&self, kind: RecordKind, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        (self.before_nodes)().await;
        self.store.get_many(kind, ids).await
    }

    async fn touch(
        &self,
        generation: u64,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<bool>, StoreError> {
        self.store.touch(generation, kind, ids).await
    }
}
