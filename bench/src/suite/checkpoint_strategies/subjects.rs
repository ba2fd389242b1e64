//! The application on a mirror's disks, and on those of virtual machines that QEMU saves whole.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use blobcr_tests::mounted::MountedDisk;

use super::application::{self, Lived};
use crate::file_layout::{extents, stored_bytes};
use crate::peers::running_vm::RunningVm;
use crate::suite::strategies::{MIB, Mirror};

/// Between two looks whether snapshots are stable, and at how much is copied.
const LOOK: Duration = Duration::from_millis(20);

/// What happened to the disks of one subject; means over the disks.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) lived: Vec<Lived>,
    /// From the checkpoint's call until it can be relied on.
    pub(super) stable: f64,
    /// The most that spill files took, of all disks together.
    pub(super) copied_mib: f64,
    /// Pieces of a disk's local file.
    pub(super) extents: f64,
    /// What a disk and its one checkpoint take: local file and repository, or qcow2 file.
    pub(super) stored_mib: f64,
}

impl Mirror {
    /// Runs the application on the first `count` disks.
    pub(super) fn run_application(&self, count: usize) -> anyhow::Result<Outcome> {
        let paths = &self.disks()[..count];
        let mounted: Vec<_> =
            paths.iter().map(|path| MountedDisk::open(path, false)).collect::<Result<_, _>>()?;
        let taken: Vec<OnceLock<(Instant, u64)>> = (0..count).map(|_| OnceLock::new()).collect();
        let stored_before = self.repository_bytes()?;
        let checkpoint = |disk: usize| -> anyhow::Result<()> {
            let began = Instant::now();
            let made = mounted[disk].commit()?;
            let _ = taken[disk].set((began, made.number));
            Ok(())
        };
        let (peak, ended) = (AtomicU64::new(0), AtomicBool::new(false));
        let (lived, stable) = std::thread::scope(|scope| {
            let watcher = scope.spawn(|| self.watch(&mounted, &taken, &peak, &ended));
            let lived = application::run(paths, self.disk_bytes(), checkpoint);
            ended.store(true, Ordering::Release);
            (lived, watcher.join().expect("it does not panic"))
        });
        let (lived, stable) = (lived?, stable?);
        let locals = (0..count).map(|disk| self.local(disk));
        let mut pieces = 0;
        let mut stored = self.repository_bytes()? - stored_before;
        for local in locals {
            pieces += extents(&local.join("gen-1").join("delta"))?;
            stored += stored_bytes(&local)?;
        }
        let mean = |sum: u64| sum as f64 / count as f64;
        Ok(Outcome {
            lived,
            stable,
            copied_mib: peak.into_inner() as f64 / MIB as f64,
            extents: mean(pieces),
            stored_mib: mean(stored) / MIB as f64,
        })
    }

    /// Waits until all snapshots are stable; returns how long that took on average. Notes the most
    /// that spill files took together.
    fn watch(
        &self,
        mounted: &[MountedDisk],
        taken: &[OnceLock<(Instant, u64)>],
        peak: &AtomicU64,
        ended: &AtomicBool,
    ) -> anyhow::Result<f64> {
        let mut took = vec![None; mounted.len()];
        loop {
            let last = ended.load(Ordering::Acquire);
            let mut spilled = 0;
            for (index, disk) in mounted.iter().enumerate() {
                spilled += stored_bytes(&self.local(index).join("spill"))?;
                if let (Some((began, number)), None) = (taken[index].get(), took[index])
                    && disk.is_stable(*number)?
                {
                    took[index] = Some(began.elapsed().as_secs_f64());
                }
            }
            peak.fetch_max(spilled, Ordering::Relaxed);
            let all = taken
                .iter()
                .zip(&took)
                .all(|(taken, took)| took.is_some() || (last && taken.get().is_none()));
            if last && all {
                let took: Vec<f64> = took.into_iter().flatten().collect();
                return Ok(took.iter().sum::<f64>() / took.len() as f64);
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// The same application on the disks of so many running VMs, whose memory is as large as the disk's
/// data.
pub(super) fn saved_vms(parent: &Path, count: usize, mib: u64) -> anyhow::Result<Outcome> {
    let start = |_| Ok(Mutex::new(RunningVm::start(parent, mib, mib.max(LEAST_MEMORY_MIB))?));
    let vms: Vec<Mutex<RunningVm>> = (0..count).map(start).collect::<anyhow::Result<_>>()?;
    let lock = |vm: usize| vms[vm].lock().unwrap_or_else(PoisonError::into_inner);
    let paths: Vec<_> = (0..count).map(|vm| lock(vm).export().to_owned()).collect();
    let lived = application::run(&paths, mib * MIB, |vm| {
        lock(vm).savevm("checkpoint").map(drop).context("the VM's checkpoint")
    })?;
    let (mut pieces, mut stored) = (0, 0);
    for vm in 0..count {
        pieces += extents(lock(vm).disk())?;
        stored += lock(vm).stored_bytes()?;
    }
    let mean = |sum: f64| sum / count as f64;
    Ok(Outcome {
        // The call returns when everything is in the file.
        stable: mean(lived.iter().map(|lived| lived.downtime.as_secs_f64()).sum()),
        lived,
        copied_mib: 0.0,
        extents: mean(pieces as f64),
        stored_mib: mean(stored as f64) / MIB as f64,
    })
}

/// What the firmware needs.
const LEAST_MEMORY_MIB: u64 = 64;
