//! How a cluster is made.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail};
use blobcr_tests::daemon::wait_until;

use super::Ceph;

/// Of the sparse file that the OSD keeps everything in.
const OSD_BYTES: u64 = 48 << 30;

/// One copy of everything, no keys, loopback only, and no more memory than is needed.
const SETTINGS: &str = "
public network = 127.0.0.0/8
ms bind ipv6 = false
ms bind msgr1 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 2
osd crush chooseleaf type = 0
osd objectstore = bluestore
osd memory target = 1073741824
bluestore cache autotune = false
bluestore cache size = 402653184
mgr initial modules =
rbd default clone format = 2
rados osd op timeout = 120
rados mon op timeout = 60
log to stderr = false
debug ms = 0/0
debug mon = 0/0
debug paxos = 0/0
debug osd = 0/0
debug bluestore = 0/0
debug bdev = 0/0
debug rocksdb = 0/0
";

/// A port that nobody listens at now.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn uuid() -> anyhow::Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    Ok(uuid.trim().to_owned())
}

/// What a daemon complained of.
fn said(dir: &Path, program: &str) -> PathBuf {
    dir.join(format!("{program}.said"))
}

impl Ceph {
    pub(super) fn boot(&mut self) -> anyhow::Result<()> {
        let fsid = uuid()?;
        let monitor = format!("[v2:127.0.0.1:{}/0]", free_port()?);
        let dir = self.dir.path().to_str().context("a path of the benchmark is no UTF-8")?;
        let conf = format!(
            "[global]\nfsid = {fsid}\nmon host = {monitor}\nmon data = {dir}/mon\n\
             mgr data = {dir}/mgr\nosd data = {dir}/osd\nrun dir = {dir}/run\n\
             log file = {dir}/log/$name.log\npid file = {dir}/run/$name.pid\ncrash dir = {dir}/run\n\
             bluestore block size = {OSD_BYTES}{SETTINGS}"
        );
        let monmap = format!("{dir}/monmap");
        for part in ["mon", "mgr", "osd", "run", "log"] {
            fs::create_dir(self.dir.path().join(part))?;
        }
        fs::write(self.conf(), conf)?;
        let map = ["--create", "--fsid", &fsid, "--addv", "a", &monitor, &monmap];
        self.run("monmaptool", &map)?;
        self.run("ceph-mon", &["--mkfs", "-i", "a", "--monmap", &monmap])?;
        self.spawn("ceph-mon", "a")?;
        self.spawn("ceph-mgr", "x")?;
        let osd = uuid()?;
        self.run("ceph", &["osd", "new", &osd])?;
        self.run("ceph-osd", &["--mkfs", "-i", "0", "--osd-uuid", &osd])?;
        self.spawn("ceph-osd", "0")?;
        self.wait_for_osd()?;
        self.run("ceph", &["osd", "pool", "create", "rbd", "16"])?;
        self.rbd(&["pool", "init", "rbd"])?;
        Ok(())
    }

    /// It stays a child: its process id is known.
    fn spawn(&mut self, program: &str, id: &str) -> anyhow::Result<()> {
        let said = File::create(said(self.dir.path(), program))?;
        let child = self
            .command(program)
            .args(["-f", "-i", id])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            .spawn()
            .with_context(|| format!("start {program}"))?;
        self.daemons.push(child);
        Ok(())
    }

    fn wait_for_osd(&mut self) -> anyhow::Result<()> {
        wait_until("the OSD is up", || {
            for (daemon, program) in
                self.daemons.iter_mut().zip(["ceph-mon", "ceph-mgr", "ceph-osd"])
            {
                if let Some(status) = daemon.try_wait()? {
                    let said = fs::read_to_string(said(self.dir.path(), program));
                    bail!("{program} ended with {status}: {}", said.unwrap_or_default());
                }
            }
            let state = self.run("ceph", &["osd", "stat", "--format", "json"])?.stdout;
            let state: serde_json::Value = serde_json::from_slice(&state)?;
            Ok(state["num_up_osds"] == 1)
        })
    }
}
