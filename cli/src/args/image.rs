//! `blobcr image`.

use std::path::PathBuf;

use blobcr_proto::{ImageName, ImageSpec, PoolName};
use clap::{Args, Subcommand, ValueEnum};

use super::snapshot::parse_snapshot;
use crate::size::parse_size;

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
    #[arg(long, value_name = "IMAGE@N", value_parser = parse_snapshot, conflicts_with_all = ["format", "force"])]
    pub since: Option<ImageSpec>,
}
