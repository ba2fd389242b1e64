//! Reads of many small objects: those of one first choice in one request.

use std::collections::HashMap;
use std::sync::Arc;

use blobcr_proto::Hash;
use blobcr_proto::record::RecordKey;
use blobcr_proto::v1::{self, RecordKind};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use tokio::time::{Instant, timeout};

use super::RemotePool;
use super::read::opened;
use crate::StoreError;
use crate::client::link::NodeLink;
use crate::placement::Placement;

/// Tree nodes of one get request at most: each is about 32 KiB at the most, so half a message
/// holds them. Chunks are asked for one by one.
const NODES_AT_ONCE: usize = 256;
/// Get requests of one call under way at once.
const GETS_AT_ONCE: usize = 8;
/// Choices that are asked for many objects at once. What two of them do not give is rare, and then
/// asked for one by one.
const CHOICES_IN_BATCHES: usize = 2;

/// Places in a list of identities, the node that is asked for them, and whether others could be.
struct Question {
    link: Arc<NodeLink>,
    places: Vec<usize>,
    others: bool,
}

impl RemotePool {
    /// Splits the objects that are still missing by their choice number `choice`.
    fn questions(
        &self,
        placement: &Placement,
        kind: RecordKind,
        ids: &[Hash],
        have: &[Option<Bytes>],
        choice: usize,
    ) -> Result<Vec<Question>, StoreError> {
        let mut by_node: HashMap<String, Question> = HashMap::new();
        for (at, id) in ids.iter().enumerate().filter(|(at, _)| have[*at].is_none()) {
            let choices = self.choices(placement, kind, id)?;
            let Some(holder) = choices.get(choice) else { continue };
            let question = || Question {
                link: Arc::clone(&holder.link),
                places: Vec::new(),
                others: choices.len() > 1,
            };
            let address = holder.link.address().to_owned();
            by_node.entry(address).or_insert_with(question).places.push(at);
        }
        let parts = by_node.into_values().flat_map(|Question { link, places, others }| {
            let part = |some: &[usize]| Question {
                link: Arc::clone(&link),
                places: some.to_vec(),
                others,
            };
            places.chunks(NODES_AT_ONCE).map(part).collect::<Vec<_>>()
        });
        Ok(parts.collect())
    }

    /// The objects that a node gives of those it is asked for; none when it is slow and there are
    /// others.
    async fn get_batch(
        &self,
        kind: RecordKind,
        ids: &[Hash],
        question: Question,
    ) -> Vec<(usize, Bytes)> {
        let Question { link, places, others } = question;
        let refs = places.iter().map(|at| RecordKey::whole(kind, ids[*at]).to_ref()).collect();
        let (pool, table_version) = (self.pool.id, self.table_version());
        let request = link.get(v1::GetRequest { pool, refs, table_version });
        let begun = Instant::now();
        let patience = self.pace_of(kind).patience();
        let answer = if others {
            let Ok(answer) = timeout(patience, request).await else {
                self.links.lags(&link);
                // Were all of them so slow, this would be what is usual.
                self.pace_of(kind).took(patience);
                return Vec::new();
            };
            answer
        } else {
            request.await
        };
        self.links.noted(&link, &answer);
        self.timed(kind, begun, &answer);
        let mut plains = Vec::with_capacity(places.len());
        let answer = answer.unwrap_or_default();
        self.heard_of(answer.newest_table);
        let found = answer.found;
        for (found, at) in found.into_iter().zip(places) {
            // What it lacks comes from others, and with it why, if they lack it too.
            if let Ok(plain) = opened(found, kind, ids[at]).await {
                plains.push((at, plain));
            }
        }
        plains
    }

    pub(super) async fn get_many_under(
        &self,
        placement: &Placement,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<Vec<Bytes>, StoreError> {
        let mut plains: Vec<Option<Bytes>> = vec![None; ids.len()];
        let choices = if kind == RecordKind::TreeNode { CHOICES_IN_BATCHES } else { 0 };
        for choice in 0..choices {
            let questions = self.questions(placement, kind, ids, &plains, choice)?;
            let mut answers = stream::iter(questions)
                .map(|question| self.get_batch(kind, ids, question))
                .buffer_unordered(GETS_AT_ONCE);
            while let Some(answer) = answers.next().await {
                for (at, plain) in answer {
                    plains[at] = Some(plain);
                }
            }
        }
        let rest: Vec<usize> = (0..ids.len()).filter(|at| plains[*at].is_none()).collect();
        let mut answers = stream::iter(rest)
            .map(|at| async move { Ok((at, self.get_under(placement, kind, ids[at]).await?)) })
            .buffer_unordered(GETS_AT_ONCE);
        while let Some((at, plain)) = answers.try_next().await? {
            plains[at] = Some(plain);
        }
        Ok(plains.into_iter().flatten().collect())
    }
}
