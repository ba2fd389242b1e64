//! What each policy stores, beside the theory.

use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{noise, sparse};

use crate::{MIB, Options};

/// Policies, with the nodes they need and the bytes stored for each byte.
const POLICIES: [(&str, &str, f64); 6] = [
    ("replica:1", "1", 1.0),
    ("replica:2", "2", 2.0),
    ("replica:3", "3", 3.0),
    ("ec:2+1", "3", 1.5),
    ("ec:4+2", "6", 1.5),
    ("ec:8+3", "11", 11.0 / 8.0),
];

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let bytes = options.scaled(256) * MIB;
    println!("\nStored bytes of {} MiB that do not compress", bytes / MIB);
    println!("{:<10} {:>8} {:>8} {:>10}", "policy", "stored", "theory", "more than");
    for (policy, nodes, theory) in POLICIES {
        let up = ["--pool", policy, "--nodes", nodes];
        let cluster = Cluster::start_in(options.scratch()?, &up)?;
        let raw = sparse(&cluster.scratch().join("raw"), bytes, &[(0, &noise(1, bytes as usize))])?;
        cluster.import(&raw, "image")?;
        let live = cluster.json(&["status"])?["live_bytes"].as_u64().unwrap_or_default();
        let stored = live as f64 / bytes as f64;
        let more = (stored / theory - 1.0) * 100.0;
        println!("{policy:<10} {stored:>8.4} {theory:>8.4} {more:>9.2}%");
    }
    Ok(())
}
