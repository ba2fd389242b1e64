//! A cluster of processes, and what a COMMIT costs them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, ensure};
use blobcr_tests::mounted::MountedDisk;
use blobcr_tests::roles::{Plan, Roles, Which};

use super::Took;
use crate::processor_time;

/// A cluster with an empty disk.
pub(super) struct Ours {
    roles: Roles,
    processes: Vec<u32>,
    disk: PathBuf,
}

impl Ours {
    pub(super) fn start(policy: &str, nodes: usize, bytes: u64) -> anyhow::Result<Self> {
        let plan = Plan { nodes, pool: policy.to_owned(), ..Plan::default() };
        let roles = Roles::start(&plan, |_| Ok(()))?;
        let raw = roles.dir().join("empty");
        File::create(&raw)?.set_len(bytes)?;
        roles.json(&["image", "import", raw.to_str().context("ASCII")?, "empty"])?;
        let disk = roles.attach(0, "empty", "disk")?;
        let all = (0..nodes).map(Which::Node).chain([Which::Metadata(0), Which::Mirror(0)]);
        let processes = all.map(|which| roles.pid(which)).collect::<anyhow::Result<_>>()?;
        let ours = Self { roles, processes, disk };
        // The first one makes the checkpoint image, too.
        MountedDisk::open(&ours.disk, false)?.commit_stable()?;
        Ok(ours)
    }

    pub(super) fn disk(&self) -> &Path {
        &self.disk
    }

    fn cpu(&self) -> anyhow::Result<f64> {
        self.processes.iter().map(|pid| processor_time::of(*pid)).sum()
    }

    /// Of all nodes.
    fn stored(&self) -> anyhow::Result<f64> {
        let nodes = self.roles.json(&["node", "list"])?;
        let nodes = nodes.as_array().context("no list of nodes")?;
        nodes.iter().map(|node| node["live_bytes"].as_f64().context("a node does not tell")).sum()
    }

    pub(super) fn commit(&self) -> anyhow::Result<Took> {
        let disk = MountedDisk::open(&self.disk, false)?;
        let (stored, cpu) = (self.stored()?, self.cpu()?);
        let began = Instant::now();
        disk.commit_stable()?;
        let seconds = began.elapsed().as_secs_f64();
        Ok(Took {
            seconds,
            // The clock of processes ticks a hundred times a second.
            cpu_seconds: (self.cpu()? - cpu).max(0.01),
            stored_bytes: self.stored()? - stored,
        })
    }

    pub(super) fn mirror_on_one_core(&self) -> anyhow::Result<()> {
        let pid = self.roles.pid(Which::Mirror(0))?.to_string();
        let ran = Command::new("taskset").args(["-a", "-c", "-p", "1", &pid]).output();
        let ran = ran.context("run taskset (Debian: util-linux)")?;
        ensure!(ran.status.success(), "taskset: {}", String::from_utf8_lossy(&ran.stderr));
        Ok(())
    }
}
