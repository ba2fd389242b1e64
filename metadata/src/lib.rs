//! The metadata service: the few mutable facts of the repository.
//!
//! ```text
//! service    gRPC: requests in, status codes out; opens a directory; runs the tasks
//!    │
//! version_manager    the rules: what may happen to images, snapshots, leases, pools, nodes, sets
//!    │       │
//! records   store    one file per kind of record │ one trait, several backends
//! ```
//!
//! *Invariant:* everything that is stored is a record of `records`, written by one swap of a
//! [`store::MetaStore`] whose expectations cover what the decision was based on. The service has no
//! state of its own, so any number of copies may run over one shared store.
//!
//! *Invariant:* `store` knows nothing of images; `version_manager` knows nothing of sled or gRPC.

pub mod clock;
pub mod directory;
pub mod error;
mod format;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "etcd")]
pub mod migrate;
pub mod records;
pub mod service;
pub mod store;
pub mod tasks;
pub mod version_manager;

pub use error::Error;
#[cfg(feature = "etcd")]
pub use service::open_etcd;
pub use service::{MetadataService, OpenError, Options, open, service};
