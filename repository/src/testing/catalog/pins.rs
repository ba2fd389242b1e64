//! Pins.

use blobcr_proto::v1::{self, SnapshotState};

use super::images::Images;
use super::{Answer, page, precondition, unix_ms};

impl Images {
    pub(super) fn pin(&mut self, r: v1::PinSnapshotRequest) -> Answer<v1::Pin> {
        let found = self.snapshot(&r.snapshot.unwrap_or_default())?;
        if found.state() != SnapshotState::Stable {
            return precondition(format!("{}@{} is not stable", found.image, found.number));
        }
        let pin = v1::Pin {
            image_id: found.image_id,
            image: found.image,
            number: found.number,
            holder: r.holder.clone(),
            created_unix_ms: unix_ms(),
        };
        let key = (found.image_id, found.number, r.holder);
        Ok(self.pins.entry(key).or_insert(pin).clone())
    }

    pub(super) fn pin_all(
        &mut self,
        r: &v1::PinSnapshotsRequest,
    ) -> Answer<v1::PinSnapshotsResponse> {
        for holder in r.holders.clone() {
            self.pin(v1::PinSnapshotRequest { snapshot: r.snapshot.clone(), holder })?;
        }
        Ok(v1::PinSnapshotsResponse {})
    }

    /// Pins what a set names: it may be pending still, or not have begun.
    pub(super) fn pin_member(&mut self, image_id: u64, member: &v1::SetMember, holder: &str) {
        let pin = v1::Pin {
            image_id,
            image: member.image.clone(),
            number: member.number,
            holder: holder.to_owned(),
            created_unix_ms: unix_ms(),
        };
        self.pins.entry((image_id, member.number, holder.to_owned())).or_insert(pin);
    }

    pub(super) fn unpin(&mut self, r: &v1::UnpinSnapshotRequest) -> v1::UnpinSnapshotResponse {
        self.pins.remove(&(r.image_id, r.number, r.holder.clone()));
        v1::UnpinSnapshotResponse {}
    }

    pub(super) fn list_pins(&self, r: &v1::ListPinsRequest) -> v1::ListPinsResponse {
        let after = r.after.as_ref().map(|pin| (pin.image_id, pin.number, pin.holder.clone()));
        let asked = self.pins.iter().filter(|(key, pin)| {
            after.as_ref().is_none_or(|after| *key > after)
                && pin.holder.starts_with(&r.holder_prefix)
        });
        let (pins, more) = page(asked.map(|(_, pin)| pin.clone()), r.limit);
        let next = pins.last().filter(|_| more).cloned();
        v1::ListPinsResponse { pins, next }
    }

    /// Refuses when a snapshot that `is_meant`, by image and number, is pinned.
    pub(super) fn check_unpinned(&self, is_meant: impl Fn(u64, u64) -> bool) -> Answer<()> {
        match self.pins.values().find(|pin| is_meant(pin.image_id, pin.number)) {
            None => Ok(()),
            Some(pin) => {
                precondition(format!("{}@{} is pinned by {}", pin.image, pin.number, pin.holder))
            }
        }
    }
}
