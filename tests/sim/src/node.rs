//! A repository node: the real store and service over a simulated disk.

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::bulk::BulkRecordStoreServer;
use blobcr_proto::v1;
use blobcr_repo_node::service::NodeService;
use blobcr_repo_node::testing::{Fault, SimDisk};
use blobcr_repo_node::{ChunkStore, Options, Stepper, StoreId, server_builder};
use blobcr_repository::Repository;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::watched::Watched;
use crate::world::World;

/// Small, so that a run has several, and compaction something to do.
const SEGMENT_BYTES: u64 = 32 << 10;
/// Kept free for deletes.
const RESERVE_BYTES: u64 = 16 << 10;
/// What is free on a disk that is not full.
const ROOM_BYTES: usize = 1 << 40;
/// How often a node says that it is there, as the role does.
const REGISTER_EVERY: Duration = Duration::from_secs(3);
/// How often it compacts.
const COMPACT_EVERY: Duration = Duration::from_secs(7);

fn options() -> Options {
    Options {
        segment_bytes: SEGMENT_BYTES,
        reserve_bytes: Some(RESERVE_BYTES),
        compact_dead_fraction: 0.3,
        maintenance_interval: None,
        ..Options::default()
    }
}

fn identity(world: &World) -> StoreId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&world.dice.any().to_le_bytes());
    StoreId(id)
}

/// A host with a node, or one that is down.
#[derive(Debug)]
pub struct NodeHost {
    world: World,
    /// Which node of the run.
    pub number: usize,
    /// Its name in the network.
    pub host: String,
    /// Its disk.
    pub disk: SimDisk,
    /// A copy of it from some time ago.
    old: Option<SimDisk>,
    id: StoreId,
    running: Option<Running>,
}

struct Running {
    store: Arc<ChunkStore>,
    tasks: Vec<AbortHandle>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").finish_non_exhaustive()
    }
}

impl NodeHost {
    /// Not started.
    #[must_use]
    pub fn new(world: &World, number: usize) -> Self {
        let id = identity(world);
        let disk = SimDisk::new(world.dice.any());
        let host = format!("node-{number}");
        Self { world: world.clone(), number, host, disk, old: None, id, running: None }
    }

    /// Whether it runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.running.is_some()
    }

    /// Its store, while it runs.
    #[must_use]
    pub fn store(&self) -> Option<&Arc<ChunkStore>> {
        self.running.as_ref().map(|running| &running.store)
    }

    /// Opens the store from what the disk holds, checks that this is what was promised, and serves it.
    pub fn start(&mut self, metadata: &[String]) {
        if self.is_up() {
            return;
        }
        let opened = ChunkStore::open_stepped(Arc::new(self.disk.clone()), options(), self.id);
        let (store, stepper, report) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.world.oracle.not_opened(self.number, &error);
                return;
            }
        };
        let host = &self.host;
        self.world.note(format_args!("{host} starts with {} records", report.records));
        let store = Arc::new(store);
        self.world.oracle.restarted(self.number, &store);
        let steps = steps(stepper, self.world.clone(), self.host.clone());
        let registering =
            register(self.world.clone(), self.registration(&store), metadata.to_vec());
        let tasks = vec![
            tokio::spawn(steps).abort_handle(),
            tokio::spawn(self.serve(&store)).abort_handle(),
            tokio::spawn(registering).abort_handle(),
        ];
        self.running = Some(Running { store, tasks });
    }

    fn serve(&self, store: &Arc<ChunkStore>) -> impl Future<Output = ()> + use<> {
        let service = NodeService::new(Arc::clone(store));
        let oracle = self.world.oracle.clone();
        let service = BulkRecordStoreServer::new(Watched { service, node: self.number, oracle });
        let incoming = UnboundedReceiverStream::new(self.world.net.listen(&self.host));
        let router = server_builder().add_service(service);
        let serving = router.serve_with_incoming(incoming.map(Ok::<_, std::io::Error>));
        async move { drop(serving.await) }
    }

    fn registration(&self, store: &ChunkStore) -> v1::RegisterNodeRequest {
        let id = store.node_id();
        let address = format!("{}:1", self.host);
        v1::RegisterNodeRequest { domain: id.clone(), id, address, cluster: String::new() }
    }

    /// The process dies; the host stays.
    pub fn kill(&mut self) {
        self.end("killed", false);
        self.disk = self.disk.kill();
    }

    /// The host loses its power: what was not synced may be gone.
    pub fn power_cut(&mut self) {
        self.end("loses power", self.world.dice.chance(0.7));
        self.disk = self.disk.crash();
    }

    /// Its disk is replaced by one with what was there some time ago.
    pub fn go_back(&mut self) {
        let now = self.disk.copy();
        let Some(old) = self.old.replace(now) else { return };
        self.world.oracle.taint(self.number);
        self.end("goes back", true);
        self.disk = old;
    }

    /// Its disk is replaced by an empty one: another node begins in its place.
    pub fn wipe(&mut self) {
        self.world.oracle.taint(self.number);
        self.end("is wiped", true);
        self.id = identity(&self.world);
        self.disk = SimDisk::new(self.world.dice.any());
        self.old = None;
    }

    fn end(&mut self, how: &str, silently: bool) {
        // From here on its disk does nothing more, whatever still holds it.
        self.disk.cut();
        self.world.note(format_args!("{} {how}, silently: {silently}", self.host));
        self.world.net.kill(&self.host, silently);
        if let Some(running) = self.running.take() {
            running.tasks.iter().for_each(AbortHandle::abort);
        }
    }

    /// Whether its store takes no writes any more.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.store().is_some_and(|store| store.status().poisoned)
    }

    /// Its disk is as it should be, and it runs.
    pub fn heal(&mut self, metadata: &[String]) {
        if self.is_up() && self.disk.is_dead() {
            self.power_cut();
        } else if self.is_poisoned() {
            self.kill();
        }
        self.disk.no_fault();
        self.disk.leave(ROOM_BYTES);
        self.start(metadata);
    }

    /// Lets something happen to the disk a few operations from now.
    pub fn fault(&self, after: u64, fault: Fault) {
        self.world.note(format_args!("{}: {fault:?} after {after} operations", self.host));
        self.disk.fault(after, fault);
    }
}

/// The work of the store's threads, at times that the seed decides.
async fn steps(mut stepper: Stepper, world: World, host: String) {
    loop {
        match timeout(COMPACT_EVERY, stepper.arrived()).await {
            Ok(()) => {
                sleep(world.dice.ms(0..6)).await;
                while stepper.step() {
                    world.note(format_args!("{host} wrote"));
                }
            }
            Err(_) => match stepper.compact() {
                Ok(done) if done.segments > 0 => world.note(format_args!("{host}: {done:?}")),
                Ok(_) => {}
                Err(error) => world.note(format_args!("{host}: compaction: {error}")),
            },
        }
    }
}

/// As the role does.
async fn register(world: World, registration: v1::RegisterNodeRequest, metadata: Vec<String>) {
    let host = registration.address.trim_end_matches(":1").to_owned();
    let Ok(repository) = Repository::connect(&metadata, crate::options(&world, &host)).await else {
        return;
    };
    loop {
        if let Err(error) = repository.catalog().register_node(registration.clone()).await {
            world.note(format_args!("{host} is not registered: {error}"));
        }
        sleep(REGISTER_EVERY).await;
    }
}
