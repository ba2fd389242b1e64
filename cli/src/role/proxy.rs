//! `blobcr proxy`: the checkpoint channels of a host's VMs.

use std::time::Duration;

use blobcr_ckpt_proxy::{Proxy, ProxyOptions};
use blobcr_proto::v1;
use blobcr_proto::v1::directory_client::DirectoryClient;
use blobcr_repo_node::server_builder;

use super::directory::Described;
use super::serve::{Ready, Served, bind, until_stopped};
use crate::args::ProxyArgs;
use crate::channel::{lazy, within};
use crate::endpoint::checked_address;
use crate::interrupt::Interrupts;
use crate::output::Output;

/// Runs the role until it is told to stop.
///
/// # Errors
/// When the sockets or the address cannot be had.
pub async fn run(args: ProxyArgs, output: Output) -> anyhow::Result<()> {
    let interrupts = Interrupts::listen()?;
    let mirror = checked_address(&args.mirror)?;
    let (listener, address) = bind(&args.listen).await?;
    // What `vm add` prints must be right in any directory.
    let sockets = std::path::absolute(&args.sockets)?;
    let options = ProxyOptions {
        guests: args.doors.guests,
        vsock: args.doors.vsock,
        ..ProxyOptions::new(sockets, &mirror)
    };
    let proxy = Proxy::start(options)?;
    let directory = Described::new("proxy").with_mirror(&mirror);
    let router = server_builder().add_service(proxy.service()).add_service(directory.service());
    let served = Served::start(router, listener);
    let announcing = tokio::spawn(announce(mirror, address.clone()));
    Ready { role: "proxy", address, mount: None }.announce(output)?;
    until_stopped(interrupts, || {}).await?;
    announcing.abort();
    proxy.stop().await;
    served.stop().await;
    Ok(())
}

/// How often the mirror is told: a mirror that was started again knows within this.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(2);

/// Tells the mirror where this proxy is, again and again.
async fn announce(mirror: String, address: String) {
    let Ok(channel) = lazy(&mirror) else { return };
    let mut client = DirectoryClient::new(channel);
    let mut was_told = None;
    loop {
        let request = v1::AnnounceProxyRequest { address: address.clone() };
        let told = client.announce_proxy(within(ANNOUNCE_EVERY, request)).await;
        if was_told != Some(told.is_ok()) {
            match &told {
                Ok(_) => tracing::info!(mirror, "the mirror knows this proxy"),
                Err(e) => tracing::warn!(mirror, error = e.message(), "the mirror does not answer"),
            }
        }
        was_told = Some(told.is_ok());
        tokio::time::sleep(ANNOUNCE_EVERY).await;
    }
}
