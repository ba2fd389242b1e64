//! `blobcr disk`.

use blobcr_proto::name::parse_snapshot_number;
use blobcr_proto::{DiskName, ImageSpec};
use clap::Subcommand;

use crate::size::parse_size;

#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Makes a writable disk of a snapshot and prints the path of its raw file
    Attach {
        #[arg(value_name = "IMAGE[@N]")]
        source: ImageSpec,
        disk: DiskName,
        /// Grow the disk to this size
        #[arg(long, value_parser = parse_size)]
        size: Option<u64>,
    },
    /// Makes disks DISK-1, DISK-2, … of one snapshot at once, and prints the paths of their files
    Fork {
        #[arg(value_name = "IMAGE[@N]")]
        source: ImageSpec,
        disk: DiskName,
        /// How many
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=FORKS_MAX))]
        count: u32,
        /// Grow the disks to this size
        #[arg(long, value_parser = parse_size)]
        size: Option<u64>,
    },
    /// Lists the disks of this host
    List,
    /// Tells about one disk
    Info { disk: DiskName },
    /// Removes a disk from this host; its snapshots stay in the repository
    Detach {
        disk: DiskName,
        /// Throw away what is in no stable snapshot
        #[arg(long)]
        discard_changes: bool,
    },
    /// Makes a snapshot of a disk in the background
    Checkpoint {
        disk: DiskName,
        /// Return when it is stable
        #[arg(long)]
        wait: bool,
    },
    /// Puts a disk back to a snapshot of its own (the newest stable one)
    Rollback {
        disk: DiskName,
        #[arg(value_name = "@N", value_parser = parse_at_number)]
        number: Option<u64>,
    },
}

/// What a mirror makes in one call.
const FORKS_MAX: i64 = 4096;

fn parse_at_number(text: &str) -> Result<u64, String> {
    parse_snapshot_number(text.strip_prefix('@').unwrap_or(text)).map_err(|e| e.to_string())
}
