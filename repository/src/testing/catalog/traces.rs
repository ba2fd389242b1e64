//! Read traces.

use blobcr_proto::v1::{self, SnapshotState};

use super::images::Images;
use super::{Answer, invalid, not_found, precondition};

impl Images {
    pub(super) fn get_trace(&self, r: &v1::SnapshotRef) -> Answer<v1::GetReadTraceResponse> {
        let asked = self.snapshot(r)?;
        let (mut image, mut last) = (asked.image_id, asked.number);
        loop {
            let mut before = self.traces.range((image, 0)..=(image, last));
            if let Some(((image_id, number), trace)) = before.next_back() {
                let (image_id, number) = (*image_id, *number);
                let trace = Some(trace.clone());
                return Ok(v1::GetReadTraceResponse { trace, image_id, number });
            }
            match self.by_id.get(&image).map(|record| &record.image) {
                Some(clone) if clone.parent_image != 0 => {
                    (image, last) = (clone.parent_image, clone.parent_snapshot);
                }
                _ => {
                    return not_found(format!("no read trace of {}@{}", asked.image, asked.number));
                }
            }
        }
    }

    pub(super) fn put_trace(
        &mut self,
        r: v1::PutReadTraceRequest,
    ) -> Answer<v1::PutReadTraceResponse> {
        let trace = r.trace.unwrap_or_default();
        trace.check().map_err(invalid)?;
        let image = Some(v1::ImageRef { id: r.image_id, name: String::new() });
        let found = self.snapshot(&v1::SnapshotRef { image, number: r.number })?;
        if found.state() != SnapshotState::Stable {
            return precondition(format!("{}@{} is not stable", found.image, found.number));
        }
        let kept = self.traces.entry((r.image_id, r.number)).or_default();
        if trace.count() > kept.count() {
            *kept = trace;
        }
        Ok(v1::PutReadTraceResponse {})
    }
}
