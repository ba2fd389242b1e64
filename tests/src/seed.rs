//! The seed with which a soak begins.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

/// `BLOBCR_SEED`; where it is not set, the seconds since 1970.
///
/// # Errors
/// When it is no number.
pub fn first() -> Result<u64> {
    match std::env::var("BLOBCR_SEED") {
        Ok(given) => given.parse().context("BLOBCR_SEED is a number"),
        Err(_) => Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs()),
    }
}
