//! `blobcr mirror`.

use std::path::PathBuf;

use clap::{Args, value_parser};

use super::{PrefetchArg, StrategyArg};
use crate::size::parse_size;

#[derive(Debug, Args)]
pub struct MirrorArgs {
    /// Address to serve at; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    pub listen: String,
    /// Where the disks and the cache are kept; made if it is missing
    #[arg(long)]
    pub dir: PathBuf,
    /// Metadata servers, comma-separated
    #[arg(long, value_name = "ADDRS", value_delimiter = ',', required = true)]
    pub metadata: Vec<String>,
    /// Where images and disks show; made if it is missing
    #[arg(long)]
    pub mount: PathBuf,
    #[command(flatten)]
    pub limits: MirrorLimits,
}

/// What a mirror may use of its host.
#[derive(Debug, Clone, Args)]
pub struct MirrorLimits {
    /// Bytes of clean chunks to keep on the local disk
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "16G")]
    pub cache: u64,
    /// Memory for the old bytes of chunks that are written while a snapshot is persisted
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "256M")]
    pub aside: u64,
    /// Local disk for those bytes once the memory is full
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "4G")]
    pub spill: u64,
    /// How long a read waits for a repository that cannot be reached
    #[arg(long, value_name = "SECONDS", default_value_t = REPOSITORY_WAIT_S)]
    pub repository_wait: u64,
    /// What is fetched before a guest asks for it
    #[arg(long, value_enum, default_value = "trace")]
    pub prefetch: PrefetchArg,
    /// Bytes a second that are fetched so at most, for all disks together; 0: as fast as it goes
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "0")]
    pub prefetch_rate: u64,
    /// How long to look out for a guest's next request before sleeping, while they come one by one; 0:
    /// not at all
    #[arg(long, value_name = "MICROSECONDS", default_value_t = HALT_POLL_US)]
    pub halt_poll: u32,
    /// By how many steps of nice(1) the threads that persist snapshots give way to guests and to
    /// everything else of this mirror
    #[arg(long, value_name = "STEPS", default_value_t = PERSIST_NICE, value_parser = value_parser!(u8).range(..=19))]
    pub persist_nice: u8,
    /// How a snapshot is kept as it was while its disk is written on
    #[arg(long, value_enum, default_value = "selective")]
    pub strategy: StrategyArg,
}

/// A guest that gets an answer needs 20 to 40 µs to wake, the mirror another 20 to 40 to see what it
/// asks next, and on a busy host both take longer.
const HALT_POLL_US: u32 = 120;

/// A day: guests that see an I/O error turn their file systems read-only for good.
const REPOSITORY_WAIT_S: u64 = 24 * 3600;

/// A quarter of a processor for which something else competes, and all of one that is idle: less would
/// keep a snapshot of a busy host from being stable for too long.
const PERSIST_NICE: u8 = 5;
