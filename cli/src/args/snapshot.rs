//! `blobcr snapshot`.

use blobcr_proto::{ImageName, ImageSpec};
use clap::{Args, Subcommand};

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

pub(super) fn parse_snapshot(text: &str) -> Result<ImageSpec, String> {
    let spec: ImageSpec = text.parse().map_err(|e: blobcr_proto::name::NameError| e.to_string())?;
    if spec.number.is_none() {
        return Err(format!("say which snapshot: {spec}@N"));
    }
    Ok(spec)
}
