//! Where the disk may hold data, for SEEK_DATA and SEEK_HOLE.

use super::DiskError;
use super::generation::Generation;
use super::shape::{SECTOR, Sectors};

/// A range of one chunk, and whether it may hold anything but zeros.
struct Extent {
    end: u64,
    data: bool,
}

impl Generation {
    /// The first byte from `offset` on whose extent is (or is not) a hole; `None`: none up to the
    /// end.
    pub(super) fn seek(&self, offset: u64, wanted_data: bool) -> Result<Option<u64>, DiskError> {
        let mut at = offset;
        while at < self.shape.size_bytes {
            let extent = self.extent(at)?;
            if extent.data == wanted_data {
                return Ok(Some(at));
            }
            at = extent.end;
        }
        Ok(None)
    }

    fn extent(&self, at: u64) -> Result<Extent, DiskError> {
        let chunk = at / self.shape.chunk_size.bytes();
        let start = self.shape.chunk_start(chunk);
        let first = (at - start) as usize / SECTOR;
        let end = self.shape.chunk_sectors(chunk);
        let (present, end) = self.map.run(chunk, Sectors { first, end });
        let end = start + (end * SECTOR) as u64;
        if !present {
            return Ok(Extent { end, data: self.base.may_have_data(chunk) != Some(false) });
        }
        // What was discarded is a hole of the delta.
        match self.delta.seek_data(at)? {
            Some(data) if data <= at => {
                Ok(Extent { end: self.delta.seek_hole(at)?.min(end), data: true })
            }
            Some(data) => Ok(Extent { end: data.min(end), data: false }),
            None => Ok(Extent { end, data: false }),
        }
    }
}
