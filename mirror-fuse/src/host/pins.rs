//! Pins of a mirror's disks: the repository keeps the snapshots that they need.
//!
//! A pin is made before its disk, and taken away after it. So a crash, or a repository that is away,
//! can only leave a pin too much; [`settle`] finds those at the next start, and gives pins to disks
//! of an older version that have none.

use std::sync::Weak;
use std::time::Duration;

use blobcr_proto::{DiskName, v1};
use blobcr_repository::CatalogError;
use tokio::sync::watch;

use super::{Host, Inner};
use crate::disk::pin_holder;
use crate::registry::Entry;

/// Between two tries while the repository is away.
const RETRY: Duration = Duration::from_secs(10);

/// A snapshot by image and number.
type Pinned = (u64, u64);

fn named((image_id, number): Pinned) -> v1::SnapshotRef {
    let image = v1::ImageRef { id: image_id, name: String::new() };
    v1::SnapshotRef { image: Some(image), number }
}

impl Host {
    /// A pin of the snapshot for each of the disks.
    pub(super) async fn pin(
        &self,
        disks: &[DiskName],
        snapshot: Pinned,
    ) -> Result<(), CatalogError> {
        if let [disk] = disks {
            return self.make_pin(disk.as_str(), snapshot).await;
        }
        let holder = |disk: &DiskName| pin_holder(&self.0.writer, disk.as_str());
        let request = v1::PinSnapshotsRequest {
            snapshot: Some(named(snapshot)),
            holders: disks.iter().map(holder).collect(),
        };
        self.0.repository.catalog().pin_snapshots(request).await?;
        Ok(())
    }

    async fn make_pin(&self, disk: &str, snapshot: Pinned) -> Result<(), CatalogError> {
        let request = v1::PinSnapshotRequest {
            snapshot: Some(named(snapshot)),
            holder: pin_holder(&self.0.writer, disk),
        };
        self.0.repository.catalog().pin_snapshot(request).await.map(|_| ())
    }

    async fn take_pin(&self, disk: &str, (image_id, number): Pinned) -> Result<(), CatalogError> {
        let holder = pin_holder(&self.0.writer, disk);
        let request = v1::UnpinSnapshotRequest { image_id, number, holder };
        self.0.repository.catalog().unpin_snapshot(request).await.map(|_| ())
    }

    /// Takes pins of a disk that is gone away, as far as the repository can be reached.
    pub(super) async fn unpin(&self, disk: &DiskName, snapshots: &[Pinned]) {
        for snapshot in snapshots {
            if let Err(error) = self.take_pin(disk.as_str(), *snapshot).await {
                tracing::warn!(%disk, %error, "a pin stays until the mirror is started again");
            }
        }
    }

    /// Takes the pins of disks that were not made after all away. Where one stays, so do those behind
    /// it: the repository is away, and the mirror's next start takes them.
    pub(super) async fn unpin_unmade(&self, disks: &[DiskName], snapshot: Pinned) {
        for disk in disks {
            if let Err(error) = self.take_pin(disk.as_str(), snapshot).await {
                tracing::warn!(%disk, %error, "pins stay until the mirror is started again");
                return;
            }
        }
    }

    async fn settle_pins(&self) -> Result<(), CatalogError> {
        for served in self.0.disks.all_served() {
            for snapshot in served.disk.needed_pins() {
                match self.make_pin(served.disk.name(), snapshot).await {
                    Err(error) if error.is_transient() => return Err(error),
                    Err(error) => {
                        let disk = served.disk.name();
                        tracing::error!(disk, %error, "a snapshot that a disk needs is not kept");
                    }
                    Ok(()) => {}
                }
            }
        }
        let own = pin_holder(&self.0.writer, "");
        let mut after = None;
        loop {
            let request = v1::ListPinsRequest { holder_prefix: own.clone(), after, limit: 0 };
            let page = self.0.repository.catalog().list_pins(request).await?;
            for pin in &page.pins {
                self.drop_if_unneeded(pin, pin.holder.trim_start_matches(&own)).await?;
            }
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(()),
            }
        }
    }

    async fn drop_if_unneeded(&self, pin: &v1::Pin, disk: &str) -> Result<(), CatalogError> {
        let snapshot = (pin.image_id, pin.number);
        match self.0.disks.get(disk) {
            // Being attached or detached, or kept for somebody to mend.
            Some(Entry::Reserved | Entry::Broken(_)) => Ok(()),
            Some(Entry::Served(served)) => {
                served.disk.drop_pin_if_unneeded(snapshot).await;
                Ok(())
            }
            None => {
                let Ok(name) = DiskName::new(disk) else { return Ok(()) };
                // Nobody attaches a disk of this name meanwhile.
                let Ok(_place) = self.0.disks.reserve(&name) else { return Ok(()) };
                tracing::info!(disk, image = pin.image, number = pin.number, "unpinned");
                self.take_pin(disk, snapshot).await
            }
        }
    }
}

/// Makes the pins what the disks of the host need, as soon as the repository can be reached.
pub(super) async fn settle(host: Weak<Inner>, mut stopping: watch::Receiver<bool>) {
    let settled = async {
        // Not while nobody else has the mirror.
        while let Some(host) = host.upgrade().map(Host) {
            match host.settle_pins().await {
                Ok(()) => return,
                Err(error) => tracing::debug!(%error, "the pins of the disks are settled later"),
            }
            drop(host);
            tokio::time::sleep(RETRY).await;
        }
    };
    tokio::select! {
        () = settled => {}
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
}
