//! Sources of numbers that are never given twice.

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// Which numbers. Persisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Counter {
    /// Image ids.
    Image = 1,
    /// Lease generations.
    Generation = 2,
    /// Pool ids.
    Pool = 3,
    /// Changes of which nodes there are and which of them tables name: whoever decides about both
    /// takes the next one, so that no two such decisions miss each other.
    Membership = 4,
}

/// One source.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CounterRecord {
    /// Which: a [`Counter`].
    #[prost(uint32, tag = "1")]
    pub counter: u32,
    /// The highest number given; the first is 1.
    #[prost(uint64, tag = "2")]
    pub given: u64,
}

impl CounterRecord {
    /// The key of a counter.
    #[must_use]
    pub fn key_of(counter: Counter) -> Key {
        KeyBuilder::new(KeyKind::Counter).u8(counter as u8).key()
    }
}

impl Record for CounterRecord {
    const KIND: KeyKind = KeyKind::Counter;

    fn key(&self) -> Key {
        KeyBuilder::new(KeyKind::Counter).u8(u8::try_from(self.counter).unwrap_or(0)).key()
    }

    fn check(&self) -> Result<(), &'static str> {
        match self.counter {
            1..=4 => Ok(()),
            _ => Err("unknown counter"),
        }
    }
}
