//! The mount of a [`Front`], from its making to its end.

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::{Config, INodeNo, MountOption, Notifier, Session, SessionACL, SessionUnmounter};
use tokio::sync::watch;

use super::{Front, FrontOptions};
use crate::mount::{self, MountError};

/// How long the threads of the mount may take to end once nothing is mounted any more.
const END_MAX: Duration = Duration::from_secs(5);
/// How often that is looked at.
const END_POLL: Duration = Duration::from_millis(1);

/// A [`Front`] that is mounted. Dropping it unmounts.
#[derive(Debug)]
pub(crate) struct Mounted {
    point: PathBuf,
    unmounter: SessionUnmounter,
    notifier: Notifier,
    /// Set when the threads of the mount have ended.
    ended: watch::Receiver<bool>,
    unmounted: bool,
}

/// Mounts at `point`, which [`mount::prepare`] has found fit.
pub(crate) fn mount(
    front: Front,
    point: &Path,
    options: FrontOptions,
) -> Result<Mounted, MountError> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(mount::SOURCE.to_owned()),
        MountOption::Subtype(mount::SOURCE.to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoAtime,
    ];
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    let refused = |source: io::Error| match source.kind() {
        io::ErrorKind::PermissionDenied if options.allow_other => MountError::AllowOther,
        _ => MountError::Refused { point: point.to_owned(), source },
    };
    let polling = Arc::clone(&front.polling);
    let mut session = Session::new(front, point, &config).map_err(refused)?;
    polling.watch(session.as_fd().try_clone_to_owned().map_err(refused)?);
    let (unmounter, notifier) = (session.unmount_callable(), session.notifier());
    let (end, ended) = watch::channel(false);
    let serve = move || {
        if let Err(error) = session.run() {
            tracing::error!(%error, "the mount has ended");
        }
        end.send_replace(true);
    };
    std::thread::Builder::new().name("mount".to_owned()).spawn(serve).map_err(refused)?;
    Ok(Mounted { point: point.to_owned(), unmounter, notifier, ended, unmounted: false })
}

impl Mounted {
    /// Set when nothing is mounted any more: by us, or by somebody else.
    pub(crate) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.clone()
    }

    /// Makes the kernel forget a name that is gone. Blocks.
    pub(crate) fn forget(&self, parent: u64, name: &str) {
        if let Err(error) = self.notifier.inval_entry(INodeNo(parent), OsStr::new(name)) {
            tracing::debug!(%error, name, "the kernel was not told that a name is gone");
        }
    }

    /// Takes the mount from the tree, even when files are open: where the system lets us, whoever has
    /// them gets errors from then on. Blocks. Does nothing the second time.
    pub(crate) fn unmount(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.unmounted, true) || *self.ended.borrow() {
            return Ok(());
        }
        let Err(error) = self.unmounter.unmount() else { return Ok(()) };
        let point = self.point.display();
        tracing::warn!(%error, %point, "the mount is in use; whoever uses it gets errors from now on");
        mount::detach(&self.point, true)
    }

    /// Blocks until no request is served any more, for some seconds at most. They may be too few
    /// when files are open and only root could have aborted what their owners wait for.
    pub(crate) fn wait_ended(&self) {
        let deadline = Instant::now() + END_MAX;
        while !*self.ended.borrow() {
            if Instant::now() > deadline {
                let point = self.point.display();
                tracing::warn!(%point, "files are still open; they end with this process");
                return;
            }
            std::thread::sleep(END_POLL);
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::error!(%error, point = %self.point.display(), "cannot be unmounted");
        }
        self.wait_ended();
    }
}
