//! `blobcr set`.

use std::path::PathBuf;

use blobcr_proto::VmName;
use blobcr_proto::name::GroupName;
use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub enum SetCommand {
    /// Lists the newest sets of a group, newest first
    List {
        group: GroupName,
        /// At most so many
        #[arg(long, default_value = "20", value_parser = clap::value_parser!(u32).range(1..=100))]
        limit: u32,
    },
    /// The newest set that is complete and stable: what a restart uses
    Latest { group: GroupName },
    /// Lists the groups, and how many sets of each are kept
    Groups,
    /// Keeps a complete and stable set until it is unpinned
    Pin {
        group: GroupName,
        #[arg(value_name = "SET")]
        sequence: u64,
        /// Who needs it
        #[arg(long, default_value = "operator")]
        holder: String,
    },
    /// Takes a pin of a set away
    Unpin {
        group: GroupName,
        #[arg(value_name = "SET")]
        sequence: u64,
        /// Who needed it
        #[arg(long, default_value = "operator")]
        holder: String,
    },
    /// Has the steward keep only so many of the newest complete and stable sets from now on; 0: all
    Keep { group: GroupName, sets: u32 },
    /// Gives up older sets now, with the snapshots that nothing else needs
    Prune {
        group: GroupName,
        /// Keep so many of the newest complete and stable sets [default: as `set keep` says]
        #[arg(long, value_name = "SETS", value_parser = clap::value_parser!(u32).range(1..))]
        keep_last: Option<u32>,
        /// Tell what would go, and give up nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Attaches fresh disks with what a set holds, and gives each VM its channel again
    Restart(RestartArgs),
}

#[derive(Debug, Args)]
pub struct RestartArgs {
    pub group: GroupName,
    /// Which set [default: the newest complete and stable one that can be read]
    #[arg(long = "set", value_name = "SET")]
    pub sequence: Option<u64>,
    /// Only these VMs, on this host; without it, all of them
    #[arg(long = "vm", value_name = "VM", num_args = 1..)]
    pub vms: Vec<VmName>,
    /// Read every byte of the set first, and go back to an older one when something is damaged
    #[arg(long)]
    pub verify: bool,
    /// Run this program for each VM, with BLOBCR_VM, BLOBCR_DISKS, BLOBCR_SOCKET, BLOBCR_GROUP and
    /// BLOBCR_SET in its environment
    #[arg(long, value_name = "PROGRAM")]
    pub run: Option<PathBuf>,
}
