//! `blobcr repo-node`: a chunk server.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use blobcr_proto::v1;
use blobcr_repo_node::{ChunkStore, Options, server_builder, service_that_gives_way};
use blobcr_repository::{CatalogError, ConnectOptions, Repository};
use tokio::net::TcpListener;
use tokio::runtime::Handle;

use super::cluster_file;
use super::directory::Described;
use super::serve::{Ready, Served, bind, until_stopped};
use crate::args::RepoNodeArgs;
use crate::exit::{Exit, Refusal};
use crate::interrupt::Interrupts;
use crate::output::Output;

/// Runs the role until it is told to stop.
///
/// # Errors
/// When the directory or the address cannot be had, or the metadata service refuses the node.
pub async fn run(args: RepoNodeArgs, output: Output) -> anyhow::Result<()> {
    let mut interrupts = Interrupts::listen()?;
    let (listener, address) = bind(&args.listen).await?;
    let advertised = advertised(args.advertise, &listener)?;
    let metadata = Repository::connect(&args.metadata, ConnectOptions::default()).await?;
    let directory = Described::new("repo-node").with_metadata(&args.metadata);
    let node = RepoNode::start(&args.dir, listener, directory, Handle::current()).await?;
    let registration = node.registration(advertised, args.domain)?;
    tokio::select! {
        registered = node.join(&metadata, registration) => {
            let registration = registered?;
            Ready { role: "repo-node", address, mount: None }.announce(output)?;
            let renewing = tokio::spawn(keep_registered(metadata, registration));
            until_stopped(interrupts, || {}).await?;
            renewing.abort();
        }
        // Told to stop before the metadata service was reached.
        name = interrupts.next() => tracing::info!("{name}: stopping"),
    }
    node.stop().await
}

/// The address that others are told.
fn advertised(advertise: Option<String>, listener: &TcpListener) -> anyhow::Result<String> {
    let own: SocketAddr = listener.local_addr()?;
    match advertise {
        Some(address) => Ok(crate::endpoint::checked_address(&address)?),
        None if own.ip().is_unspecified() => {
            let message = format!(
                "others cannot reach a node at {own}; give --listen an address of one network, or \
                 tell them another with --advertise"
            );
            Err(Refusal::new(Exit::Usage, message).into())
        }
        None => Ok(own.to_string()),
    }
}

/// A chunk store that is served.
pub(super) struct RepoNode {
    store: Arc<ChunkStore>,
    served: Served,
    dir: PathBuf,
}

impl RepoNode {
    /// Opens the store in `dir` and serves it. What is put is checked and written by threads of
    /// `background`, and of its priority.
    ///
    /// # Errors
    /// When the directory is in use, or cannot be read.
    pub(super) async fn start(
        dir: &Path,
        listener: TcpListener,
        directory: Described,
        background: Handle,
    ) -> anyhow::Result<Self> {
        let owned = dir.to_owned();
        // The store's threads get the priority of the one that opens it.
        let opened =
            background.spawn_blocking(move || ChunkStore::open(&owned, Options::default()));
        let (store, report) = opened.await??;
        tracing::info!(
            dir = %dir.display(),
            node = store.node_id(),
            records = report.records,
            segments = report.segments,
            read_through = report.segments_scanned,
            findings = report.findings.len(),
            "opened the chunk store"
        );
        let store = Arc::new(store);
        let router = server_builder()
            .add_service(service_that_gives_way(Arc::clone(&store), background))
            .add_service(directory.service());
        Ok(Self { served: Served::start(router, listener), store, dir: dir.to_owned() })
    }

    /// What the metadata service is told of it.
    ///
    /// # Errors
    /// When the directory does not tell which repository it belongs to.
    pub(super) fn registration(
        &self,
        address: String,
        domain: Option<String>,
    ) -> anyhow::Result<v1::RegisterNodeRequest> {
        let id = self.store.node_id();
        let cluster = cluster_file::read(&self.dir)?.unwrap_or_default();
        // Without a domain, each node fails by itself.
        let domain = domain.unwrap_or_else(|| id.clone());
        Ok(v1::RegisterNodeRequest { id, address, domain, cluster })
    }

    /// Registers the node, and notes which repository it belongs to from now on. Returns what to
    /// register it with again.
    ///
    /// # Errors
    /// When the service refuses the node, or is another repository's.
    pub(super) async fn join(
        &self,
        metadata: &Repository,
        registration: v1::RegisterNodeRequest,
    ) -> anyhow::Result<v1::RegisterNodeRequest> {
        let cluster = register(metadata, &registration).await?.cluster;
        if registration.cluster.is_empty() && !cluster.is_empty() {
            cluster_file::write(&self.dir, &cluster)?;
        } else if registration.cluster != cluster {
            let message = format!(
                "the node in {} belongs to the repository {}, and the metadata server to {cluster:?}; \
                 point --metadata at the node's own repository, or give it an empty directory",
                self.dir.display(),
                registration.cluster
            );
            return Err(Refusal::new(Exit::Conflict, message).into());
        }
        Ok(v1::RegisterNodeRequest { cluster, ..registration })
    }

    /// Stops to serve, and leaves the store ready for a quick start.
    ///
    /// # Errors
    /// When the store's threads ended badly.
    pub(super) async fn stop(self) -> anyhow::Result<()> {
        self.served.stop().await;
        let closed = tokio::task::spawn_blocking(move || self.store.close());
        closed.await.context("the chunk store did not close")
    }
}

/// Between two attempts to reach the metadata service.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How often a node says that it is there: several such messages are lost before it is suspected.
const RENEW_EVERY: Duration = Duration::from_secs(3);

/// Registers a node, however long the metadata service takes to be there.
///
/// # Errors
/// When the service refuses the node.
async fn register(
    metadata: &Repository,
    registration: &v1::RegisterNodeRequest,
) -> Result<v1::Node, CatalogError> {
    let mut told = false;
    loop {
        match metadata.catalog().register_node(registration.clone()).await {
            Ok(node) => return Ok(node),
            Err(e) if e.is_transient() || matches!(e, CatalogError::Timeout(_)) => {
                if !told {
                    tracing::warn!(error = %e, "not registered yet; trying again");
                }
                told = true;
            }
            Err(e) => return Err(e),
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// Says again and again that a node is there.
pub(super) async fn keep_registered(metadata: Repository, registration: v1::RegisterNodeRequest) {
    let mut refused = false;
    loop {
        tokio::time::sleep(RENEW_EVERY).await;
        match register(&metadata, &registration).await {
            Ok(_) => refused = false,
            Err(e) if !refused => {
                refused = true;
                tracing::warn!(error = %e, "the metadata service does not take this node any more");
            }
            Err(_) => {}
        }
    }
}
