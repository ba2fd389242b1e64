//! What the command line may say.

mod disk;
mod image;
mod metadata;
mod mirror;
mod prefetch;
mod proxy;
mod repo_node;
mod set;
mod snapshot;
mod steward;
mod strategy;
mod up;

use std::path::PathBuf;

use blobcr_proto::name::GroupName;
use blobcr_proto::policy::{Policy, PolicyError};
use blobcr_proto::{DiskName, PoolName, VmName};
use clap::{Args, Parser, Subcommand};

pub use disk::DiskCommand;
pub use image::{DEFAULT_POOL, ExportArgs, ExportFormat, ImageCommand, ImportArgs, ImportFormat};
pub use metadata::{MetadataArgs, MetadataCommand, MetadataServerArgs, MetadataStore, Seconds};
pub use mirror::{MirrorArgs, MirrorLimits};
pub use prefetch::PrefetchArg;
pub use proxy::{GuestDoors, ProxyArgs};
pub use repo_node::RepoNodeArgs;
pub use set::{RestartArgs, SetCommand};
pub use snapshot::{Keep, SnapshotCommand};
pub use steward::{StewardArgs, StewardSchedule};
pub use strategy::StrategyArg;
pub use up::UpArgs;

use crate::size::parse_size;

/// Lazily mirrored, checkpointed virtual disks.
///
/// Data goes to stdout, everything else to stderr. Exit codes: 0 done, 2 usage, 3 not found,
/// 4 conflict, 5 repository unavailable, 6 integrity error, 1 anything else.
#[derive(Debug, Parser)]
#[command(name = "blobcr", version, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every verb.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Where the repository is: the address of a metadata server (or of several, comma-separated) or
    /// of a mirror, or the directory of a `blobcr up` on this machine
    #[arg(long, global = true, env = "BLOBCR_ENDPOINT", value_name = "ADDR|DIR")]
    pub endpoint: Option<String>,
    /// One JSON object or array on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// What to log on stderr, for example `info` or `blobcr_mirror_fuse=debug,warn`
    #[arg(long, global = true, env = "BLOBCR_LOG", value_name = "FILTER")]
    pub log: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Everything on one machine, until Ctrl-C
    Up(UpArgs),
    /// Named, versioned virtual disks
    #[command(subcommand)]
    Image(ImageCommand),
    /// Writable disks of a host
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Immutable versions of images
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Virtual machines that may ask for checkpoints
    #[command(subcommand)]
    Vm(VmCommand),
    /// Checkpoint sets: one snapshot per disk of a group of VMs
    #[command(subcommand)]
    Set(SetCommand),
    /// Sets of repository nodes with one redundancy policy
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Repository nodes
    #[command(subcommand)]
    Node(NodeCommand),
    /// Deletes what no snapshot needs any more
    Gc {
        /// Tell what would go, and delete nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Reads every copy on every node, and mends what is damaged or missing
    Scrub {
        /// Bytes a second to read at most; 0: as fast as it goes
        #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "0")]
        rate: u64,
        /// Let each node check its own copies by their checksums, and read only what is near damage
        #[arg(long)]
        quick: bool,
    },
    /// The state of the repository and of this host's disks
    Status,
    /// Checks what this machine needs, and says how to mend it
    Doctor(DoctorArgs),
    /// The metadata server (role)
    Metadata(MetadataArgs),
    /// A chunk server (role)
    RepoNode(RepoNodeArgs),
    /// The disks of a host, served through FUSE (role)
    Mirror(MirrorArgs),
    /// The checkpoint channels of a host's VMs (role)
    Proxy(ProxyArgs),
    /// Garbage collection and scrubbing, now and then (role)
    Steward(StewardArgs),
}

impl Command {
    /// Whether it serves until it is told to stop.
    #[must_use]
    pub const fn is_role(&self) -> bool {
        matches!(
            self,
            Self::Up(_)
                | Self::Metadata(MetadataArgs { command: None, .. })
                | Self::RepoNode(_)
                | Self::Mirror(_)
                | Self::Proxy(_)
                | Self::Steward(_)
        )
    }
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Opens a VM's checkpoint channel and prints its socket
    Add {
        vm: VmName,
        /// The VM's disks; all of them are checkpointed behind one barrier
        #[arg(long = "disk", value_name = "DISK", required = true, num_args = 1..)]
        disks: Vec<DiskName>,
        /// The groups of whose checkpoint sets it may be a member
        #[arg(long = "group", value_name = "GROUP", num_args = 1..)]
        groups: Vec<GroupName>,
        /// Give it a token for a channel over TCP, which is printed this once
        #[arg(long)]
        tcp: bool,
        /// Serve it over vsock too: the CID that its hypervisor gives it
        #[arg(
            long,
            value_name = "CID",
            value_parser = clap::value_parser!(u32).range(3..i64::from(u32::MAX))
        )]
        vsock_cid: Option<u32>,
    },
    /// Lists the VMs of this host
    List,
    /// Closes a VM's channel
    Remove { vm: VmName },
    /// Passes stdin and stdout on to a VM's socket: for an address that QEMU forwards
    Relay {
        /// DIR/VM.sock, as `vm add` prints it
        socket: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Makes a pool
    Create {
        pool: PoolName,
        /// `replica:N`: every chunk on N nodes; `ec:K+M`: K data and M parity shards of it
        #[arg(long, value_parser = parse_policy)]
        policy: String,
        /// off, lz4, zstd or adaptive
        #[arg(long, default_value = "adaptive")]
        compression: String,
    },
    /// Lists the pools
    List,
}

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Lists the repository nodes
    List,
    /// Moves a node's data to the others, so that it can be removed
    Drain {
        /// Its id, as `blobcr node list` shows it
        node: String,
        /// Lets it hold data again instead
        #[arg(long)]
        cancel: bool,
    },
    /// Removes a node that holds nothing any more, for good
    Remove {
        /// Its id, as `blobcr node list` shows it
        node: String,
    },
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The directory that a role will use
    #[arg(long, default_value = ".")]
    pub dir: PathBuf,
}

/// Pools are for ever: one with an unusable policy is never made.
fn parse_policy(text: &str) -> Result<String, PolicyError> {
    text.parse::<Policy>().map(|policy| policy.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("blobcr").chain(line.split(' ')))
    }

    #[test]
    fn the_definition_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn every_line_of_the_design_parses() {
        for line in [
            "up --dir d",
            "up --dir d --nodes 3 --pool replica:2 --mount m --listen 127.0.0.1:0",
            "image import f i",
            "image import f i --format auto --pool p",
            "image export i@3 f --format qcow2",
            "image export i@3 f --since i@2",
            "image list",
            "image info i",
            "image clone i@2 n",
            "image remove i",
            "image remove i@2",
            "disk attach i d",
            "disk attach i@1 d --json",
            "disk list",
            "disk info d",
            "disk detach d",
            "disk checkpoint d --wait",
            "disk rollback d",
            "disk rollback d @2",
            "snapshot list i",
            "snapshot wait i@1",
            "snapshot diff i@1 i@2",
            "snapshot verify i@1",
            "vm add v --disk a b",
            "vm add v --disk a --disk b",
            "vm add v --disk a --tcp --vsock-cid 3",
            "vm list",
            "vm remove v",
            "node list",
            "pool create p --policy replica:3",
            "pool create p --policy ec:4+2",
            "pool list",
            "status --json --endpoint 127.0.0.1:1",
            "doctor",
            "metadata --listen 127.0.0.1:0 --dir d --store sled",
            "metadata --listen 127.0.0.1:0 --dir d",
            #[cfg(feature = "etcd")]
            "metadata --listen 127.0.0.1:0 --store etcd:http://a:1,http://b:2 --pool replica:2",
            #[cfg(feature = "etcd")]
            "metadata migrate --from d --to etcd:http://a:1#name",
            "repo-node --listen 127.0.0.1:0 --dir d --metadata a:1,b:2 --domain rack1",
            "mirror --listen 127.0.0.1:0 --dir d --metadata a:1 --mount m",
            "proxy --mirror a:1 --sockets d",
            "proxy --mirror a:1 --sockets d --guests 127.0.0.1:0 --vsock 7000",
            "gc --dry-run",
            "scrub --rate 10M",
            "snapshot prune base --keep-last 3 --keep-yearly 1 --dry-run",
            "steward --metadata a:1,b:2 --collect-every 60 --scrub-every 600 --scrub-rate 0",
        ] {
            parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
    }

    #[test]
    fn bad_names_are_usage_errors() {
        let long = "n".repeat(300);
        for name in ["a/b", "..", "a\u{1}b", "", long.as_str()] {
            for line in [
                format!("image info {name}"),
                format!("disk attach base {name}"),
                format!("vm add {name} --disk d"),
                format!("image import f {name}"),
            ] {
                let error = parse(&line).expect_err(&line);
                assert_eq!(error.exit_code(), 2, "{line}: {error}");
            }
        }
    }

    #[test]
    fn policies_that_cannot_be_served_are_usage_errors() {
        for policy in ["ec:4+9", "ec:1+1", "replica:0", "raid:1"] {
            for line in
                [format!("pool create p --policy {policy}"), format!("up --dir d --pool {policy}")]
            {
                let error = parse(&line).expect_err(&line);
                assert_eq!(error.exit_code(), 2, "{line}: {error}");
            }
        }
    }

    #[test]
    fn a_metadata_server_needs_an_address_and_a_store_that_is_one() {
        for line in [
            "metadata",
            "metadata --dir d",
            "metadata --listen a:1 --store zookeeper",
            "metadata --listen a:1 --store etcd:",
            "metadata migrate --from d",
            "metadata --listen a:1 migrate --from d --to etcd:a:1",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}: {error}");
        }
    }

    #[test]
    fn reserved_cids_and_ports_are_usage_errors() {
        for line in [
            "vm add v --disk a --vsock-cid 2",
            "vm add v --disk a --vsock-cid 4294967295",
            "proxy --mirror a:1 --sockets d --vsock 0",
            "up --dir d --vsock 4294967295",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}: {error}");
        }
    }

    #[test]
    fn a_snapshot_must_be_named_where_one_is_needed() {
        let error = parse("snapshot wait base").unwrap_err().to_string();
        assert!(error.contains("base@N"), "{error}");
        assert!(parse("snapshot wait base@0").is_err());
        assert!(parse("disk rollback d @0").is_err());
    }
}
