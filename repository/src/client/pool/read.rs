//! Reads: from the first choice, then from the other replicas.

use std::collections::HashMap;
use std::sync::Arc;

use blobcr_proto::Hash;
use blobcr_proto::record::{self, RecordKey};
use blobcr_proto::v1::{self, RecordKind};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::RemotePool;
use crate::client::link::NodeLink;
use crate::client::status::NodeError;
use crate::placement::Placement;
use crate::{StoreError, cpu};

/// Tree nodes of one get request at most: each is about 32 KiB at the most, so half a message
/// holds them. Chunks are asked for one by one.
const NODES_AT_ONCE: usize = 256;
/// Get requests of one call under way at once.
const GETS_AT_ONCE: usize = 8;

/// What a node said to a question about one object.
type Answer<T> = Result<T, NodeError>;

/// Places in a list of identities, and the node that is asked for them.
type Question = (Arc<NodeLink>, Vec<usize>);

impl RemotePool {
    /// One object from one node.
    async fn get_from(&self, link: &NodeLink, kind: RecordKind, id: Hash) -> Answer<Bytes> {
        let refs = vec![RecordKey::whole(kind, id).to_ref()];
        let answer = link.get(v1::GetRequest { pool: self.pool.id, refs }).await;
        self.links.noted(link, &answer);
        let found = answer?.found.into_iter().next().ok_or(NodeError::Absent)?;
        opened(found, kind, id).await
    }

    pub(super) async fn get_under(
        &self,
        placement: &Placement,
        kind: RecordKind,
        id: Hash,
    ) -> Result<Bytes, StoreError> {
        let mut worst = None;
        for link in self.readers(placement, &id)? {
            match self.get_from(&link, kind, id).await {
                Ok(plain) => return Ok(plain),
                Err(error) => {
                    tracing::debug!(node = link.address(), %id, ?error, "trying the next replica");
                    let error = error.into_store_error(link.address(), kind, id);
                    worst = Some(worst.map_or(error.clone(), |old| graver(old, error)));
                }
            }
        }
        Err(worst.unwrap_or(StoreError::Missing { kind, id }))
    }

    /// Several small objects that have one first choice, in one request to it; an object that it
    /// cannot give comes from the others.
    async fn get_batch(
        &self,
        placement: &Placement,
        link: &NodeLink,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<Bytes>, StoreError> {
        let refs = ids.iter().map(|id| RecordKey::whole(kind, *id).to_ref()).collect();
        let answer = link.get(v1::GetRequest { pool: self.pool.id, refs }).await;
        self.links.noted(link, &answer);
        let mut found = answer.map_or_else(|_| Vec::new(), |answer| answer.found).into_iter();
        let mut plains = Vec::with_capacity(ids.len());
        for id in ids {
            let first = match found.next() {
                Some(found) => opened(found, kind, *id).await,
                None => Err(NodeError::Absent),
            };
            plains.push(match first {
                Ok(plain) => plain,
                Err(_) => self.get_under(placement, kind, *id).await?,
            });
        }
        Ok(plains)
    }

    /// Splits the objects by their first choice.
    fn questions(
        &self,
        placement: &Placement,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<Question>, StoreError> {
        let mut by_node: HashMap<String, Question> = HashMap::new();
        for (at, id) in ids.iter().enumerate() {
            let holders = self.readers(placement, id)?;
            let Some(first) = holders.into_iter().next() else {
                return Err(StoreError::Missing { kind, id: *id });
            };
            let entry = by_node.entry(first.address().to_owned());
            entry.or_insert_with(|| (first, Vec::new())).1.push(at);
        }
        let limit = if kind == RecordKind::TreeNode { NODES_AT_ONCE } else { 1 };
        let mut questions = Vec::new();
        for (link, places) in by_node.into_values() {
            questions.extend(places.chunks(limit).map(|some| (Arc::clone(&link), some.to_vec())));
        }
        Ok(questions)
    }

    pub(super) async fn get_many_under(
        &self,
        placement: &Placement,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<Bytes>, StoreError> {
        let questions = self.questions(placement, kind, ids)?;
        let fetched: Vec<(Vec<usize>, Vec<Bytes>)> = stream::iter(questions)
            .map(|(link, places)| async move {
                let wanted: Vec<Hash> = places.iter().map(|at| ids[*at]).collect();
                let plains = self.get_batch(placement, &link, kind, &wanted).await?;
                Ok::<_, StoreError>((places, plains))
            })
            .buffer_unordered(GETS_AT_ONCE)
            .try_collect()
            .await?;
        let mut plains = vec![Bytes::new(); ids.len()];
        for (places, of_batch) in fetched {
            for (at, plain) in places.into_iter().zip(of_batch) {
                plains[at] = plain;
            }
        }
        Ok(plains)
    }
}

/// Takes an object out of a node's answer, checked down to its identity.
async fn opened(found: v1::Found, kind: RecordKind, id: Hash) -> Answer<Bytes> {
    let Some(record) = found.record else {
        return Err(if found.damaged {
            NodeError::Damaged("the node could not read it whole".into())
        } else {
            NodeError::Absent
        });
    };
    let bytes = record.plain_len as usize;
    match cpu::run(bytes, move || record::open(&record)).await {
        Ok((key, plain)) if key == RecordKey::whole(kind, id) => Ok(plain),
        Ok((key, _)) => Err(NodeError::Damaged(format!("the node gave {} instead", key.id))),
        Err(error) => Err(NodeError::Damaged(error.to_string())),
    }
}

/// Of two failures to read an object, the one to tell: while a replica could not be asked, nobody
/// knows whether the object is lost; a damaged copy says more than an absent one.
fn graver(a: StoreError, b: StoreError) -> StoreError {
    let rank = |error: &StoreError| match error {
        StoreError::Unavailable(_) | StoreError::Full { .. } => 3,
        StoreError::Refused { .. } => 2,
        StoreError::Damaged { .. } => 1,
        StoreError::Missing { .. } => 0,
    };
    if rank(&b) > rank(&a) { b } else { a }
}
