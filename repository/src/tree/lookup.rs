//! Finding chunks.

use blobcr_proto::Hash;

use super::TreeError;
use super::geometry::Root;
use super::source::NodeSource;
use super::walk::Walk;

/// The identities of `count` chunks from `first` on; `None` for a hole, and for whatever is beyond
/// the disk's end. One request per level of the tree, as long as the nodes of a level that are
/// needed fit in one.
///
/// # Errors
/// When nodes cannot be read or are not what the tree asks for.
pub async fn lookup(
    source: &dyn NodeSource,
    root: &Root,
    first: u64,
    count: usize,
) -> Result<Vec<Option<Hash>>, TreeError> {
    let mut found = vec![None; count];
    let mut walk = Walk::new(root, first..first.saturating_add(count as u64));
    while let Some(chunks) = walk.next(source, &mut |_, _, _| true, None).await? {
        for (index, id) in chunks {
            found[(index - first) as usize] = Some(id);
        }
    }
    Ok(found)
}
