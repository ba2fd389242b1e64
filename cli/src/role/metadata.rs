//! `blobcr metadata`: the few mutable facts of a repository.

use std::path::Path;

use anyhow::Context;
#[cfg(feature = "etcd")]
use blobcr_metadata::store::etcd::EtcdTarget;
use blobcr_metadata::{MetadataService, Options};
use blobcr_proto::v1;
use blobcr_repo_node::server_builder;
use tonic::Status;

use super::directory::Described;
use super::serve::{Ready, Served, bind, until_stopped};
use crate::args::{
    DEFAULT_POOL, MetadataArgs, MetadataCommand, MetadataServerArgs, MetadataStore, Seconds,
};
use crate::exit::{Exit, Refusal, RemoteError};
use crate::interrupt::Interrupts;
use crate::output::Output;

/// Runs the role until it is told to stop, or one of its verbs.
///
/// # Errors
/// When the store or the address cannot be had.
pub async fn run(args: MetadataArgs, output: Output) -> anyhow::Result<()> {
    match (args.command, args.server) {
        #[cfg(feature = "etcd")]
        (Some(MetadataCommand::Migrate { from, to: MetadataStore::Etcd(to) }), _) => {
            migrate(&from, &to, output).await
        }
        (Some(MetadataCommand::Migrate { .. }), _) => {
            let message = "records are moved to an etcd: give --to etcd:URL,URL,…";
            Err(Refusal::new(Exit::Usage, message).into())
        }
        (None, Some(server)) => serve(server, output).await,
        (None, None) => Err(Refusal::new(Exit::Usage, "give --listen and --dir").into()),
    }
}

async fn serve(args: MetadataServerArgs, output: Output) -> anyhow::Result<()> {
    let interrupts = Interrupts::listen()?;
    let (listener, address) = bind(&args.listen).await?;
    let metadata = match (&args.store, &args.dir) {
        (MetadataStore::Sled, Some(dir)) => open(dir, args.node_down_after).await?,
        (MetadataStore::Sled, None) => {
            let message = "--store sled keeps its records in a directory: give --dir";
            return Err(Refusal::new(Exit::Usage, message).into());
        }
        #[cfg(feature = "etcd")]
        (MetadataStore::Etcd(target), _) => {
            blobcr_metadata::open_etcd(target, options(args.node_down_after)).await?
        }
    };
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

/// What `blobcr metadata migrate` says on stdout with `--json`.
#[cfg(feature = "etcd")]
#[derive(Debug, serde::Serialize)]
struct Moved {
    from: String,
    to: String,
    records: u64,
    bytes: u64,
}

#[cfg(feature = "etcd")]
async fn migrate(from: &Path, to: &EtcdTarget, output: Output) -> anyhow::Result<()> {
    let moved = blobcr_metadata::migrate::migrate(from, to).await?;
    let moved = Moved {
        from: from.display().to_string(),
        to: to.to_string(),
        records: moved.records,
        bytes: moved.bytes,
    };
    output.data(&moved, |moved| {
        let Moved { from, to, records, .. } = moved;
        format!("{records} records of {from} are in {to} now, and were compared; {from} is refused from now on")
    })
}

/// Opens the metadata in `dir`.
///
/// # Errors
/// When the directory is in use, or damaged.
pub(super) async fn open(dir: &Path, down_after: Seconds) -> anyhow::Result<MetadataService> {
    Ok(blobcr_metadata::open(dir, options(down_after)).await?)
}

fn options(down_after: Seconds) -> Options {
    Options { down_after: down_after.into(), ..Options::default() }
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
