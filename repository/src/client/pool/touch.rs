//! Which objects are there.

use std::collections::HashMap;
use std::sync::Arc;

use blobcr_proto::Hash;
use blobcr_proto::v1::{self, RecordKind};

use super::RemotePool;
use super::debt::Debt;
use super::read::Answer;
use crate::StoreError;
use crate::client::link::NodeLink;
use crate::client::status::NodeError;
use crate::placement::Placement;

/// Identities of one touch request at most: 48 bytes each, and the node looks each one up.
const TOUCH_REQUEST_REFS: usize = 4096;

/// What the holders of one object said.
#[derive(Clone, Default)]
struct Heard {
    held: usize,
    lacking: bool,
    /// Those that did not say anything, and why the last of them did not.
    missed: Vec<u32>,
    silent: Option<StoreError>,
}

/// Places in a list of identities, each with the holder's place in that object's row.
type Places = Vec<(usize, usize)>;

impl RemotePool {
    async fn touch_at(
        &self,
        generation: u64,
        kind: RecordKind,
        ids: &[Hash],
        link: &NodeLink,
        places: &[(usize, usize)],
    ) -> Answer<Vec<bool>> {
        let key = |(at, place): &(usize, usize)| self.key_at(kind, ids[*at], *place).to_ref();
        let refs = places.iter().map(key).collect();
        let (pool, table_version) = (self.pool.id, self.table_version());
        let request = v1::TouchRequest { pool, generation, refs, table_version };
        let answer = link.touch(request).await?;
        self.heard_of(answer.newest_table);
        Ok(answer.present)
    }

    /// An object is there when every holder that answers has it, and those are as many as must be;
    /// what the others lack is owed. One that a holder lacks which answers is better put again.
    pub(super) async fn touch_under(
        &self,
        placement: &Placement,
        generation: u64,
        kind: RecordKind,
        ids: &[Hash],
    ) -> Result<(Vec<bool>, Debt), StoreError> {
        let mut by_node: HashMap<u32, Places> = HashMap::new();
        for (at, id) in ids.iter().enumerate() {
            for (place, node) in self.row(placement, kind, id).iter().enumerate() {
                by_node.entry(*node).or_default().push((at, place));
            }
        }
        let mut links = Vec::new();
        let mut nodes = Vec::new();
        let mut requests = Vec::new();
        for (node, places) in &by_node {
            let link = self.links.to(&placement.nodes()[*node as usize].address)?;
            for some in places.chunks(TOUCH_REQUEST_REFS) {
                links.push(Arc::clone(&link));
                nodes.push(*node);
                requests.push(some);
            }
        }
        let asks = links
            .iter()
            .zip(&requests)
            .map(|(link, places)| self.touch_at(generation, kind, ids, link, places));
        let answers = self.gather(&links, asks, 0).await;
        let mut heard = vec![Heard::default(); ids.len()];
        let asked = links.iter().zip(nodes).zip(requests);
        for (answer, ((link, node), places)) in answers.into_iter().zip(asked) {
            hear(&mut heard, answer, (link, node), places, kind, ids)?;
        }
        self.judge(placement, kind, ids, heard)
    }

    fn judge(
        &self,
        placement: &Placement,
        kind: RecordKind,
        ids: &[Hash],
        heard: Vec<Heard>,
    ) -> Result<(Vec<bool>, Debt), StoreError> {
        let least = self.policy.of(kind).write_least();
        let mut debt = Debt::default();
        let mut present = Vec::with_capacity(ids.len());
        for (id, Heard { held, lacking, missed, silent }) in ids.iter().zip(heard) {
            match silent {
                None => present.push(!lacking),
                // To put it would say so as well, at the cost of the object's bytes.
                Some(error) if !lacking && held < least => return Err(error),
                Some(_) => {
                    if !lacking {
                        debt.add(placement, placement.partition(id), &missed);
                    }
                    present.push(!lacking);
                }
            }
        }
        Ok((present, debt))
    }
}

/// Adds what one node said to what was heard of each object.
fn hear(
    heard: &mut [Heard],
    answer: Answer<Vec<bool>>,
    (link, node): (&NodeLink, u32),
    places: &[(usize, usize)],
    kind: RecordKind,
    ids: &[Hash],
) -> Result<(), StoreError> {
    let Some((first, _)) = places.first() else { return Ok(()) };
    let error = match answer {
        Ok(of_node) => {
            // What a node does not answer about, it does not hold.
            let of_node = of_node.into_iter().chain(std::iter::repeat(false));
            for ((at, _), held) in places.iter().zip(of_node) {
                heard[*at].held += usize::from(held);
                heard[*at].lacking |= !held;
            }
            return Ok(());
        }
        Err(error) => error,
    };
    let silent = matches!(error, NodeError::Unreachable(_) | NodeError::Full(_));
    let error = error.into_store_error(link.address(), kind, ids[*first]);
    if !silent {
        return Err(error);
    }
    for (at, _) in places {
        heard[*at].missed.push(node);
        heard[*at].silent = Some(error.clone());
    }
    Ok(())
}
