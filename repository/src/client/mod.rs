//! The repository over gRPC.

mod catalog;
mod dial;
mod link;
mod pool;
mod status;

use std::sync::Arc;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

pub use catalog::RemoteCatalog;
pub use dial::{Connection, Dial};
pub use pool::{RemotePool, RemotePools};

use crate::clock::{Clock, MonotonicClock};

/// Windows of HTTP/2, by stream and by connection: several chunks on their way at once, where the
/// defaults would have a sender wait for every second one. Fixed, because adaptive windows are
/// not predictable.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Frames of up to 1 MiB (the default is 16 KiB): a chunk is one frame, not sixteen.
const FRAME_BYTES: u32 = 1 << 20;
/// How often an idle or waiting connection is asked whether it lives, and how long it may take:
/// a host that lost its power is found out by this alone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A server hears of a deadline so much later, so that a call which takes too long ends here, with
/// an error that says so.
const DEADLINE_MARGIN: Duration = Duration::from_millis(250);

/// A request that tells the server for how long its answer is waited for.
fn timed<T>(message: T, deadline: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(deadline + DEADLINE_MARGIN);
    request
}

/// How a client talks to the repository.
#[derive(Clone)]
pub struct ConnectOptions {
    /// For a connection to come about.
    pub connect_timeout: Duration,
    /// For a call of the metadata service, with everything that is tried within it.
    pub metadata_deadline: Duration,
    /// For one metadata server to answer before the next is asked.
    pub metadata_attempt: Duration,
    /// For one node to answer a read or a question.
    pub read_deadline: Duration,
    /// For one node to make a put durable.
    pub write_deadline: Duration,
    /// Connections to each node. One connection is one task, so about one core.
    pub channels_per_node: usize,
    /// Times the compression.
    pub clock: Arc<dyn Clock>,
    /// Makes the connections; `None`: TCP.
    pub dial: Option<Arc<dyn Dial>>,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(3),
            metadata_deadline: Duration::from_secs(15),
            metadata_attempt: Duration::from_secs(5),
            read_deadline: Duration::from_secs(10),
            // A disk that is busy with other writers may take seconds for an fsync.
            write_deadline: Duration::from_secs(30),
            channels_per_node: 2,
            clock: Arc::new(MonotonicClock::default()),
            dial: None,
        }
    }
}

impl std::fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectOptions")
            .field("connect_timeout", &self.connect_timeout)
            .field("metadata_deadline", &self.metadata_deadline)
            .field("metadata_attempt", &self.metadata_attempt)
            .field("read_deadline", &self.read_deadline)
            .field("write_deadline", &self.write_deadline)
            .field("channels_per_node", &self.channels_per_node)
            .field("dial", &self.dial)
            .finish_non_exhaustive()
    }
}

/// A channel to `address` (`host:port`, or a URL) with the settings of the data path. It connects
/// when it is first used, and again whenever the connection was lost.
///
/// # Errors
/// When the address makes no sense. Needs a tokio runtime.
pub fn channel(address: &str, options: &ConnectOptions) -> Result<Channel, AddressError> {
    let url =
        if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let endpoint = Endpoint::from_shared(url)
        .ok()
        .filter(|endpoint| endpoint.uri().host().is_some_and(|host| !host.is_empty()))
        .filter(|endpoint| endpoint.uri().port_u16().is_some_and(|port| port != 0))
        .ok_or_else(|| AddressError(address.to_owned()))?;
    let endpoint = endpoint
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(match &options.dial {
        None => endpoint.connect_lazy(),
        Some(dial) => endpoint.connect_with_connector_lazy(dial::Dialer(Arc::clone(dial))),
    })
}

/// An address that is no `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address of a server; write HOST:PORT")]
pub struct AddressError(pub String);

#[cfg(test)]
mod tests;
