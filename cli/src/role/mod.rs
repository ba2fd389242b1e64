//! The roles: processes that serve until they are told to stop.

pub(crate) mod cluster_file;
pub mod directory;
pub mod limits;
pub mod lock;
pub mod metadata;
pub mod mirror;
pub mod proxy;
pub mod repo_node;
pub mod serve;
pub mod steward;
pub mod up;
