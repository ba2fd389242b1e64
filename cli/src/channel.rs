//! gRPC connections to and from the roles: one set of settings for both ends.

use std::time::Duration;

use blobcr_repository::client::channel;
use tonic::transport::{Channel, Server};

use crate::exit::{Exit, Refusal};

/// A role on the same network answers a connection within this, or it is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that went away without a word is noticed after two of these.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// One stream may have a whole 4 MiB chunk on its way.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Eight chunks of the largest size on their way per connection.
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Fewer, larger frames: hyper's 16 KiB cost measurably more CPU per byte.
const FRAME_BYTES: u32 = 1 << 20;

/// A server with the settings that the data path wants.
pub fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
}

/// A connection to `address`, made when it is first used.
///
/// # Errors
/// When it is no address.
pub fn lazy(address: &str) -> Result<Channel, Refusal> {
    channel(address, CONNECT_TIMEOUT).map_err(|e| Refusal::new(Exit::Usage, e.to_string()))
}

/// A request with a deadline.
pub fn within<T>(deadline: Duration, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(deadline);
    request
}
