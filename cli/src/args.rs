//! What the command line may say.

mod prefetch;
mod set;
mod strategy;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

#[cfg(feature = "etcd")]
use blobcr_metadata::store::etcd::{EtcdTarget, TargetError};
use blobcr_proto::name::{GroupName, parse_snapshot_number};
use blobcr_proto::policy::{Policy, PolicyError};
use blobcr_proto::{DiskName, ImageName, ImageSpec, PoolName, VmName};
use clap::{Args, Parser, Subcommand, ValueEnum};

pub use prefetch::PrefetchArg;
pub use set::{RestartArgs, SetCommand};
pub use strategy::StrategyArg;

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
pub enum ImageCommand {
    /// Makes an image from a file; `-` is stdin
    Import(ImportArgs),
    /// Writes a snapshot to a file
    Export(ExportArgs),
    /// Lists the images
    List,
    /// Tells about one image
    Info { image: ImageName },
    /// A new image that starts as a copy of a snapshot; no data moves
    Clone {
        #[arg(value_name = "IMAGE[@N]")]
        source: ImageSpec,
        #[arg(value_name = "NEW")]
        name: ImageName,
    },
    /// Removes an image, or one of its snapshots
    Remove {
        #[arg(value_name = "IMAGE[@N]")]
        image: ImageSpec,
    },
}

/// Format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImportFormat {
    /// By the file's first bytes
    Auto,
    Raw,
    Qcow2,
}

/// Format of an exported file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    Raw,
    Qcow2,
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    pub file: PathBuf,
    pub image: ImageName,
    #[arg(long, value_enum, default_value = "auto")]
    pub format: ImportFormat,
    /// The pool to store it in
    #[arg(long, default_value = DEFAULT_POOL)]
    pub pool: PoolName,
    /// Power of two from 64K to 4M [default: 256K]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub chunk_size: Option<u64>,
    /// Where a qcow2 file (or stdin) is unpacked while it is read; needs room for its data
    #[arg(long, value_name = "DIR", env = "TMPDIR", default_value = "/var/tmp")]
    pub temp_dir: PathBuf,
    /// Read the other files that a qcow2 file names. Only for files that you trust
    #[arg(long)]
    pub allow_backing_file: bool,
}

/// The pool that is used when none is named.
pub const DEFAULT_POOL: &str = "default";

#[derive(Debug, Args)]
pub struct ExportArgs {
    #[arg(value_name = "IMAGE[@N]")]
    pub source: ImageSpec,
    pub file: PathBuf,
    #[arg(long, value_enum, default_value = "raw")]
    pub format: ExportFormat,
    /// Replace a file that exists
    #[arg(long)]
    pub force: bool,
    /// FILE is a raw file of this snapshot: write into it only what differs
    #[arg(long, value_name = "IMAGE@N", conflicts_with_all = ["format", "force"])]
    pub since: Option<ImageSpec>,
}

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

/// Who holds a pin that names nobody.
const OPERATOR: &str = "operator";

#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Lists the snapshots of an image
    List { image: ImageName },
    /// Returns when a snapshot is stable
    Wait {
        #[arg(value_name = "IMAGE@N", value_parser = parse_snapshot)]
        snapshot: ImageSpec,
        /// Give up after so many seconds
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
    },
    /// Lists the ranges in which two snapshots differ
    Diff {
        #[arg(value_name = "IMAGE@A", value_parser = parse_snapshot)]
        from: ImageSpec,
        #[arg(value_name = "IMAGE@B", value_parser = parse_snapshot)]
        to: ImageSpec,
    },
    /// Reads a whole snapshot and checks every byte of it
    Verify {
        #[arg(value_name = "IMAGE@N", value_parser = parse_snapshot)]
        snapshot: ImageSpec,
    },
    /// Removes the snapshots of an image that are not to be kept
    Prune {
        image: ImageName,
        #[command(flatten)]
        keep: Keep,
        /// Tell what would be removed, and remove nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Keeps a snapshot and its image from being removed
    Pin {
        #[arg(value_name = "IMAGE@N", value_parser = parse_snapshot)]
        snapshot: ImageSpec,
        /// Who needs it: each holder has a pin of its own
        #[arg(long, default_value = OPERATOR)]
        holder: String,
    },
    /// Takes a pin away
    Unpin {
        #[arg(value_name = "IMAGE@N", value_parser = parse_snapshot)]
        snapshot: ImageSpec,
        /// Whose pin; `snapshot pins` shows them
        #[arg(long, default_value = OPERATOR)]
        holder: String,
    },
    /// Lists what is pinned, and by whom: attached disks pin what they need
    Pins,
}

/// What to keep. Of each period that has snapshots, its newest one counts. The latest snapshot of an
/// image, and what is pinned, stay in any case.
#[derive(Debug, Clone, Args)]
pub struct Keep {
    /// The newest N snapshots
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_last: u64,
    /// The newest snapshot of each of the last N hours that have one
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_hourly: u64,
    /// As --keep-hourly, of days
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_daily: u64,
    /// As --keep-hourly, of weeks
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_weekly: u64,
    /// As --keep-hourly, of months
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_monthly: u64,
    /// As --keep-hourly, of years
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_yearly: u64,
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
    /// Address at which guests with a token are served; without it, none over TCP
    #[arg(long, value_name = "ADDR")]
    pub guests: Option<SocketAddr>,
    /// Port at which guests are served over vsock; without it, none are
    #[arg(
        long,
        value_name = "PORT",
        value_parser = clap::value_parser!(u32).range(1..i64::from(u32::MAX))
    )]
    pub vsock: Option<u32>,
    /// Seconds after which a node that is not heard of is down, and its partitions go to others
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = parse_down_after)]
    pub node_down_after: Seconds,
    #[command(flatten)]
    pub limits: MirrorLimits,
    #[command(flatten)]
    pub schedule: StewardSchedule,
}

/// When the steward does what.
#[derive(Debug, Clone, Args)]
pub struct StewardSchedule {
    /// From one garbage collection to the next
    #[arg(long, value_name = "SECONDS", default_value_t = COLLECT_EVERY_S, value_parser = parse_period)]
    pub collect_every: u64,
    /// From one scrub to the next
    #[arg(long, value_name = "SECONDS", default_value_t = SCRUB_EVERY_S, value_parser = parse_period)]
    pub scrub_every: u64,
    /// Bytes a second that a scrub reads at most; 0: as fast as it goes
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64M")]
    pub scrub_rate: u64,
    /// Bytes a second that a repair reads at most; 0: as fast as it goes
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "128M")]
    pub repair_rate: u64,
}

/// An hour: a collection reads all tree nodes, so it is not for every minute.
const COLLECT_EVERY_S: u64 = 3600;
/// A week: damage that is found within it seldom meets a second one.
const SCRUB_EVERY_S: u64 = 7 * 24 * 3600;
/// Ten years: what a clock can hold.
const PERIOD_S_MAX: u64 = 10 * 365 * 24 * 3600;

fn parse_period(text: &str) -> Result<u64, String> {
    let seconds = text.parse().ok().filter(|seconds| (1..=PERIOD_S_MAX).contains(seconds));
    seconds.ok_or_else(|| format!("write seconds, from 1 to {PERIOD_S_MAX}"))
}

#[derive(Debug, Args)]
pub struct StewardArgs {
    /// Metadata servers, comma-separated
    #[arg(long, value_name = "ADDRS", value_delimiter = ',', required = true)]
    pub metadata: Vec<String>,
    #[command(flatten)]
    pub schedule: StewardSchedule,
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
    /// How a snapshot is kept as it was while its disk is written on
    #[arg(long, value_enum, default_value = "selective")]
    pub strategy: StrategyArg,
}

/// A day: guests that see an I/O error turn their file systems read-only for good.
const REPOSITORY_WAIT_S: u64 = 24 * 3600;

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

fn parse_down_after(text: &str) -> Result<Seconds, String> {
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

#[derive(Debug, Args)]
pub struct RepoNodeArgs {
    /// Address to serve at; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    pub listen: String,
    /// Where the chunks are kept; made if it is missing
    #[arg(long)]
    pub dir: PathBuf,
    /// Metadata servers, comma-separated
    #[arg(long, value_name = "ADDRS", value_delimiter = ',', required = true)]
    pub metadata: Vec<String>,
    /// Failure domain; two copies never share one [default: the node itself]
    #[arg(long, value_name = "NAME")]
    pub domain: Option<String>,
    /// The address that others use, where it is not the one of --listen
    #[arg(long, value_name = "ADDR")]
    pub advertise: Option<String>,
}

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

#[derive(Debug, Args)]
pub struct ProxyArgs {
    /// The mirror of this host
    #[arg(long, value_name = "ADDR")]
    pub mirror: String,
    /// Where each VM's socket is made; made if it is missing
    #[arg(long, value_name = "DIR")]
    pub sockets: PathBuf,
    /// Address to serve the `vm` verbs at; the mirror tells it to who asks there
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub listen: String,
    /// Address at which guests with a token are served; without it, none over TCP
    #[arg(long, value_name = "ADDR")]
    pub guests: Option<SocketAddr>,
    /// Port at which guests are served over vsock; without it, none are
    #[arg(
        long,
        value_name = "PORT",
        value_parser = clap::value_parser!(u32).range(1..i64::from(u32::MAX))
    )]
    pub vsock: Option<u32>,
}

fn parse_snapshot(text: &str) -> Result<ImageSpec, String> {
    let spec: ImageSpec = text.parse().map_err(|e: blobcr_proto::name::NameError| e.to_string())?;
    if spec.number.is_none() {
        return Err(format!("say which snapshot: {spec}@N"));
    }
    Ok(spec)
}

fn parse_at_number(text: &str) -> Result<u64, String> {
    parse_snapshot_number(text.strip_prefix('@').unwrap_or(text)).map_err(|e| e.to_string())
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
