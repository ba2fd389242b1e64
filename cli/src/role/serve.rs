//! What every role has in common: a listener, a ready line, an end.

use std::io;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::server::{Router, TcpIncoming};

use crate::interrupt::Interrupts;
use crate::output::{Output, say};

/// Calls under way may finish for so long once a role is told to stop.
const DRAIN: Duration = Duration::from_secs(3);

/// Takes an address to serve at; port 0 takes a free one.
///
/// # Errors
/// When it is no address of this host, or in use.
pub async fn bind(listen: &str) -> anyhow::Result<(TcpListener, String)> {
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("cannot serve at {listen}; give another --listen"))?;
    let address = listener.local_addr()?.to_string();
    Ok((listener, address))
}

/// Services that are being served.
#[derive(Debug)]
pub struct Served {
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Served {
    /// Begins to serve.
    pub fn start(router: Router, listener: TcpListener) -> Self {
        let (stop, mut stopped) = watch::channel(false);
        // The server's own setting is for sockets that it opens itself: with Nagle's algorithm, the
        // first answer on a connection waits 40 ms for the client's delayed acknowledgement.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let task = tokio::spawn(async move {
            let stopped = async move {
                // An error means that the owner is gone: the same.
                let _ = stopped.wait_for(|stop| *stop).await;
            };
            router.serve_with_incoming_shutdown(incoming, stopped).await
        });
        Self { stop, task }
    }

    /// Takes no more calls, lets those under way finish for a while, and ends.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        match tokio::time::timeout(DRAIN, &mut self.task).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(e))) => tracing::warn!(error = %e, "a server ended badly"),
            Ok(Err(e)) => tracing::warn!(error = %e, "a server panicked"),
            Err(_) => self.task.abort(),
        }
    }
}

/// What a role that is ready says on stdout with `--json`.
#[derive(Debug, Serialize)]
pub struct Ready {
    pub role: &'static str,
    pub address: String,
    /// Where disks and images show, for roles that show them.
    pub mount: Option<String>,
}

impl Ready {
    /// Says that the role is ready, and where.
    ///
    /// # Errors
    /// When stdout takes no more.
    pub fn announce(&self, output: Output) -> anyhow::Result<()> {
        let mount = self.mount.as_ref().map(|mount| format!(", mount {mount}")).unwrap_or_default();
        say(&format!("{} is ready at {}{mount}", self.role, self.address));
        output.data(self, |_| String::new())
    }
}

/// Waits for the signal to stop; from then on a second one ends the process at once, after
/// `force`.
///
/// # Errors
/// When no handler can be installed.
pub async fn until_stopped(
    mut interrupts: Interrupts,
    force: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let name = interrupts.next().await;
    say(&format!("{name}: stopping (a second signal forces it)"));
    tokio::spawn(async move {
        let name = interrupts.next().await;
        force();
        say(&format!("{name}: forced to stop"));
        std::process::exit(crate::exit::Exit::Other as i32);
    });
    Ok(())
}
