//! `blobcr proxy`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub struct ProxyArgs {
    /// The mirror of this host
    #[arg(long, value_name = "ADDR")]
    pub mirror: String,
    /// Where each VM's socket is made; made if it is missing
    #[arg(long, value_name = "DIR")]
    pub sockets: PathBuf,
    /// Address to serve the `vm` verbs at; the mirror tells it to who asks there
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub listen: String,
    #[command(flatten)]
    pub doors: GuestDoors,
}

/// Where guests are served that have no socket on this host.
#[derive(Debug, Clone, Copy, Args)]
pub struct GuestDoors {
    /// Address at which guests with a token are served; without it, none over TCP
    #[arg(long, value_name = "ADDR")]
    pub guests: Option<SocketAddr>,
    /// Port at which guests are served over vsock; without it, none are
    #[arg(
        long,
        value_name = "PORT",
        value_parser = clap::value_parser!(u32).range(1..i64::from(u32::MAX))
    )]
    pub vsock: Option<u32>,
}
