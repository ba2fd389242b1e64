//! `blobcr mirror`: the disks of a host, served through FUSE.

use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blobcr_mirror_fuse::{Host, HostOptions};
use blobcr_repo_node::server_builder;
use blobcr_repository::{ConnectOptions, Repository};

use super::directory::Described;
use super::limits::raise_open_files;
use super::serve::{Ready, Served, bind, until_stopped};
use crate::args::{MirrorArgs, MirrorLimits};
use crate::interrupt::Interrupts;
use crate::output::Output;

/// Runs the role until it is told to stop.
///
/// # Errors
/// When the directory, the mount point or the address cannot be had.
pub async fn run(args: MirrorArgs, output: Output) -> anyhow::Result<()> {
    let interrupts = Interrupts::listen()?;
    raise_open_files();
    let (listener, address) = bind(&args.listen).await?;
    let repository = Repository::connect(&args.metadata, ConnectOptions::default()).await?;
    let host = start(&args.dir, &args.mount, &args.limits, repository).await?;
    let directory = Described::new("mirror").with_metadata(&args.metadata).expecting_proxy();
    let router = server_builder().add_service(host.service()).add_service(directory.service());
    let served = Served::start(router, listener);
    let mount = Some(host.mount_point().display().to_string());
    Ready { role: "mirror", address, mount }.announce(output)?;
    until_stopped_or_unmounted(interrupts, &host).await?;
    let stopped = host.stop().await;
    served.stop().await;
    Ok(stopped?)
}

/// Opens the disks in `dir` and mounts at `mount`, which is made if it is missing.
///
/// # Errors
/// When the directory is in use, or the mount point is not fit.
pub(super) async fn start(
    dir: &Path,
    mount: &Path,
    limits: &MirrorLimits,
    repository: Repository,
) -> anyhow::Result<Host> {
    match std::fs::create_dir(mount) {
        // Whether it is a directory, and fit, is told by the mirror itself; a dead mount that a
        // killed one left cannot even be looked at.
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            tracing::debug!(mount = %mount.display(), error = %e, "the mount point was not made");
        }
        _ => {}
    }
    let options = HostOptions {
        cache_bytes: limits.cache,
        aside_bytes: limits.aside,
        spill_bytes: limits.spill,
        repository_wait: Duration::from_secs(limits.repository_wait),
        prefetch: limits.prefetch.into(),
        prefetch_rate: NonZeroU64::new(limits.prefetch_rate),
        halt_poll: Duration::from_micros(limits.halt_poll.into()),
        persist_nice: limits.persist_nice,
        strategy: limits.strategy.into(),
        allow_other: others_may_enter(),
        ..HostOptions::new(dir, mount)
    };
    Ok(Host::start(options, repository).await?)
}

/// Where the system lists what ordinary users may do with FUSE.
const FUSE_CONF: &str = "/etc/fuse.conf";

/// Lets other users into the mount where this user may.
fn others_may_enter() -> bool {
    let allowed = crate::doctor::others_may_enter(Path::new(FUSE_CONF));
    if !allowed {
        tracing::warn!(
            "only this user can see the mount; add the line user_allow_other to {FUSE_CONF} for \
             hypervisors of other users"
        );
    }
    allowed
}

/// Returns when the role is told to stop, or somebody unmounted it from outside.
///
/// # Errors
/// When no handler can be installed.
pub(super) async fn until_stopped_or_unmounted(
    interrupts: Interrupts,
    host: &Host,
) -> io::Result<()> {
    let point = host.mount_point().to_owned();
    tokio::select! {
        stopped = until_stopped(interrupts, move || detach(&point)) => stopped,
        () = host.unmounted() => {
            tracing::warn!("the mount was taken away from outside: stopping");
            Ok(())
        }
    }
}

/// Takes the mount out of the tree at once, for a process that is about to end by force.
fn detach(point: &PathBuf) {
    use rustix::mount::{UnmountFlags, unmount};
    if unmount(point, UnmountFlags::DETACH).is_err() {
        // Not root: the helper may.
        let _ =
            std::process::Command::new("fusermount3").args(["-u", "-z", "--"]).arg(point).status();
    }
}
