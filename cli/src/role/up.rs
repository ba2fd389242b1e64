//! `blobcr up`: every role in one process over one directory.
//!
//! ```text
//! DIR/lock        taken by the process that runs here
//! DIR/endpoint    its address, while it is ready
//! DIR/metadata/   DIR/nodes/1/ … N/   DIR/mirror/   DIR/vms/   DIR/mnt/
//! ```
//! The roles talk to each other over loopback as they do over a network: nothing here is special.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use blobcr_ckpt_proxy::{Proxy, ProxyOptions};
use blobcr_metadata::MetadataService;
use blobcr_mirror_fuse::{Background, Host};
use blobcr_proto::policy::Policy;
use blobcr_repo_node::server_builder;
use blobcr_repository::{ConnectOptions, Repository};
use tokio::runtime::Handle;

use super::directory::Described;
use super::limits::raise_open_files;
use super::lock::DirLock;
use super::repo_node::{RepoNode, keep_registered};
use super::serve::{Ready, Served, bind};
use super::steward::Steward;
use super::{metadata, mirror};
use crate::args::UpArgs;
use crate::endpoint::EndpointFile;
use crate::exit::{Exit, Refusal};
use crate::interrupt::Interrupts;
use crate::output::{Output, say};

/// Runs everything until it is told to stop.
///
/// # Errors
/// When the directory is in use, or a role cannot start.
pub async fn run(args: UpArgs, output: Output) -> anyhow::Result<()> {
    let mut interrupts = Interrupts::listen()?;
    raise_open_files();
    let lock = DirLock::take(&args.dir)?;
    EndpointFile::remove_stale(&args.dir)?;
    let dir = args.dir.canonicalize()?;
    let mut roles = Roles::default();
    let started = tokio::select! {
        started = Box::pin(roles.start_repository(&args, &dir)) => Some(started),
        // A node that reads through a large log is not waited for.
        name = interrupts.next() => {
            say(&format!("{name}: stopping before everything was ready"));
            None
        }
    };
    let outcome = match started {
        None => Ok(()),
        Some(Err(failure)) => Err(failure),
        // Quick, and not broken off: a mount that is being made could outlive the process.
        Some(Ok(repository)) => match Box::pin(roles.start_host(&args, &dir, repository)).await {
            Err(failure) => Err(failure),
            Ok(host) => roles.serve(&dir, &host, interrupts, output).await,
        },
    };
    let stopped = roles.stop().await;
    drop(lock);
    outcome.and(stopped)
}

/// The roles that have been started, each to be stopped before what it needs.
#[derive(Default)]
struct Roles {
    address: String,
    metadata: Option<MetadataService>,
    nodes: Vec<RepoNode>,
    /// Say for the nodes that they are there.
    registering: tokio::task::JoinSet<()>,
    host: Option<Host>,
    proxy: Option<Proxy>,
    steward: Option<Steward>,
    /// Where the nodes check and write what is put.
    background: Option<Background>,
    services: Vec<Served>,
}

impl Roles {
    /// Metadata and nodes: what the host's roles need.
    async fn start_repository(&mut self, args: &UpArgs, dir: &Path) -> anyhow::Result<Repository> {
        let nodes = node_count(args, &dir.join("nodes"))?;
        let metadata = metadata::open(&dir.join("metadata"), args.node_down_after).await?;
        self.metadata = Some(metadata.clone());
        // The roles find the metadata at an address of its own: the endpoint answers only when
        // everything behind it is ready.
        let (internal, at) = bind("127.0.0.1:0").await?;
        let router = server_builder().add_service(blobcr_metadata::service(metadata.clone()));
        self.services.push(Served::start(router, internal));
        let repository = Repository::connect(&[at], ConnectOptions::default()).await?;
        // Guests come first on their own machine.
        let background = Background::start(args.limits.persist_nice)?;
        for number in 1..=nodes {
            let dir = dir.join("nodes").join(number.to_string());
            self.start_node(&dir, &repository, background.handle().clone()).await?;
        }
        self.background = Some(background);
        metadata::ensure_pool(&metadata, args.pool.as_deref()).await?;
        self.steward = Some(Steward::start(repository.clone(), &args.schedule));
        Ok(repository)
    }

    async fn start_node(
        &mut self,
        dir: &Path,
        repository: &Repository,
        background: Handle,
    ) -> anyhow::Result<()> {
        let (listener, address) = bind("127.0.0.1:0").await?;
        let directory = Described::new("repo-node");
        let node = RepoNode::start(dir, listener, directory, background).await?;
        let registration = node.registration(address, None)?;
        self.nodes.push(node);
        let node = self.nodes.last().context("a node was started")?;
        let registration = node.join(repository, registration).await?;
        self.registering.spawn(keep_registered(repository.clone(), registration));
        Ok(())
    }

    /// Mirror, proxy and the endpoint that serves everything.
    async fn start_host(
        &mut self,
        args: &UpArgs,
        dir: &Path,
        repository: Repository,
    ) -> anyhow::Result<Host> {
        let metadata = self.metadata.clone().context("the metadata has not been started")?;
        let (listener, address) = bind(&args.listen).await?;
        let mount = args.mount.clone().unwrap_or_else(|| dir.join("mnt"));
        let host = mirror::start(&dir.join("mirror"), &mount, &args.limits, repository).await?;
        self.host = Some(host.clone());
        let options = ProxyOptions {
            guests: args.doors.guests,
            vsock: args.doors.vsock,
            ..ProxyOptions::new(dir.join("vms"), address.clone())
        };
        let proxy = Proxy::start(options)?;
        self.proxy = Some(proxy.clone());
        let router = server_builder()
            .add_service(blobcr_metadata::service(metadata))
            .add_service(host.service())
            .add_service(proxy.service())
            .add_service(Described::new("up").service());
        self.services.push(Served::start(router, listener));
        self.address = address;
        Ok(host)
    }

    /// Says that everything is ready, and returns when it is to stop.
    async fn serve(
        &self,
        dir: &Path,
        host: &Host,
        interrupts: Interrupts,
        output: Output,
    ) -> anyhow::Result<()> {
        let endpoint = EndpointFile::publish(dir, &self.address)
            .with_context(|| format!("cannot write to {}", dir.display()))?;
        let mount = Some(host.mount_point().display().to_string());
        Ready { role: "up", address: self.address.clone(), mount }.announce(output)?;
        mirror::until_stopped_or_unmounted(interrupts, host).await?;
        drop(endpoint);
        Ok(())
    }

    /// Stops what was started, whatever fails on the way.
    async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(proxy) = self.proxy.take()
            && tokio::time::timeout(PROXY_STOP, proxy.stop()).await.is_err()
        {
            tracing::warn!("a request of a VM was still under way");
        }
        if let Some(steward) = self.steward.take() {
            steward.stop().await;
        }
        let mut outcome = Ok(());
        if let Some(host) = self.host.take() {
            outcome = host.stop().await.map_err(anyhow::Error::from);
        }
        for served in self.services.drain(..).rev() {
            served.stop().await;
        }
        self.registering.shutdown().await;
        for node in self.nodes.drain(..) {
            outcome = outcome.and(node.stop().await);
        }
        if let Some(metadata) = self.metadata.take() {
            metadata.close().await;
        }
        outcome
    }
}

/// A guest that waits for a stable snapshot may wait long: it asks again when the host is back.
const PROXY_STOP: Duration = Duration::from_secs(5);

/// How many nodes to run: those that have data, those that were asked for, or what the policy
/// needs.
fn node_count(args: &UpArgs, nodes: &Path) -> anyhow::Result<u32> {
    let existing =
        existing_nodes(nodes).with_context(|| format!("cannot read {}", nodes.display()))?;
    let needed = match &args.pool {
        Some(policy) => {
            let policy: Policy =
                policy.parse().map_err(|e| Refusal::new(Exit::Usage, format!("--pool: {e}")))?;
            policy.nodes() as u32
        }
        None => 1,
    };
    if let Some(asked) = args.nodes {
        if asked < needed {
            let message = format!(
                "--pool {} needs {needed} nodes and --nodes gives {asked}",
                args.pool.as_deref().unwrap_or_default()
            );
            return Err(Refusal::new(Exit::Usage, message).into());
        }
        if asked < existing {
            tracing::warn!(existing, asked, "all nodes that have data are started");
        }
    }
    Ok(args.nodes.unwrap_or(needed).max(existing))
}

/// The highest number of a node that has a directory.
fn existing_nodes(nodes: &Path) -> io::Result<u32> {
    let entries = match fs::read_dir(nodes) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut highest = 0;
    for entry in entries {
        let number = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        highest = highest.max(number.unwrap_or(0));
    }
    Ok(highest)
}
