//! `blobcr up`.

use std::path::PathBuf;

use clap::Args;

use super::metadata::{Seconds, parse_down_after};
use super::{GuestDoors, MirrorLimits, StewardSchedule, parse_policy};

#[derive(Debug, Args)]
pub struct UpArgs {
    /// Where everything is kept; made if it is missing
    #[arg(long)]
    pub dir: PathBuf,
    /// Repository nodes [default: as many as the directory has, or as the policy needs]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub nodes: Option<u32>,
    /// Redundancy of the pool `default`, which the first start makes [default: replica:1]
    #[arg(long, value_name = "POLICY", value_parser = parse_policy)]
    pub pool: Option<String>,
    /// Where images and disks show [default: DIR/mnt]
    #[arg(long)]
    pub mount: Option<PathBuf>,
    /// Address to serve at; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub listen: String,
    #[command(flatten)]
    pub doors: GuestDoors,
    /// Seconds after which a node that is not heard of is down, and its partitions go to others
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = parse_down_after)]
    pub node_down_after: Seconds,
    #[command(flatten)]
    pub limits: MirrorLimits,
    #[command(flatten)]
    pub schedule: StewardSchedule,
}
