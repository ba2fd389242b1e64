//! The client against the real metadata service and real repository nodes, over sockets.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blobcr_metadata::MetadataService;
use blobcr_proto::{ChunkSize, v1};
use blobcr_repo_node::ChunkStore;
use blobcr_repository::testing::{MemoryCatalog, MemoryDisk};
use blobcr_repository::tree::FanOut;
use blobcr_repository::{
    Catalog, CatalogError, ConnectOptions, LEASE_TTL, LeaseKeeper, NewImage, PersistJob,
    PersistLimits, Repository, import, persist, verify,
};
use rand::{RngCore, SeedableRng, rngs::StdRng};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;

struct MetadataServer {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
    service: MetadataService,
}

impl MetadataServer {
    async fn start(dir: &Path) -> Self {
        let service =
            blobcr_metadata::open(dir, blobcr_metadata::Options::default()).await.unwrap();
        service.ensure_pool("default", "replica:1").await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let serving = tonic::transport::Server::builder()
            .add_service(blobcr_metadata::service(service.clone()))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
                // A sender that is gone says the same.
                let _ = stopped.await;
            });
        let task = tokio::spawn(async move { serving.await.unwrap() });
        Self { address, stop, task, service }
    }

    async fn repository(&self) -> Repository {
        let options =
            ConnectOptions { connect_timeout: Duration::from_secs(1), ..Default::default() };
        Repository::connect(&[self.address.to_string()], options).await.unwrap()
    }

    /// Returns when its directory is free.
    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap();
        self.service.close().await;
    }
}

struct Node {
    store: Arc<ChunkStore>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Node {
    async fn start(dir: &Path, id: &str, catalog: &dyn Catalog) -> Self {
        let options =
            blobcr_repo_node::Options { reserve_bytes: Some(1 << 20), ..Default::default() };
        let (store, _) = ChunkStore::open(dir, options).unwrap();
        let store = Arc::new(store);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel();
        let serving = blobcr_repo_node::server_builder()
            .add_service(blobcr_repo_node::service(Arc::clone(&store)))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
                // A sender that is gone says the same.
                let _ = stopped.await;
            });
        let task = tokio::spawn(async move { serving.await.unwrap() });
        let (id, domain) = (id.to_owned(), id.to_owned());
        catalog
            .register_node(v1::RegisterNodeRequest { id, address, domain, cluster: String::new() })
            .await
            .unwrap();
        Self { store, stop, task }
    }

    /// Returns when its directory is free.
    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap();
        self.store.close();
    }
}

/// What a call came to, as far as the real catalog and the one in memory must agree.
fn outcome<T>(result: Result<T, CatalogError>, say: impl FnOnce(T) -> String) -> String {
    match result {
        Ok(answer) => say(answer),
        Err(CatalogError::NotFound(_)) => "not found".into(),
        Err(CatalogError::AlreadyExists(_)) => "already exists".into(),
        Err(CatalogError::Invalid(_)) => "invalid".into(),
        Err(CatalogError::Precondition(_)) => "precondition".into(),
        Err(CatalogError::Conflict(_)) => "conflict".into(),
        Err(CatalogError::Unavailable(text)) => format!("unavailable: {text}"),
        Err(CatalogError::Timeout(_)) => "timeout".into(),
    }
}

fn image_of(image: v1::Image) -> String {
    let v1::Image { name, latest, highest_number, parent_snapshot, writer, .. } = image;
    format!("{name} {latest}/{highest_number} of {parent_snapshot} by {writer:?}")
}

fn snapshot_of(snapshot: v1::Snapshot) -> String {
    let size = snapshot.root.as_ref().map_or(0, |root| root.size_bytes);
    format!("{}@{} {:?} {size}", snapshot.image, snapshot.number, snapshot.state())
}

fn set_of(set: v1::CheckpointSet) -> String {
    let members: Vec<_> = set.members.iter().map(|m| format!("{}/{}", m.vm, m.disk)).collect();
    format!("{} {members:?} {} {}", set.sequence, set.complete, set.stable)
}

/// Runs one script of calls, and writes down what each came to.
struct Script<'a> {
    catalog: &'a dyn Catalog,
    heard: Vec<String>,
}

fn named(name: &str) -> v1::ImageRef {
    v1::ImageRef { name: name.into(), id: 0 }
}

fn at(name: &str, number: u64) -> v1::SnapshotRef {
    v1::SnapshotRef { image: Some(named(name)), number }
}

fn root(size_bytes: u64) -> v1::TreeRoot {
    v1::TreeRoot { size_bytes, chunk_size: 262_144, fan_out: 64, node: Default::default() }
}

impl Script<'_> {
    fn hear(&mut self, text: String) {
        self.heard.push(text);
    }

    async fn create(&mut self, name: &str, pool: &str, chunk_size: u32, writer: &str) {
        let (name, pool, writer) = (name.into(), pool.into(), writer.into());
        let request = v1::CreateImageRequest { name, pool, chunk_size, writer };
        let done = self.catalog.create_image(request).await;
        self.hear(outcome(done, image_of));
    }

    async fn id(&mut self, name: &str) -> u64 {
        let found = self.catalog.get_image(named(name)).await;
        let id = found.as_ref().map_or(u64::MAX, |image| image.id);
        self.hear(outcome(found, image_of));
        id
    }

    async fn lease(&mut self, ttl_ms: u64) -> u64 {
        let request = v1::AcquireLeaseRequest { holder: "script".into(), ttl_ms };
        let lease = self.catalog.acquire_lease(request).await.unwrap();
        self.hear(format!("lease of {} ms", lease.ttl_ms));
        lease.id
    }

    async fn begin(&mut self, image_id: u64, number: u64, lease_id: u64, writer: &str) {
        let writer = writer.into();
        let request = v1::BeginSnapshotRequest { image_id, number, lease_id, writer };
        let done = self.catalog.begin_snapshot(request).await;
        self.hear(outcome(done, snapshot_of));
    }

    async fn publish(
        &mut self,
        image_id: u64,
        number: u64,
        lease_id: u64,
        writer: &str,
        root: v1::TreeRoot,
    ) {
        let request = v1::PublishSnapshotRequest {
            image_id,
            number,
            lease_id,
            writer: writer.into(),
            root: Some(root),
            stats: None,
        };
        let done = self.catalog.publish_snapshot(request).await;
        self.hear(outcome(done, snapshot_of));
    }

    async fn fail(&mut self, image_id: u64, number: u64, writer: &str) {
        let (writer, reason) = (writer.into(), "because".into());
        let request = v1::FailSnapshotRequest { image_id, number, writer, reason };
        let done = self.catalog.fail_snapshot(request).await;
        self.hear(outcome(done, snapshot_of));
    }

    async fn get(&mut self, name: &str, number: u64) {
        let done = self.catalog.get_snapshot(at(name, number)).await;
        self.hear(outcome(done, snapshot_of));
    }

    async fn remove_snapshot(&mut self, name: &str, number: u64) {
        let done = self.catalog.remove_snapshot(at(name, number)).await;
        self.hear(outcome(done, snapshot_of));
    }

    async fn clone_image(&mut self, name: &str, number: u64, new: &str, writer: &str) {
        let source = Some(at(name, number));
        let request = v1::CloneImageRequest { source, name: new.into(), writer: writer.into() };
        let done = self.catalog.clone_image(request).await;
        self.hear(outcome(done, |clone| {
            let (image, first) = (clone.image.unwrap(), clone.snapshot.unwrap());
            format!("{} with {}", image_of(image), snapshot_of(first))
        }));
    }

    async fn wait(&mut self, name: &str, number: u64) {
        let request = v1::WaitSnapshotRequest { snapshot: Some(at(name, number)), timeout_ms: 50 };
        let done = self.catalog.wait_snapshot(request).await;
        self.hear(outcome(done, snapshot_of));
    }

    async fn list(&mut self, name: &str, after_number: u64, limit: u32) {
        let image = Some(named(name));
        let request = v1::ListSnapshotsRequest { image, after_number, limit };
        let done = self.catalog.list_snapshots(request).await;
        self.hear(outcome(done, |page| {
            let snapshots: Vec<_> = page.snapshots.into_iter().map(snapshot_of).collect();
            format!("{snapshots:?} more {}", page.more)
        }));
    }

    async fn list_images(&mut self, after: &str, limit: u32) {
        let request = v1::ListImagesRequest { after_name: after.into(), limit };
        let done = self.catalog.list_images(request).await;
        self.hear(outcome(done, |page| {
            let names: Vec<_> = page.images.into_iter().map(|image| image.name).collect();
            format!("{names:?} more {}", page.more)
        }));
    }

    async fn add(&mut self, sequence: u64, expected_vms: u32, vm: &str, image: &str, number: u64) {
        let (vm, disk, image) = (vm.into(), "disk".into(), image.into());
        let members = vec![v1::SetMember { vm, disk, image, number }];
        let request = v1::AddToSetRequest { group: "mpi".into(), sequence, expected_vms, members };
        let done = self.catalog.add_to_set(request).await;
        self.hear(outcome(done, set_of));
    }

    async fn latest_set(&mut self) {
        let done = self.catalog.latest_set(v1::LatestSetRequest { group: "mpi".into() }).await;
        self.hear(outcome(done, set_of));
    }

    async fn images(&mut self) {
        self.create("debian", "default", 0, "").await;
        self.create("debian", "default", 0, "").await;
        self.create("no/slash", "default", 0, "").await;
        self.create("other", "nowhere", 0, "").await;
        self.create("other", "default", 12_345, "").await;
        self.id("absent").await;
        self.get("debian", 0).await;
        self.get("debian", 1).await;
    }

    /// Returns the lease.
    async fn snapshots(&mut self) -> u64 {
        let debian = self.id("debian").await;
        let lease = self.lease(60_000).await;
        self.begin(debian, 0, 0, "w").await;
        self.begin(debian, 0, lease, "w").await;
        self.begin(debian, 7, lease, "w").await;
        self.begin(debian, 7, lease, "w").await;
        self.begin(debian, 7, lease, "another").await;
        self.begin(debian, 3, lease, "w").await;
        self.wait("debian", 7).await;
        self.remove_snapshot("debian", 7).await;
        self.clone_image("debian", 7, "early", "").await;
        self.publish(debian, 7, lease, "another", root(1 << 30)).await;
        self.publish(debian, 7, 0, "w", root(1 << 30)).await;
        self.publish(debian, 9, lease, "w", root(1 << 30)).await;
        let mut odd = root(1 << 30);
        odd.chunk_size = 65_536;
        self.publish(debian, 7, lease, "w", odd).await;
        self.publish(debian, 7, lease, "w", v1::TreeRoot::default()).await;
        self.publish(debian, 7, lease, "w", root(1 << 30)).await;
        self.publish(debian, 7, lease, "w", root(1 << 30)).await;
        self.publish(debian, 7, lease, "w", root(2 << 30)).await;
        self.fail(debian, 7, "w").await;
        // An older one that comes later does not take `latest` back.
        self.publish(debian, 1, lease, "w", root(5 << 20)).await;
        self.id("debian").await;
        self.get("debian", 0).await;
        self.wait("debian", 7).await;
        self.remove_snapshot("debian", 7).await;
        self.remove_snapshot("debian", 1).await;
        self.remove_snapshot("debian", 1).await;
        self.begin(debian, 0, lease, "w").await;
        self.fail(debian, 8, "another").await;
        self.fail(debian, 8, "w").await;
        self.fail(debian, 8, "w").await;
        self.publish(debian, 8, lease, "w", root(1 << 30)).await;
        self.list("debian", 0, 0).await;
        self.list("debian", 1, 1).await;
        lease
    }

    async fn clones(&mut self, lease: u64) {
        self.clone_image("debian", 0, "clone", "host-1").await;
        self.clone_image("debian", 7, "clone", "host-1").await;
        self.clone_image("debian", 8, "failed", "").await;
        self.clone_image("debian", 0, "a b", "").await;
        let clone = self.id("clone").await;
        self.begin(clone, 0, lease, "host-2").await;
        self.begin(clone, 0, lease, "host-1").await;
        // What was begun under a lease fails with it.
        let request = v1::ReleaseLeaseRequest { lease_id: lease };
        self.catalog.release_lease(request).await.unwrap();
        self.get("clone", 2).await;
        let renewed = self.catalog.renew_lease(v1::RenewLeaseRequest { lease_id: lease }).await;
        self.hear(outcome(renewed, |lease| lease.ttl_ms.to_string()));
        self.begin(clone, 0, lease, "host-1").await;
        self.list_images("", 0).await;
        self.list_images("clone", 1).await;
    }

    async fn sets(&mut self) {
        let clone = self.id("clone").await;
        let lease = self.lease(0).await;
        self.begin(clone, 0, lease, "host-1").await;
        self.latest_set().await;
        self.add(1, 2, "vm-1", "debian", 7).await;
        self.add(1, 2, "vm-1", "debian", 7).await;
        self.add(1, 3, "vm-1", "debian", 7).await;
        self.add(1, 2, "vm-1", "clone", 1).await;
        self.add(1, 2, "vm-2", "clone", 3).await;
        self.add(1, 2, "vm-3", "clone", 3).await;
        self.add(1, 2, "vm-2", "absent", 3).await;
        self.latest_set().await;
        self.publish(clone, 3, lease, "host-1", root(1 << 30)).await;
        self.latest_set().await;
        self.add(2, 1, "vm-1", "debian", 7).await;
        self.latest_set().await;
        let request = v1::ListSetsRequest { group: "mpi".into(), limit: 1 };
        let done = self.catalog.list_sets(request).await;
        self.hear(outcome(done, |page| format!("{} newest", page.sets.len())));
        let done = self.catalog.remove_image(named("clone")).await;
        self.hear(outcome(done, |_| "removed".into()));
        let done = self.catalog.remove_image(named("clone")).await;
        self.hear(outcome(done, |_| "removed".into()));
        self.get("clone", 1).await;
        self.create("clone", "default", 65_536, "").await;
        self.publish(clone, 3, lease, "host-1", root(1 << 30)).await;
        self.add(1, 2, "vm-1", "debian", 7).await;
    }

    async fn roots(&mut self, since_generation: u64) {
        let request = v1::ListRootsRequest { since_generation, after: None, limit: 0 };
        let done = self.catalog.list_roots(request).await;
        self.hear(outcome(done, |page| {
            let roots: Vec<_> =
                page.roots.iter().map(|root| format!("{}@{}", root.image, root.number)).collect();
            format!("{roots:?} more {}", page.next.is_some())
        }));
        let bound = self.catalog.get_collection_bound(v1::CollectionBoundRequest {}).await;
        self.hear(outcome(bound, |bound| bound.generation.to_string()));
    }

    async fn run(mut self) -> Vec<String> {
        self.images().await;
        let lease = self.snapshots().await;
        self.clones(lease).await;
        self.sets().await;
        self.roots(0).await;
        self.roots(2).await;
        self.roots(1000).await;
        self.heard
    }
}

/// What is tested over the memory catalog would hold over the real one.
#[tokio::test]
async fn the_catalog_in_memory_keeps_the_rules_of_the_real_one() {
    let dir = tempfile::tempdir().unwrap();
    let server = MetadataServer::start(dir.path()).await;
    let repository = server.repository().await;
    let real = Script { catalog: &**repository.catalog(), heard: Vec::new() }.run().await;
    let memory = MemoryCatalog::default();
    let memory = Script { catalog: &memory, heard: Vec::new() }.run().await;
    for (step, (real, memory)) in real.iter().zip(&memory).enumerate() {
        assert_eq!(real, memory, "step {step}: the real one, and the one in memory");
    }
    assert_eq!(real.len(), memory.len());
    server.stop().await;
}

fn disk(seed: u64, chunks: usize) -> MemoryDisk {
    let mut bytes = vec![0; chunks * ChunkSize::MIN.len()];
    // Half random, half text that compresses, and a hole.
    let half = bytes.len() / 2;
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes[..half]);
    let text: Vec<u8> = (0..bytes.len() - half).map(|at| (at / 97) as u8).collect();
    bytes[half..].copy_from_slice(&text);
    bytes[3 * ChunkSize::MIN.len()..9 * ChunkSize::MIN.len()].fill(0);
    MemoryDisk::new(bytes, ChunkSize::MIN)
}

/// Import, a change, a restart of everything, and every byte of both snapshots.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_survives_the_restart_of_the_whole_repository() {
    let dir = tempfile::tempdir().unwrap();
    let metadata_dir = dir.path().join("metadata");
    let server = MetadataServer::start(&metadata_dir).await;
    let repository = server.repository().await;
    let catalog = repository.catalog();
    let mut nodes = Vec::new();
    for at in 0..3 {
        let id = format!("{at:032x}");
        nodes.push(Node::start(&dir.path().join(&id), &id, &**catalog).await);
    }
    let (name, policy) = ("safe".into(), "replica:2".into());
    let pool = v1::CreatePoolRequest { name, policy, compression: "adaptive".into() };
    let pool = catalog.create_pool(pool).await.unwrap();

    let lease = LeaseKeeper::start(Arc::clone(catalog), "a test", LEASE_TTL);
    let first = disk(1, 120);
    let image = NewImage {
        name: "debian".into(),
        pool: "safe".into(),
        chunk_size: ChunkSize::MIN,
        fan_out: FanOut::DEFAULT,
        writer: String::new(),
    };
    let limits = PersistLimits::default();
    let imported = import(&repository, &lease, &first, image, limits.clone(), &|_| ()).await;
    let (image, one) = imported.unwrap();
    let stats = one.stats.unwrap();
    assert_eq!((stats.stored_chunks, stats.zero_chunks), (114, 0), "zeros are not even read");
    assert!(stats.stored_bytes < 90 * ChunkSize::MIN.bytes(), "{stats:?}");

    let mut bytes = first.bytes().to_vec();
    bytes[100 * ChunkSize::MIN.len() + 5] ^= 1;
    let second = MemoryDisk::new(bytes, ChunkSize::MIN);
    let (_, _, reader) = repository.open(at("debian", 1)).await.unwrap();
    let held = lease.current().await.unwrap();
    let (image_id, lease_id) = (image.id, held.id);
    let begin = v1::BeginSnapshotRequest { image_id, lease_id, ..Default::default() };
    let number = catalog.begin_snapshot(begin).await.unwrap().number;
    let (store, tree) =
        (repository.pool(pool.id).await.unwrap(), repository.nodes(pool.id).await.unwrap());
    let job = PersistJob {
        base: *reader.root(),
        geometry: reader.root().geometry,
        chunks: vec![99, 100],
        generation: held.generation,
        source: &second,
        progress: &|_| (),
        limits,
    };
    let done = persist(&*store, &*tree, job).await.unwrap();
    assert_eq!(done.stats.stored_chunks, 1, "chunk 99 had not changed");
    let publish = v1::PublishSnapshotRequest {
        image_id,
        number,
        lease_id,
        root: Some(done.root.to_wire()),
        stats: Some(done.stats),
        ..Default::default()
    };
    catalog.publish_snapshot(publish).await.unwrap();
    lease.shutdown().await;
    drop(repository);
    server.stop().await;
    futures::future::join_all(nodes.into_iter().map(Node::stop)).await;

    let server = MetadataServer::start(&metadata_dir).await;
    let repository = server.repository().await;
    let mut nodes = Vec::new();
    // One node stays away: the other copies serve.
    for at in 1..3 {
        let id = format!("{at:032x}");
        nodes.push(Node::start(&dir.path().join(&id), &id, &**repository.catalog()).await);
    }
    let store = repository.pool(pool.id).await.unwrap();
    for (number, expected) in [(1, &first), (2, &second), (0, &second)] {
        let (_, _, reader) = repository.open(at("debian", number)).await.unwrap();
        let mut read = vec![0xAA; expected.bytes().len()];
        reader.read(0, &mut read).await.unwrap();
        assert!(read == expected.bytes(), "snapshot {number}");
        let patience = Duration::from_secs(10);
        let found = verify(&store, reader.root(), patience, &|_, _| ()).await.unwrap();
        assert!(found.is_whole(), "{:?}", found.damage);
    }
    futures::future::join_all(nodes.into_iter().map(Node::stop)).await;
    server.stop().await;
}

/// The same promise for shards: of six real nodes any two may go, while it is written one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_coded_disk_survives_the_loss_of_two_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let server = MetadataServer::start(&dir.path().join("metadata")).await;
    let repository = server.repository().await;
    let catalog = repository.catalog();
    let mut nodes = Vec::new();
    for at in 0..6 {
        let id = format!("{at:032x}");
        nodes.push(Node::start(&dir.path().join(&id), &id, &**catalog).await);
    }
    let (name, policy) = ("coded".into(), "ec:4+2".into());
    let pool = v1::CreatePoolRequest { name, policy, compression: "adaptive".into() };
    let pool = catalog.create_pool(pool).await.unwrap();
    let lease = LeaseKeeper::start(Arc::clone(catalog), "a test", LEASE_TTL);
    let image = |name: &str| NewImage {
        name: name.into(),
        pool: "coded".into(),
        chunk_size: ChunkSize::MIN,
        fan_out: FanOut::DEFAULT,
        writer: String::new(),
    };
    let debts = async || {
        let request = v1::ListDebtRequest { pool: pool.id, after: None, limit: 0 };
        catalog.list_debt(request).await.unwrap().debts
    };
    let limits = PersistLimits::default;
    let whole = disk(1, 60);
    import(&repository, &lease, &whole, image("whole"), limits(), &|_| ()).await.unwrap();
    assert!(debts().await.is_empty());
    nodes.remove(2).stop().await;
    // Some of it is there already, and lacks a shard that nobody knew of so far.
    let degraded = disk(1, 90);
    import(&repository, &lease, &degraded, image("degraded"), limits(), &|_| ()).await.unwrap();
    assert!(!debts().await.is_empty());
    nodes.remove(0).stop().await;
    let store = repository.pool(pool.id).await.unwrap();
    for (name, expected) in [("whole", &whole), ("degraded", &degraded)] {
        let (_, _, reader) = repository.open(at(name, 1)).await.unwrap();
        let mut read = vec![0xAA; expected.bytes().len()];
        reader.read(0, &mut read).await.unwrap();
        assert!(read == expected.bytes(), "{name}");
        let patience = Duration::from_secs(10);
        let found = verify(&store, reader.root(), patience, &|_, _| ()).await.unwrap();
        assert!(found.is_whole(), "{:?}", found.damage);
    }
    lease.shutdown().await;
    futures::future::join_all(nodes.into_iter().map(Node::stop)).await;
    server.stop().await;
}
