//! A virtual machine that runs under QEMU (Debian: qemu-system-x86) on a qcow2 disk. What its guest
//! would write is written through QEMU's FUSE export of that disk, and `savevm` takes disk, memory
//! and processors into the qcow2 file.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use blobcr_tests::disk_file::allocated;
use blobcr_tests::qmp::Qmp;
use serde_json::{Value, json};

use super::storage_daemon::{connect, qemu_img};
use crate::random_bytes;

/// A running VM. Ended and its files deleted on drop.
#[derive(Debug)]
pub struct RunningVm {
    child: Child,
    qmp: Qmp,
    disk: PathBuf,
    export: PathBuf,
    /// Field order: the directory goes last.
    _dir: tempfile::TempDir,
}

impl RunningVm {
    /// Starts one with an empty disk of `disk_mib` MiB below `parent`, and `memory_mib` MiB of memory full
    /// of random bytes, as that of a program whose state is to be saved would be.
    ///
    /// # Errors
    /// When QEMU does not start, or does not serve the disk.
    pub fn start(parent: &Path, disk_mib: u64, memory_mib: u64) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("qemu-vm-").tempdir_in(parent)?;
        let dir_path = std::fs::canonicalize(dir.path())?;
        let at = |name: &str| dir_path.join(name).display().to_string();
        let (disk, export) = (dir_path.join("disk.qcow2"), dir_path.join("disk"));
        qemu_img(&["create", "-q", "-f", "qcow2", &at("disk.qcow2"), &format!("{disk_mib}M")])?;
        File::create(&export)?;
        // On the file system of memory: it is the guest's memory.
        let memory = tempfile::NamedTempFile::new_in("/dev/shm")?;
        random_bytes::fill(memory.as_file(), 0..memory_mib)?;
        let backend = format!(
            "memory-backend-file,id=m,size={memory_mib}M,share=on,mem-path={}",
            memory.path().display()
        );
        let child = Command::new("qemu-system-x86_64")
            .args(["-display", "none", "-nodefaults", "-accel", "tcg"])
            .args(["-m", &memory_mib.to_string(), "-object", &backend])
            .args(["-machine", "q35,memory-backend=m"])
            .args(["-blockdev", &format!("file,node-name=f0,filename={}", disk.display())])
            .args(["-blockdev", "qcow2,node-name=n0,file=f0"])
            .args(["-device", "virtio-blk-pci,drive=n0,share-rw=on"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", at("qmp"))])
            .stdin(Stdio::null())
            .spawn()
            .context("start qemu-system-x86_64 (Debian: qemu-system-x86)")?;
        let qmp = connect(&dir_path.join("qmp"))?;
        // QEMU has it open.
        drop(memory);
        let mut vm = Self { child, qmp, disk, export, _dir: dir };
        let arguments = json!({
            "type": "fuse", "id": "e", "node-name": "n0", "mountpoint": &vm.export, "writable": true,
        });
        vm.qmp.ask("block-export-add", arguments)?;
        Ok(vm)
    }

    /// The disk as a raw file.
    #[must_use]
    pub fn export(&self) -> &Path {
        &self.export
    }

    /// The qcow2 file.
    #[must_use]
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// Bytes of its files on the host.
    ///
    /// # Errors
    /// When they cannot be looked at.
    pub fn stored_bytes(&self) -> anyhow::Result<u64> {
        allocated(&self.disk)
    }

    /// Takes a snapshot of everything; returns how long the VM was stopped for it.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn savevm(&mut self, name: &str) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let arguments = json!({"command-line": format!("savevm {name}")});
        let said = self.qmp.ask("human-monitor-command", arguments)?;
        ensure!(said.as_str() == Some(""), "savevm: {said}");
        Ok(start.elapsed())
    }
}

impl Drop for RunningVm {
    fn drop(&mut self) {
        if self.qmp.ask("quit", Value::Null).is_err() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
