//! Garbage collection over a million chunks: how long, and how much memory the command takes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Instant;

use anyhow::ensure;
use blobcr_tests::cluster::Cluster;
use blobcr_tests::daemon::blobcr;

use crate::{MIB, Options};

/// The smallest chunks, so that a million of them are as few bytes as can be.
const CHUNK: u64 = 64 << 10;
/// What the collection may take: its marks, the nodes it has been at, a client's cache, and the rest
/// of a process.
const BOUND_MIB: u64 = 64 + 32 + 64 + 64;

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let chunks = options.scaled(1_000_000);
    let cluster = Cluster::start_in(options.scratch()?, &["--nodes", "2"])?;
    // Half of it stays, and half goes.
    for (image, first) in [("stays", 0), ("goes", chunks / 2)] {
        let raw = cluster.scratch().join("raw");
        let file = File::create(&raw)?;
        file.set_len(chunks / 2 * CHUNK)?;
        for chunk in 0..chunks / 2 {
            file.write_all_at(&(first + chunk + 1).to_le_bytes(), chunk * CHUNK)?;
        }
        let path = raw.to_string_lossy().into_owned();
        cluster.json(&["image", "import", &path, image, "--chunk-size", "64K"])?;
        std::fs::remove_file(&raw)?;
    }
    cluster.json(&["image", "remove", "goes"])?;
    let begun = Instant::now();
    let (records, peak) = collect(&cluster)?;
    println!("\nGarbage collection over {chunks} chunks");
    println!("  {records} records gone in {:.1} s", begun.elapsed().as_secs_f64());
    println!("  peak memory of the command {} MiB, bound {BOUND_MIB} MiB", peak / MIB);
    Ok(())
}

/// Runs `blobcr gc`, and returns how many records went and the peak of the process's memory.
fn collect(cluster: &Cluster) -> anyhow::Result<(u64, u64)> {
    let mut command = Command::new(blobcr()?);
    command.args(["--json", "gc"]).env("BLOBCR_ENDPOINT", cluster.dir());
    let child = command.stdout(std::process::Stdio::piped()).spawn()?;
    let pid = child.id();
    let peak = std::thread::spawn(move || {
        let mut peak = 0;
        // Until it is gone.
        while let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) {
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
            let Some(kib) = kib else { break };
            peak = peak.max(kib << 10);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        peak
    });
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(0), "gc ended with {:?}", output.status.signal());
    let done: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let peak = peak.join().map_err(|_| anyhow::anyhow!("the watch of the memory panicked"))?;
    Ok((done["records"].as_u64().unwrap_or_default(), peak))
}
