//! `blobcr repo-node`.

use std::path::PathBuf;

use clap::Args;

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
