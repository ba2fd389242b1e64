//! `blobcr metadata`.

use std::path::PathBuf;
use std::str::FromStr;

#[cfg(feature = "etcd")]
use blobcr_metadata::store::etcd::{EtcdTarget, TargetError};
use clap::{Args, Subcommand};

use super::parse_policy;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct MetadataArgs {
    #[command(subcommand)]
    pub command: Option<MetadataCommand>,
    #[command(flatten)]
    pub server: Option<MetadataServerArgs>,
}

#[derive(Debug, Args)]
pub struct MetadataServerArgs {
    /// Address to serve at; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    pub listen: String,
    /// Where the records are kept with `--store sled`; made if it is missing
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// The store behind it: `sled`, or `etcd:URL,URL,…[#NAME]` for any number of servers
    #[arg(long, default_value = "sled")]
    pub store: MetadataStore,
    /// Redundancy of the pool `default`, which the first start makes [default: replica:1]
    #[arg(long, value_name = "POLICY", value_parser = parse_policy)]
    pub pool: Option<String>,
    /// Seconds after which a node that is not heard of is down, and its partitions go to others
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = parse_down_after)]
    pub node_down_after: Seconds,
}

/// Seconds, as written on the command line.
#[derive(Debug, Clone, Copy)]
pub struct Seconds(u64);

impl From<Seconds> for std::time::Duration {
    fn from(seconds: Seconds) -> Self {
        Self::from_secs(seconds.0)
    }
}

pub(super) fn parse_down_after(text: &str) -> Result<Seconds, String> {
    let least = blobcr_metadata::version_manager::nodes::DOWN_AFTER_MIN.as_secs();
    match text.parse() {
        Ok(seconds) if seconds >= least => Ok(Seconds(seconds)),
        _ => Err(format!("write seconds, {least} at least: sooner a node is only suspected")),
    }
}

#[derive(Debug, Subcommand)]
pub enum MetadataCommand {
    /// Moves the records of a directory to an etcd, where several servers can use them
    Migrate {
        /// The directory of the metadata server, which must not run
        #[arg(long, value_name = "DIR")]
        from: PathBuf,
        /// `etcd:URL,URL,…[#NAME]`: a repository that is not there yet
        #[arg(long, value_name = "STORE")]
        to: MetadataStore,
    },
}

/// Where a metadata server keeps its records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetadataStore {
    /// In a directory of its own.
    Sled,
    /// In an etcd, with others.
    #[cfg(feature = "etcd")]
    Etcd(EtcdTarget),
}

impl FromStr for MetadataStore {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "sled" => Ok(Self::Sled),
            #[cfg(feature = "etcd")]
            _ => text.parse().map(Self::Etcd).map_err(|e: TargetError| e.to_string()),
            #[cfg(not(feature = "etcd"))]
            _ => Err(format!("{text:?} is no store of this program, which was built without etcd")),
        }
    }
}
