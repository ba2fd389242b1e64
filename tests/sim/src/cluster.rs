//! All parts of a run: two metadata servers over one store, nodes, writers, readers, stewards.

use std::sync::Arc;
use std::time::Duration;

use blobcr_metadata::store::memory::MemoryStore;
use blobcr_repository::Repository;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::metadata::MetadataHost;
use crate::node::NodeHost;
use crate::world::World;
use crate::writer::{Base, SharedDisk, Writer, fresh, import_base};
use crate::{reader, stewarding};

/// The pools: name and policy.
const POOLS: [(&str, &str); 2] = [("copies", "replica:3"), ("shards", "ec:4+2")];

/// As many as `ec:4+2` needs, and sometimes one more.
const NODES: u64 = 6;

/// Leases and whatever else is awaited at the end has run out by then, whatever the clocks say.
const UNTIL_LEASES_END: Duration = Duration::from_secs(80);

/// A host with a writer, or with one that is dead.
#[derive(Debug)]
pub struct WriterHost {
    /// Its name in the network.
    pub host: String,
    disk: SharedDisk,
    base: Base,
    life: Option<(AbortHandle, watch::Sender<bool>)>,
}

/// A host whose process has no state.
#[derive(Debug)]
pub struct OtherHost {
    /// Its name in the network.
    pub host: String,
    is_reader: bool,
    life: Option<AbortHandle>,
}

/// See the module.
#[derive(Debug)]
pub struct Cluster {
    /// What the parts share.
    pub world: World,
    /// The metadata servers.
    pub metadata: Vec<MetadataHost>,
    /// The repository nodes.
    pub nodes: Vec<NodeHost>,
    /// The writers.
    pub writers: Vec<WriterHost>,
    /// Readers and stewards.
    pub others: Vec<OtherHost>,
    /// Where the metadata servers are.
    pub addresses: Vec<String>,
}

impl Cluster {
    /// Everything started, and the images there that writers clone.
    pub async fn start(world: &World) -> Option<Self> {
        let store = Arc::new(MemoryStore::new());
        let host = |at: usize| MetadataHost::new(world, format!("metadata-{at}"), &store);
        let mut metadata: Vec<MetadataHost> = (0..2).map(host).collect();
        metadata.iter_mut().for_each(MetadataHost::start);
        let addresses = metadata.iter().map(|server| format!("{}:1", server.host)).collect();
        let nodes = NODES + world.dice.of(0..2);
        let nodes = (0..nodes as usize).map(|number| NodeHost::new(world, number)).collect();
        let (writers, others) = (Vec::new(), Vec::new());
        let mut cluster =
            Self { world: world.clone(), metadata, nodes, writers, others, addresses };
        cluster.nodes.iter_mut().for_each(|node| node.start(&cluster.addresses));
        sleep(Duration::from_secs(2)).await;
        for (pool, policy) in POOLS {
            cluster.metadata[0].ensure_pool(pool, policy).await?;
            let (name, chunks) = (format!("base-{pool}"), world.dice.of(3..8) as usize);
            let base = import_base(world, &cluster.addresses, &name, pool, chunks).await?;
            for _ in 0..world.dice.of(1..3) {
                cluster.add_writer(base.clone());
            }
        }
        for (host, is_reader) in [("reader-0", true), ("steward-0", false), ("steward-1", false)] {
            cluster.others.push(OtherHost { host: host.to_owned(), is_reader, life: None });
        }
        cluster.start_others();
        Some(cluster)
    }

    fn add_writer(&mut self, base: Base) {
        let host = format!("writer-{}", self.writers.len());
        let disk = Arc::new(tokio::sync::Mutex::new(fresh(&host, &base)));
        self.writers.push(WriterHost { host, disk, base, life: None });
    }

    /// Starts what is not running of writers, readers and stewards.
    pub fn start_others(&mut self) {
        for writer in &mut self.writers {
            if !writer.is_up() {
                writer.start(&self.world, &self.addresses);
            }
        }
        for other in self.others.iter_mut().filter(|other| other.life.is_none()) {
            let (world, host) = (self.world.clone(), other.host.clone());
            let addresses = self.addresses.clone();
            let task = if other.is_reader {
                tokio::spawn(reader::run(world, host, addresses))
            } else {
                tokio::spawn(stewarding::run(world, host, addresses))
            };
            other.life = Some(task.abort_handle());
        }
    }

    /// Starts the metadata servers and nodes that are down.
    pub fn start_servers(&mut self) {
        self.metadata.iter_mut().for_each(MetadataHost::start);
        self.nodes.iter_mut().for_each(|node| node.start(&self.addresses));
    }

    /// A client of somebody who is never in trouble.
    ///
    /// # Errors
    /// Never, for addresses of a run.
    pub async fn client(&self) -> anyhow::Result<Repository> {
        let options = crate::options(&self.world, "admin");
        Ok(Repository::connect(&self.addresses, options).await?)
    }

    /// Everything is mended, work ends, and what must hold then is checked.
    pub async fn settle(&mut self) -> anyhow::Result<()> {
        self.world.note(format_args!("no more trouble"));
        self.world.net.heal();
        self.metadata.iter_mut().for_each(MetadataHost::heal);
        for node in &mut self.nodes {
            node.heal(&self.addresses);
        }
        for other in &mut self.others {
            other.kill(&self.world);
        }
        sleep(Duration::from_secs(5)).await;
        for writer in &mut self.writers {
            writer.end(&self.world).await;
        }
        sleep(UNTIL_LEASES_END).await;
        let repository = self.client().await?;
        let nodes: Vec<String> =
            self.nodes.iter().filter_map(|node| Some(node.store()?.node_id())).collect();
        stewarding::settle(&self.world, &repository, &nodes).await;
        let fresh = self.client().await?;
        reader::read_all(&self.world, &fresh).await;
        for node in &self.nodes {
            if let Some(store) = node.store() {
                self.world.oracle.nothing_unreachable(node.number, store);
            }
        }
        Ok(())
    }
}

impl WriterHost {
    /// Whether it runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.life.as_ref().is_some_and(|(task, _)| !task.is_finished())
    }

    fn start(&mut self, world: &World, addresses: &[String]) {
        let (stop, stopped) = watch::channel(false);
        let (world, host, addresses) = (world.clone(), self.host.clone(), addresses.to_vec());
        let (disk, base) = (Arc::clone(&self.disk), self.base.clone());
        world.note(format_args!("{host} starts"));
        let task = tokio::spawn(async move {
            let mut disk = disk.lock().await;
            if let Ok(writer) = Writer::start(&world, &host, &addresses, stopped).await {
                Box::pin(writer.run(&mut disk, &base)).await;
            }
        });
        self.life = Some((task.abort_handle(), stop));
    }

    /// The host dies.
    pub fn kill(&mut self, world: &World) {
        if let Some((task, _)) = self.life.take() {
            world.note(format_args!("{} dies", self.host));
            world.net.kill(&self.host, world.dice.chance(0.5));
            task.abort();
        }
    }

    /// It ends by itself, or else dies.
    async fn end(&mut self, world: &World) {
        let Some((task, stop)) = &self.life else { return };
        stop.send_replace(true);
        let ended = async {
            while !task.is_finished() {
                sleep(Duration::from_millis(500)).await;
            }
        };
        if timeout(Duration::from_secs(60), ended).await.is_err() {
            self.kill(world);
        }
    }
}

impl OtherHost {
    /// The process dies.
    pub fn kill(&mut self, world: &World) {
        if let Some(task) = self.life.take() {
            world.note(format_args!("{} dies", self.host));
            world.net.kill(&self.host, false);
            task.abort();
        }
    }
}
