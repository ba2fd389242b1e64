//! Which of several stewards works. This only keeps work from being done twice: every task of a
//! steward is right whoever else does it at the same time, so clocks decide here about effort alone.

use std::time::Duration;

use blobcr_proto::v1;

use super::{RecordSwap, VersionManager, until_won};
use crate::error::Error;
use crate::records::{STEWARD_HOLDER_BYTES_MAX, StewardRecord};
use crate::store::Swap;

/// A steward that was not heard of for so long has lost the lead: several of its messages were.
pub const STEWARD_LEADS_FOR: Duration = Duration::from_secs(15);

const OBJECT: &str = "the lead of the stewards";

impl VersionManager {
    /// Takes the lead, keeps it, or tells who has it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a steward without a name, or with too long a one.
    pub async fn lead_steward(&self, r: v1::LeadStewardRequest) -> Result<v1::Steward, Error> {
        if r.holder.is_empty() || r.holder.len() > STEWARD_HOLDER_BYTES_MAX {
            return Err(Error::invalid(format!(
                "a steward\'s name has 1 to {STEWARD_HOLDER_BYTES_MAX} bytes; this is {:?}",
                r.holder
            )));
        }
        until_won!(self, OBJECT, self.try_lead(&r).await)
    }

    async fn try_lead(&self, r: &v1::LeadStewardRequest) -> Result<v1::Steward, Error> {
        let held = self.load::<StewardRecord>(StewardRecord::key_of()).await?;
        let mut next = StewardRecord {
            holder: r.holder.clone(),
            seen_unix_ms: if r.resign { 0 } else { self.now().max(1) },
            repair: r.repair.clone(),
            scrub: r.scrub,
        };
        let Some(held) = held else {
            self.store.swap(Swap::new().create(&next)).await?;
            return Ok(self.steward(next));
        };
        let old = &held.value;
        if old.holder != r.holder && (self.leads(old) || r.resign) {
            return Ok(self.steward(old.clone()));
        }
        next.scrub = next.scrub.or(old.scrub);
        self.store.swap(Swap::new().update(&held, &next)).await?;
        Ok(self.steward(next))
    }

    fn leads(&self, record: &StewardRecord) -> bool {
        let silent = self.now().saturating_sub(record.seen_unix_ms);
        record.seen_unix_ms != 0 && u128::from(silent) < STEWARD_LEADS_FOR.as_millis()
    }

    fn steward(&self, record: StewardRecord) -> v1::Steward {
        let alive = self.leads(&record);
        let StewardRecord { holder, seen_unix_ms, repair, scrub } = record;
        v1::Steward { holder, seen_unix_ms, alive, repair, scrub }
    }

    /// Who leads, and how far it is.
    ///
    /// # Errors
    /// When the store cannot tell.
    pub async fn get_steward(&self, _: v1::GetStewardRequest) -> Result<v1::Steward, Error> {
        let held = self.load::<StewardRecord>(StewardRecord::key_of()).await?;
        Ok(held.map_or_else(v1::Steward::default, |held| self.steward(held.value)))
    }
}
