//! The operator's verbs.

pub mod disk;
mod health;
pub mod image;
pub mod node;
pub mod pool;
pub mod snapshot;
pub mod status;
mod transfer;
pub mod vm;

use blobcr_proto::{ImageSpec, v1};
use blobcr_repository::Repository;
use blobcr_repository::tree::Root;

use crate::exit::{Exit, Refusal};

/// An image by name.
fn image_ref(name: impl ToString) -> v1::ImageRef {
    v1::ImageRef { name: name.to_string(), id: 0 }
}

/// What `IMAGE[@N]` names.
fn snapshot_ref(spec: &ImageSpec) -> v1::SnapshotRef {
    v1::SnapshotRef { image: Some(image_ref(&spec.image)), number: spec.number.unwrap_or_default() }
}

/// A stable snapshot, its image and its tree.
struct Readable {
    image: v1::Image,
    snapshot: v1::Snapshot,
    root: Root,
}

/// Finds a snapshot that can be read.
async fn readable(repository: &Repository, spec: &ImageSpec) -> anyhow::Result<Readable> {
    let (image, snapshot) = repository.snapshot(snapshot_ref(spec)).await?;
    let state = snapshot.state();
    if state != v1::SnapshotState::Stable {
        let word = crate::view::state_word(state);
        let number = snapshot.number;
        let hint = if state == v1::SnapshotState::Pending {
            format!("; wait for it with `blobcr snapshot wait {}@{number}`", image.name)
        } else {
            String::new()
        };
        let message = format!("snapshot {}@{number} is {word}, not stable{hint}", image.name);
        return Err(Refusal::new(Exit::Conflict, message).into());
    }
    let wire = snapshot.root.as_ref().ok_or_else(|| {
        let message = format!("the record of {spec} has no root; its metadata is damaged");
        Refusal::new(Exit::Integrity, message)
    })?;
    let root = Root::try_from(wire)?;
    Ok(Readable { image, snapshot, root })
}
