//! Which steward leads: here whoever asked last.

use blobcr_proto::v1;

use super::unix_ms;

#[derive(Debug, Default)]
pub(super) struct Stewards(v1::Steward);

impl Stewards {
    pub(super) fn lead(&mut self, r: v1::LeadStewardRequest) -> v1::Steward {
        let v1::LeadStewardRequest { holder, repair, scrub, resign } = r;
        let scrub = scrub.or(self.0.scrub);
        let seen_unix_ms = unix_ms();
        self.0 = v1::Steward { holder, seen_unix_ms, alive: !resign, repair, scrub };
        self.get()
    }

    pub(super) fn get(&self) -> v1::Steward {
        self.0.clone()
    }
}
