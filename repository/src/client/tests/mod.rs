//! The clients against real servers over real sockets.

mod catalog;
mod pool;
mod servers;

use std::time::Duration;

use super::*;

/// Short, for tests in which nobody answers.
fn impatient() -> ConnectOptions {
    ConnectOptions {
        connect_timeout: Duration::from_millis(500),
        metadata_deadline: Duration::from_millis(1500),
        metadata_attempt: Duration::from_millis(500),
        read_deadline: Duration::from_secs(1),
        // Long enough for a loaded machine to move megabytes.
        write_deadline: Duration::from_secs(10),
        ..ConnectOptions::default()
    }
}

#[tokio::test]
async fn addresses_that_make_no_sense_are_refused() {
    for bad in ["", "host", "host:", ":7000", "host:0", "host:70000", "a b:1", "http://", "unix:/x"]
    {
        let error = channel(bad, &ConnectOptions::default()).unwrap_err();
        assert_eq!(error, AddressError(bad.into()));
    }
    for good in ["127.0.0.1:7000", "localhost:1", "[::1]:7000", "http://host:7000"] {
        channel(good, &ConnectOptions::default()).unwrap();
    }
}
