//! What runs in a guest: asking the host for a CHECKPOINT of the guest's disks.
//!
//! ```no_run
//! # fn main() -> Result<(), blobcr_guest::GuestError> {
//! use std::time::Duration;
//! use blobcr_guest::{Ask, Client, Deadline, Target, flush};
//!
//! let client = Client::new(Target::port());
//! flush::everything()?;
//! let taken = client.checkpoint(&Ask::new(), Deadline::after(Duration::from_secs(60)))?;
//! client.wait_stable(&taken.snapshots, Deadline::after(Duration::from_secs(600)))?;
//! # Ok(()) }
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`client`] | [`Client`]: the requests, sent again for as long as their answer may still come |
//! | `link` | the byte stream to the host, which goes away and comes back |
//! | [`target`] | which way that is, and how people name it |
//! | [`freeze`] | holds file systems still around a request |
//! | [`flush`] | brings what the guest's kernel holds back onto its disks |
//! | [`worker`] | a computation that can be checked after a restart; for the demo and the tests |
//! | [`report`] | what the programs print |

pub mod client;
mod deadline;
mod error;
pub mod flush;
pub mod freeze;
mod link;
pub mod report;
pub mod target;
pub mod worker;

pub use client::{Ask, Client};
pub use deadline::Deadline;
pub use error::GuestError;
pub use target::{Credentials, PORT_NAME, Place, Target};
