//! The bytes of a chunk's sectors as they were.

use bytes::Bytes;

use super::DiskError;
use super::shape::Sectors;
use super::spill::Slot;

/// The sectors of a chunk that were in the delta, packed.
#[derive(Debug)]
pub(super) struct Content {
    present: Vec<Sectors>,
    packed: Packed,
}

#[derive(Debug)]
enum Packed {
    Bytes(Bytes),
    Spilled(Slot),
}

impl Content {
    /// In memory.
    pub(super) const fn of(present: Vec<Sectors>, packed: Bytes) -> Self {
        Self { present, packed: Packed::Bytes(packed) }
    }

    /// In the spill file.
    pub(super) const fn spilled(present: Vec<Sectors>, slot: Slot) -> Self {
        Self { present, packed: Packed::Spilled(slot) }
    }

    /// The bytes as they are, where they are a whole chunk of `size` bytes in memory.
    pub(super) fn whole(&self, size: usize) -> Option<Bytes> {
        match &self.packed {
            Packed::Bytes(bytes) if bytes.len() == size => Some(bytes.clone()),
            _ => None,
        }
    }

    /// Puts the sectors in their places in `chunk`; others are left alone.
    pub(super) fn unpack(&self, chunk: &mut [u8]) -> Result<(), DiskError> {
        let loaded;
        let packed: &[u8] = match &self.packed {
            Packed::Bytes(bytes) => bytes,
            Packed::Spilled(slot) => {
                loaded = slot.load()?;
                &loaded
            }
        };
        let mut at = 0;
        for run in &self.present {
            let from = &packed[at..at + run.bytes()];
            chunk[run.start_byte()..run.start_byte() + run.bytes()].copy_from_slice(from);
            at += run.bytes();
        }
        Ok(())
    }

    /// Runs of sectors that are not here, up to sector `end`.
    pub(super) fn absent(&self, end: usize) -> Vec<Sectors> {
        let mut absent = Vec::new();
        let mut first = 0;
        for run in &self.present {
            absent.push(Sectors { first, end: run.first });
            first = run.end;
        }
        absent.push(Sectors { first, end });
        absent.retain(|run| !run.is_empty());
        absent
    }
}

#[cfg(test)]
mod tests {
    use super::super::shape::SECTOR;
    use super::*;

    #[test]
    fn what_is_not_packed_is_absent() {
        let s = |first, end| Sectors { first, end };
        let content = Content::of(vec![s(2, 4)], vec![0; 2 * SECTOR].into());
        assert_eq!(content.absent(16), [s(0, 2), s(4, 16)]);
        assert_eq!(content.absent(4), [s(0, 2)]);
        let mut chunk = vec![1; 16 * SECTOR];
        content.unpack(&mut chunk).unwrap();
        for (sector, bytes) in chunk.chunks(SECTOR).enumerate() {
            let expected = u8::from(!(2..4).contains(&sector));
            assert!(bytes.iter().all(|byte| *byte == expected));
        }
    }
}
