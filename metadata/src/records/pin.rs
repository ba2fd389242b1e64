//! Pins: what keeps a snapshot from being removed.

use blobcr_proto::v1;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// The longest name of a holder, in bytes: a mirror's identity and the name of a disk, or what an
/// operator wrote.
pub const HOLDER_BYTES_MAX: usize = 256;

/// One holder's need of one snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PinRecord {
    /// The snapshot's image.
    #[prost(uint64, tag = "1")]
    pub image_id: u64,
    /// The snapshot.
    #[prost(uint64, tag = "2")]
    pub number: u64,
    /// Who needs it.
    #[prost(string, tag = "3")]
    pub holder: String,
    /// The image's name, as it was.
    #[prost(string, tag = "4")]
    pub image: String,
    /// When it was pinned, in ms since 1970.
    #[prost(uint64, tag = "5")]
    pub created_unix_ms: u64,
}

impl PinRecord {
    /// The key of a pin.
    #[must_use]
    pub fn key_of(image_id: u64, number: u64, holder: &str) -> Key {
        Self::builder(image_id).u64(number).text(holder).key()
    }

    /// What the pins of an image begin with.
    #[must_use]
    pub fn prefix_of_image(image_id: u64) -> Key {
        Self::builder(image_id).key()
    }

    /// What the pins of a snapshot begin with.
    #[must_use]
    pub fn prefix_of(image_id: u64, number: u64) -> Key {
        Self::builder(image_id).u64(number).key()
    }

    fn builder(image_id: u64) -> KeyBuilder {
        KeyBuilder::new(KeyKind::Pin).u64(image_id)
    }

    /// The wire form.
    #[must_use]
    pub fn to_wire(&self) -> v1::Pin {
        v1::Pin {
            image_id: self.image_id,
            image: self.image.clone(),
            number: self.number,
            holder: self.holder.clone(),
            created_unix_ms: self.created_unix_ms,
        }
    }
}

/// Checks the name of a holder.
///
/// # Errors
/// What is wrong with it.
pub fn check_holder(holder: &str) -> Result<(), &'static str> {
    if holder.is_empty() || holder.len() > HOLDER_BYTES_MAX || holder.chars().any(char::is_control)
    {
        return Err("a pin's holder has 1 to 256 bytes and no control characters");
    }
    Ok(())
}

impl Record for PinRecord {
    const KIND: KeyKind = KeyKind::Pin;

    fn key(&self) -> Key {
        Self::key_of(self.image_id, self.number, &self.holder)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.image_id == 0 || self.number == 0 {
            return Err("an id or number is zero");
        }
        check_holder(&self.holder)
    }
}
