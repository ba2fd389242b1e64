//! A metadata server: the real service, with a clock of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blobcr_metadata::store::memory::MemoryStore;
use blobcr_metadata::{MetadataService, Options};
use tokio::task::AbortHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::clock::{Entropy, WallClock};
use crate::store::ServerStore;
use crate::world::World;

/// Partitions of a pool: enough for every node to hold some.
const PARTITIONS: u32 = 16;

/// A host with a server, or one that is down.
#[derive(Debug)]
pub struct MetadataHost {
    world: World,
    /// Its name in the network.
    pub host: String,
    store: Arc<MemoryStore>,
    /// Its clock, which outlives the process.
    pub clock: Arc<WallClock>,
    /// Whether its way to the store is bad.
    pub shaky: Arc<AtomicBool>,
    running: Option<(MetadataService, AbortHandle)>,
}

impl MetadataHost {
    /// Not started.
    #[must_use]
    pub fn new(world: &World, host: String, store: &Arc<MemoryStore>) -> Self {
        Self {
            host,
            store: Arc::clone(store),
            clock: Arc::new(WallClock::new(&world.dice)),
            shaky: Arc::default(),
            running: None,
            world: world.clone(),
        }
    }

    /// Whether it runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.running.is_some()
    }

    /// Starts the server.
    pub fn start(&mut self) {
        if self.is_up() {
            return;
        }
        let World { net, oracle, dice, .. } = &self.world;
        let shaky = Arc::clone(&self.shaky);
        let store = ServerStore::new(Arc::clone(&self.store), oracle.clone(), dice.fork(), shaky);
        let clock = Arc::clone(&self.clock);
        let entropy = Arc::new(Entropy(dice.fork()));
        let options = Options { clock, entropy, partitions: PARTITIONS, ..Options::default() };
        let service = MetadataService::over(Arc::new(store), options);
        let incoming = UnboundedReceiverStream::new(net.listen(&self.host));
        let router = tonic::transport::Server::builder()
            .add_service(blobcr_metadata::service(service.clone()));
        let serving = router.serve_with_incoming(incoming.map(Ok::<_, std::io::Error>));
        let task = tokio::spawn(async move { drop(serving.await) });
        self.running = Some((service, task.abort_handle()));
        self.world.note(format_args!("{} starts", self.host));
    }

    /// Makes a pool, before anybody is in trouble.
    pub async fn ensure_pool(&self, name: &str, policy: &str) -> Option<()> {
        let (service, _) = self.running.as_ref()?;
        service.ensure_pool(name, policy).await.ok().map(|_| ())
    }

    /// The process dies.
    pub fn kill(&mut self) {
        let Some((service, task)) = self.running.take() else { return };
        let silently = self.world.dice.chance(0.3);
        self.world.note(format_args!("{} dies, silently: {silently}", self.host));
        self.world.net.kill(&self.host, silently);
        task.abort();
        // Its own tasks end now; what its connections hold of it ends with them.
        tokio::spawn(service.close());
    }

    /// Everything as it should be.
    pub fn heal(&mut self) {
        self.shaky.store(false, Ordering::SeqCst);
        self.start();
    }
}
