//! gRPC connections to the roles.

use std::time::Duration;

use blobcr_repository::ConnectOptions;
use blobcr_repository::client::channel;
use tonic::transport::Channel;

use crate::exit::{Exit, Refusal};

/// A role on the same network answers a connection within this, or it is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection to `address`, made when it is first used.
///
/// # Errors
/// When it is no address.
pub fn lazy(address: &str) -> Result<Channel, Refusal> {
    let options = ConnectOptions { connect_timeout: CONNECT_TIMEOUT, ..ConnectOptions::default() };
    channel(address, &options).map_err(|e| Refusal::new(Exit::Usage, e.to_string()))
}

/// A request with a deadline.
pub fn within<T>(deadline: Duration, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(deadline);
    request
}
