//! `blobcr metadata`: the few mutable facts of a repository.

use std::path::Path;

use anyhow::Context;
use blobcr_metadata::{MetadataService, Options};
use blobcr_proto::v1;
use blobcr_repo_node::server_builder;
use tonic::Status;

use super::directory::Described;
use super::serve::{Ready, Served, bind, until_stopped};
use crate::args::{DEFAULT_POOL, MetadataArgs, Seconds};
use crate::exit::RemoteError;
use crate::interrupt::Interrupts;
use crate::output::Output;

/// Runs the role until it is told to stop.
///
/// # Errors
/// When the directory or the address cannot be had.
pub async fn run(args: MetadataArgs, output: Output) -> anyhow::Result<()> {
    let interrupts = Interrupts::listen()?;
    let (listener, address) = bind(&args.listen).await?;
    let metadata = open(&args.dir, args.node_down_after).await?;
    ensure_pool(&metadata, args.pool.as_deref()).await?;
    let router = server_builder()
        .add_service(blobcr_metadata::service(metadata.clone()))
        .add_service(Described::new("metadata").service());
    let served = Served::start(router, listener);
    Ready { role: "metadata", address, mount: None }.announce(output)?;
    until_stopped(interrupts, || {}).await?;
    served.stop().await;
    metadata.close().await;
    Ok(())
}

/// Opens the metadata in `dir`.
///
/// # Errors
/// When the directory is in use, or damaged.
pub(super) async fn open(dir: &Path, down_after: Seconds) -> anyhow::Result<MetadataService> {
    let options = Options { down_after: down_after.into(), ..Options::default() };
    Ok(blobcr_metadata::open(dir, options).await?)
}

/// What a repository promises whose operator said nothing.
const DEFAULT_POLICY: &str = "replica:1";

/// Makes the pool `default` where it is missing.
///
/// # Errors
/// When `policy` is none, or the pool has another one.
pub(super) async fn ensure_pool(
    metadata: &MetadataService,
    policy: Option<&str>,
) -> anyhow::Result<()> {
    let by_name = v1::PoolRef { name: DEFAULT_POOL.to_owned(), id: 0 };
    let policy = match (policy, metadata.manager().get_pool(by_name).await) {
        (None, Ok(_)) => return Ok(()),
        (None, Err(_)) => DEFAULT_POLICY,
        (Some(policy), _) => policy,
    };
    metadata
        .ensure_pool(DEFAULT_POOL, policy)
        .await
        .map_err(|e| RemoteError::from(&Status::from(e)))
        .with_context(|| format!("cannot have the pool {DEFAULT_POOL} as {policy}"))?;
    Ok(())
}
