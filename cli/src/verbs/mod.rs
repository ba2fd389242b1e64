//! The operator's verbs.

pub mod disk;
pub mod gc;
mod health;
pub mod image;
pub mod node;
mod pins;
pub mod pool;
mod prune;
pub mod relay;
mod restart;
pub mod scrub;
pub mod set;
pub mod snapshot;
pub mod status;
mod update;
pub mod vm;

use blobcr_proto::{ImageSpec, v1};

/// An image by name.
fn image_ref(name: impl ToString) -> v1::ImageRef {
    v1::ImageRef { name: name.to_string(), id: 0 }
}

/// What `IMAGE[@N]` names.
fn snapshot_ref(spec: &ImageSpec) -> v1::SnapshotRef {
    v1::SnapshotRef { image: Some(image_ref(&spec.image)), number: spec.number.unwrap_or_default() }
}
