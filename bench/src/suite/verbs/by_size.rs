//! Attach, clone and rollback by the size of the image.

use std::path::PathBuf;

use blobcr_tests::cluster::Cluster;
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::mounted::MountedDisk;
use std::os::unix::fs::FileExt;

use super::{
    CALL, COMMAND, FLAT, GIB, LIMIT_MS, MIB, QEMU, RBD, REFLINK, SUBJECTS, median_ms, reflinks,
    samples, timed,
};
use crate::calls::Calls;
use crate::peers::ceph::Ceph;
use crate::peers::qcow2::Qcow2;
use crate::peers::reflink::Reflinks;
use crate::report::{Bound, Report, Table};
use crate::suite::Settings;

const SIZES_GIB: [u64; 4] = [1, 64, 1024, 4096];
/// Data in each image.
const DATA: u64 = 64 * MIB;
/// What the project promises something of.
const VERBS: [&str; 3] = ["attach", "clone", "rollback"];

/// One image, in all forms.
struct Sized<'c> {
    cluster: &'c Cluster,
    calls: &'c Calls,
    label: String,
    image: String,
    raw: PathBuf,
    disk: PathBuf,
    qcow2: Qcow2,
    peers: Peers<'c>,
}

/// Those that are there.
#[derive(Clone, Copy)]
struct Peers<'c> {
    reflinks: Option<&'c Reflinks>,
    ceph: Option<&'c Ceph>,
}

pub(super) fn measure(settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
    let cluster = settings.cluster(&settings.disk_dir, &[])?;
    let calls = Calls::to(&cluster)?;
    let reflinks = reflinks(&cluster, report);
    let ceph = settings.ceph(report)?;
    let peers = Peers { reflinks: reflinks.as_ref(), ceph: ceph.as_ref() };
    let sizes = if settings.quick { &SIZES_GIB[..2] } else { &SIZES_GIB[..] };
    let images = sizes.iter().map(|gib| Sized::make(&cluster, &calls, peers, *gib));
    let images = images.collect::<anyhow::Result<Vec<_>>>()?;
    let mut table =
        Table::new("By the size of the image (sparse, 64 MiB of data)", "ms", false, &SUBJECTS);
    for round in 0..settings.rounds {
        for image in &images {
            image.attach(settings, round, &mut table)?;
            image.clone_image(settings, round, &mut table)?;
            image.roll_back(settings, &mut table)?;
            image.list(settings, &mut table)?;
        }
    }
    for verb in VERBS {
        let medians = images.iter().filter_map(|image| {
            Some(table.row(&format!("{verb}, {}", image.label))?.spread(CALL)?.median)
        });
        let (least, most) = medians.fold((f64::MAX, 0.0_f64), |(a, b), m| (a.min(m), b.max(m)));
        let what = format!("{verb} (the call), the slowest size");
        report.claim(&what, Bound::AtMost(LIMIT_MS), Some(most), "ms");
        let what = format!("{verb}, the slowest size against the quickest");
        report.claim(&what, Bound::AtMost(FLAT), Some(most / least), "×");
    }
    report.tables.push(table);
    Ok(())
}

impl<'c> Sized<'c> {
    fn make(
        cluster: &'c Cluster,
        calls: &'c Calls,
        peers: Peers<'c>,
        gib: u64,
    ) -> anyhow::Result<Self> {
        let label = if gib < 1024 { format!("{gib} GiB") } else { format!("{} TiB", gib / 1024) };
        let image = format!("size-{gib}");
        let data = noise(gib, DATA as usize);
        let raw = sparse(&cluster.scratch().join(&image), gib * GIB, &[(0, &data)])?;
        cluster.import(&raw, &image)?;
        if let Some(reflinks) = peers.reflinks {
            sparse(&reflinks.path(&image), gib * GIB, &[(0, &data)])?;
        }
        let disk = cluster.attach(&image, &format!("rolled-{gib}"))?;
        let mounted = MountedDisk::open(&disk, false)?;
        mounted.file().write_all_at(&data[..4096], 8 * DATA)?;
        mounted.commit_stable()?;
        let (qcow2, _) = Qcow2::over(&raw, &cluster.scratch().join(format!("{image}.qcow2")))?;
        qcow2.snapshot("s")?;
        if let Some(ceph) = peers.ceph {
            ceph.rbd(&["create", &image, "--size", &format!("{gib}G")])?;
            ceph.dirty(&image, DATA / MIB)?;
            ceph.rbd(&["snap", "create", &format!("{image}@s")])?;
        }
        Ok(Self { cluster, calls, label, image, raw, disk, qcow2, peers })
    }

    fn attach(&self, settings: &Settings, round: u32, table: &mut Table) -> anyhow::Result<()> {
        let label = format!("attach, {}", self.label);
        let name = |number: u64| format!("{}-{round}-{number}", self.image);
        let call = median_ms(samples(settings), |number| {
            let took = self.calls.attach((&self.image, 1), &name(number))?;
            self.calls.detach(&name(number))?;
            Ok(took)
        })?;
        table.add(&label, CALL, call);
        let command = median_ms(samples(settings), |number| {
            let took = timed(|| self.cluster.attach(&self.image, &name(number)))?;
            self.calls.detach(&name(number))?;
            Ok(took)
        })?;
        table.add(&label, COMMAND, command);
        let qemu = median_ms(samples(settings), |number| {
            let path = self.cluster.scratch().join(name(number));
            let (_, took) = Qcow2::over(&self.raw, &path)?;
            std::fs::remove_file(path)?;
            Ok(took)
        })?;
        table.add(&label, QEMU, qemu);
        Ok(())
    }

    fn clone_image(
        &self,
        settings: &Settings,
        round: u32,
        table: &mut Table,
    ) -> anyhow::Result<()> {
        let label = format!("clone, {}", self.label);
        let name = |how: &str, number: u64| format!("{how}-{}-{round}-{number}", self.image);
        let call = median_ms(samples(settings), |number| {
            self.calls.clone_image((&self.image, 1), &name("a", number))
        })?;
        table.add(&label, CALL, call);
        let command = median_ms(samples(settings), |number| {
            timed(|| self.cluster.json(&["image", "clone", &self.image, &name("b", number)]))
        })?;
        table.add(&label, COMMAND, command);
        if let Some(reflinks) = self.peers.reflinks {
            let reflink = median_ms(samples(settings), |_| reflinks.copy(&self.image, "clone"))?;
            table.add(&label, REFLINK, reflink);
        }
        if let Some(ceph) = self.peers.ceph {
            let snapshot = format!("{}@s", self.image);
            let rbd = median_ms(samples(settings), |number| {
                let clone = name("c", number);
                let took = ceph.rbd(&["clone", &snapshot, &clone])?;
                ceph.rbd(&["rm", &clone])?;
                Ok(took)
            })?;
            table.add(&label, RBD, rbd);
        }
        Ok(())
    }

    /// A MiB written to the disk, closed as a virtual machine does that ends.
    fn dirty(&self) -> anyhow::Result<()> {
        let file = std::fs::OpenOptions::new().write(true).open(&self.disk)?;
        Ok(file.write_all_at(&noise(1, MIB as usize), 0)?)
    }

    fn roll_back(&self, settings: &Settings, table: &mut Table) -> anyhow::Result<()> {
        let label = format!("rollback, {}", self.label);
        let disk = self.disk.file_stem().unwrap_or_default().to_string_lossy();
        let call = median_ms(samples(settings), |_| {
            self.dirty()?;
            self.calls.rollback(&disk)
        })?;
        table.add(&label, CALL, call);
        let command = median_ms(samples(settings), |_| {
            self.dirty()?;
            timed(|| self.cluster.json(&["disk", "rollback", &disk]))
        })?;
        table.add(&label, COMMAND, command);
        let qemu = median_ms(samples(settings), |_| {
            self.qcow2.dirty(1)?;
            self.qcow2.apply("s")
        })?;
        table.add(&label, QEMU, qemu);
        if let Some(reflinks) = self.peers.reflinks {
            let reflink = median_ms(samples(settings), |_| {
                let file = std::fs::OpenOptions::new().write(true).open(reflinks.path("clone"))?;
                file.write_all_at(&noise(1, MIB as usize), 0)?;
                reflinks.copy(&self.image, "clone")
            })?;
            table.add(&label, REFLINK, reflink);
        }
        if let Some(ceph) = self.peers.ceph {
            let snapshot = format!("{}@s", self.image);
            let rbd = median_ms(samples(settings), |_| {
                ceph.dirty(&self.image, 1)?;
                ceph.rbd(&["snap", "rollback", &snapshot])
            })?;
            table.add(&label, RBD, rbd);
        }
        Ok(())
    }

    /// The image's snapshots.
    fn list(&self, settings: &Settings, table: &mut Table) -> anyhow::Result<()> {
        let label = format!("list, {}", self.label);
        let newest = (&*self.image, 1);
        let call = median_ms(samples(settings), |_| self.calls.list_snapshots(newest))?;
        table.add(&label, CALL, call);
        let command = median_ms(samples(settings), |_| {
            timed(|| self.cluster.json(&["snapshot", "list", &self.image]))
        })?;
        table.add(&label, COMMAND, command);
        table.add(&label, QEMU, median_ms(samples(settings), |_| self.qcow2.list())?);
        if let Some(ceph) = self.peers.ceph {
            let args = ["snap", "ls", &self.image];
            table.add(&label, RBD, median_ms(samples(settings), |_| ceph.rbd(&args))?);
        }
        Ok(())
    }
}
