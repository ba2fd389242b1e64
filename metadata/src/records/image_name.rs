//! Which image has a name.

use blobcr_proto::ImageName;

use super::{KeyBuilder, KeyKind, Record};
use crate::store::Key;

/// A name in use.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageNameRecord {
    /// The name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The image that has it.
    #[prost(uint64, tag = "2")]
    pub image_id: u64,
}

impl ImageNameRecord {
    /// The key of a name.
    #[must_use]
    pub fn key_of(name: &str) -> Key {
        KeyBuilder::new(KeyKind::ImageName).text(name).key()
    }
}

impl Record for ImageNameRecord {
    const KIND: KeyKind = KeyKind::ImageName;

    fn key(&self) -> Key {
        Self::key_of(&self.name)
    }

    fn check(&self) -> Result<(), &'static str> {
        ImageName::new(self.name.as_str()).map_err(|_| "no image name")?;
        if self.image_id == 0 { Err("an id is zero") } else { Ok(()) }
    }
}
