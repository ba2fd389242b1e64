//! Pins: who needs a snapshot, so that it is not removed.
//!
//! # Invariant
//! No snapshot that is pinned, nor its image, is removed. A pin is asked for only of a stable
//! snapshot; checkpoint sets pin their members from the beginning (see [`super::sets`]). Making a pin writes the image's record as it was, and every removal depends on that
//! record: of two that run at the same time, one is lost and looks again.

use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;
use futures::future::try_join_all;

use super::{RecordSwap, VersionManager, list_limit, until_won};
use crate::error::Error;
use crate::records::{KeyKind, PinRecord, SET_HOLDER_PREFIX, check_holder, prefix_of};
use crate::store::{Key, SWAP_KEYS_MAX, Swap};

/// Holders in one call at most: bounds its memory and its time.
const HOLDERS_MAX: usize = 4096;
/// The image and the snapshot take part in each swap. The longest pins fit its bytes, too.
const PINS_IN_A_SWAP: usize = SWAP_KEYS_MAX - 2;

impl VersionManager {
    /// Keeps a stable snapshot and its image until it is unpinned. Nothing happens when the holder
    /// has pinned it already.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such snapshot, [`Error::Precondition`] when it is not
    /// stable.
    pub async fn pin_snapshot(&self, r: v1::PinSnapshotRequest) -> Result<v1::Pin, Error> {
        check_asked(&r.holder)?;
        let wanted = r.snapshot.unwrap_or_default();
        let id = self.image_record(&wanted.image.clone().unwrap_or_default()).await?.value.id;
        let _turn = self.image_turn(id).await;
        let object = format!("snapshot {} of the image with the id {id}", wanted.number);
        let by_id = v1::SnapshotRef { image: Some(super::snapshots::id_ref(id)), ..wanted };
        let holders = [r.holder];
        let mut pins = until_won!(self, object, self.try_pin(&by_id, &holders).await)?;
        pins.pop().ok_or_else(|| Error::invalid("a pin without a holder"))
    }

    /// The same for several holders, in as few swaps as they fit into.
    ///
    /// # Errors
    /// As [`Self::pin_snapshot`]; some holders may then have their pin.
    pub async fn pin_snapshots(
        &self,
        r: v1::PinSnapshotsRequest,
    ) -> Result<v1::PinSnapshotsResponse, Error> {
        let wanted = r.snapshot.unwrap_or_default();
        if wanted.number == 0 || r.holders.is_empty() || r.holders.len() > HOLDERS_MAX {
            let text = format!("name a snapshot by its number, and 1 to {HOLDERS_MAX} holders");
            return Err(Error::invalid(text));
        }
        r.holders.iter().try_for_each(|holder| check_asked(holder))?;
        let id = self.image_record(&wanted.image.clone().unwrap_or_default()).await?.value.id;
        let _turn = self.image_turn(id).await;
        let by_id = v1::SnapshotRef { image: Some(super::snapshots::id_ref(id)), ..wanted };
        for holders in r.holders.chunks(PINS_IN_A_SWAP) {
            let object = format!("snapshot {} of the image with the id {id}", wanted.number);
            until_won!(self, object, self.try_pin(&by_id, holders).await)?;
        }
        Ok(v1::PinSnapshotsResponse {})
    }

    /// Makes the pins that are missing, in one swap.
    async fn try_pin(
        &self,
        wanted: &v1::SnapshotRef,
        holders: &[String],
    ) -> Result<Vec<v1::Pin>, Error> {
        let (image, snapshot) = self.snapshot_record(wanted).await?;
        let (id, number) = (image.value.id, snapshot.value.number);
        let keys = holders.iter().map(|holder| PinRecord::key_of(id, number, holder));
        let found = try_join_all(keys.map(|key| self.load::<PinRecord>(key))).await?;
        let mut missing: Vec<&String> =
            holders.iter().zip(&found).filter(|(_, pin)| pin.is_none()).map(|(h, _)| h).collect();
        missing.sort_unstable();
        missing.dedup();
        let mut pins: Vec<v1::Pin> =
            found.into_iter().flatten().map(|pin| pin.value.to_wire()).collect();
        if missing.is_empty() {
            return Ok(pins);
        }
        if snapshot.value.state() != SnapshotState::Stable {
            let state = super::snapshots::state_name(&snapshot.value);
            let object = super::snapshots::describe(&image.value.name, number);
            let problem = format!("is {state}; only a stable snapshot can be pinned");
            return Err(Error::precondition(object, problem));
        }
        let mut swap = Swap::new().update(&image, &image.value).unchanged(&snapshot);
        for holder in missing {
            let pin = PinRecord {
                image_id: id,
                number,
                holder: holder.to_owned(),
                image: image.value.name.clone(),
                created_unix_ms: self.now(),
            };
            swap = swap.create(&pin);
            pins.push(pin.to_wire());
        }
        self.store.swap(swap).await?;
        Ok(pins)
    }

    /// Takes a pin away. Nothing happens when there is none. When it was all that kept the image of a
    /// disk whose checkpoint sets were given up, the image goes with it.
    ///
    /// # Errors
    /// When the store cannot.
    pub async fn unpin_snapshot(
        &self,
        r: v1::UnpinSnapshotRequest,
    ) -> Result<v1::UnpinSnapshotResponse, Error> {
        check_asked(&r.holder)?;
        let key = PinRecord::key_of(r.image_id, r.number, &r.holder);
        let object = format!("the pin of {} by {:?}", r.number, r.holder);
        until_won!(self, object, self.try_unpin(&key).await)?;
        self.remove_if_left_behind(r.image_id).await?;
        Ok(v1::UnpinSnapshotResponse {})
    }

    pub(super) async fn try_unpin(&self, key: &Key) -> Result<(), Error> {
        if let Some(pin) = self.load::<PinRecord>(key.clone()).await? {
            self.store.swap(Swap::new().remove(&pin)).await?;
        }
        Ok(())
    }

    /// Pins in order of image and snapshot, of the holders whose name begins as asked.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn list_pins(&self, r: v1::ListPinsRequest) -> Result<v1::ListPinsResponse, Error> {
        let after = r.after.map(|pin| PinRecord::key_of(pin.image_id, pin.number, &pin.holder));
        let prefix = prefix_of(KeyKind::Pin);
        let (pins, more) =
            self.page::<PinRecord>(&prefix, after.as_ref(), list_limit(r.limit)).await?;
        let next = pins.last().filter(|_| more).map(|pin| pin.value.to_wire());
        let asked = |pin: &v1::Pin| pin.holder.starts_with(&r.holder_prefix);
        let pins = pins.iter().map(|pin| pin.value.to_wire()).filter(asked).collect();
        Ok(v1::ListPinsResponse { pins, next })
    }

    /// Refuses when there is a pin under `prefix`.
    pub(super) async fn check_unpinned(&self, prefix: &Key, object: &str) -> Result<(), Error> {
        debug_assert!(prefix.as_slice().starts_with(prefix_of(KeyKind::Pin).as_slice()));
        let Some(pin) = self.page::<PinRecord>(prefix, None, 1).await?.0.pop() else {
            return Ok(());
        };
        let PinRecord { image, number, holder, .. } = pin.value;
        if let Some((group, sequence)) =
            holder.strip_prefix(SET_HOLDER_PREFIX).and_then(|set| set.split_once('/'))
        {
            let problem = format!(
                "cannot be removed: {image}@{number} is a member of set {sequence} of group \
                 {group:?}; give old sets up with `blobcr set prune {group} --keep-last N`"
            );
            return Err(Error::precondition(object.to_owned(), problem));
        }
        Err(Error::precondition(
            object.to_owned(),
            format!(
                "cannot be removed: {image}@{number} is pinned by {holder}; detach the disk, or \
                 take the pin away with `blobcr snapshot unpin {image}@{number} --holder {holder}`"
            ),
        ))
    }
}

/// Sets make and take away pins of their own.
fn check_asked(holder: &str) -> Result<(), Error> {
    check_holder(holder).map_err(Error::invalid)?;
    if holder.starts_with(SET_HOLDER_PREFIX) {
        return Err(Error::invalid(format!(
            "a holder that begins with {SET_HOLDER_PREFIX:?} is a checkpoint set; use `blobcr set pin`, \
             `unpin` or `prune`"
        )));
    }
    Ok(())
}
