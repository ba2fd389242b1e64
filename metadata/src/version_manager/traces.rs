//! Read traces: what the disks of a snapshot waited for first, for those that start from it later.
//!
//! A trace is a hint. It belongs to a stable snapshot and goes with it; a snapshot without one borrows
//! from those that it descends from, because what a guest reads at its start seldom moves.

use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;

use super::{Held, RecordSwap, VersionManager, until_won};
use crate::error::Error;
use crate::records::{ImageRecord, ReadTraceRecord};
use crate::store::Swap;

/// Snapshots of an image that have a trace, at most; the oldest goes for a new one. Disks start from
/// few snapshots of an image, and mostly from the newest.
const TRACES_OF_AN_IMAGE_MAX: usize = 8;
/// Images that are asked for a trace, from clone to source, at most: bounds the time of one call.
const ANCESTORS_MAX: usize = 16;

impl VersionManager {
    /// The trace of a snapshot, or of the nearest that it descends from and that has one.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such snapshot, or no trace.
    pub async fn get_read_trace(
        &self,
        r: v1::SnapshotRef,
    ) -> Result<v1::GetReadTraceResponse, Error> {
        let (image, snapshot) = self.snapshot_record(&r).await?;
        let name = super::snapshots::describe(&image.value.name, snapshot.value.number);
        let (mut image, mut number) = (image.value, snapshot.value.number);
        for _ in 0..ANCESTORS_MAX {
            let traces = self.traces_of(image.id).await?;
            if let Some(found) = traces.into_iter().rfind(|held| held.value.number <= number) {
                let ReadTraceRecord { image_id, number, trace, .. } = found.value;
                return Ok(v1::GetReadTraceResponse { trace, image_id, number });
            }
            // A source that was removed is still known by its id.
            let parent = ImageRecord::key_of(image.parent_image);
            let Some(source) = self.load::<ImageRecord>(parent).await? else { break };
            number = image.parent_snapshot;
            image = source.value;
        }
        Err(Error::not_found(
            format!("read trace of {name}"),
            "one is kept when a disk has been read for a while",
        ))
    }

    /// Of all snapshots of an image, by number.
    async fn traces_of(&self, image_id: u64) -> Result<Vec<Held<ReadTraceRecord>>, Error> {
        self.all(&ReadTraceRecord::prefix_of(image_id)).await
    }

    /// Keeps a trace for a stable snapshot, unless it has one that is as long.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a trace that breaks the rules, [`Error::NotFound`] when there is no such
    /// snapshot, [`Error::Precondition`] when it is not stable.
    pub async fn put_read_trace(
        &self,
        r: v1::PutReadTraceRequest,
    ) -> Result<v1::PutReadTraceResponse, Error> {
        let trace = r.trace.as_ref().ok_or_else(|| Error::invalid("there is no trace"))?;
        trace.check().map_err(Error::invalid)?;
        if r.number == 0 {
            return Err(Error::invalid("name a snapshot by its number"));
        }
        let object = super::snapshots::describe_id(r.image_id, r.number);
        until_won!(self, object, self.try_put_read_trace(&r).await)?;
        Ok(v1::PutReadTraceResponse {})
    }

    async fn try_put_read_trace(&self, r: &v1::PutReadTraceRequest) -> Result<(), Error> {
        let image = Some(super::snapshots::id_ref(r.image_id));
        let wanted = v1::SnapshotRef { image, number: r.number };
        let (image, snapshot) = self.snapshot_record(&wanted).await?;
        if snapshot.value.state() != SnapshotState::Stable {
            let object = super::snapshots::describe(&image.value.name, r.number);
            return Err(Error::precondition(object, "is not stable and keeps no read trace"));
        }
        let new = ReadTraceRecord {
            image_id: r.image_id,
            number: r.number,
            trace: r.trace.clone(),
            put_unix_ms: self.now(),
        };
        let traces = self.traces_of(r.image_id).await?;
        // Its removal writes the snapshot's record and takes the trace away.
        let swap = Swap::new().unchanged(&snapshot);
        let swap = match traces.iter().find(|held| held.value.number == r.number) {
            Some(held) if held.value.count() >= new.count() => return Ok(()),
            Some(held) => swap.update(held, &new),
            None => match traces.first() {
                Some(oldest) if traces.len() >= TRACES_OF_AN_IMAGE_MAX => {
                    swap.create(&new).remove(oldest)
                }
                _ => swap.create(&new),
            },
        };
        self.store.swap(swap).await?;
        Ok(())
    }
}
