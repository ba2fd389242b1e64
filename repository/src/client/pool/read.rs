//! Reads of one object: a whole copy from the first choice, or as many shards as give it back; from
//! the other holders when those fail or are slow.

use std::sync::Arc;
use std::time::Duration;

use blobcr_proto::Hash;
use blobcr_proto::record::{self, RecordKey};
use blobcr_proto::v1::{self, RecordKind};
use bytes::Bytes;
use tokio::time::Instant;

use super::combine::Pile;
use super::race::Race;
use super::{Holder, RemotePool, graver};
use crate::client::link::NodeLink;
use crate::client::status::NodeError;
use crate::placement::Placement;
use crate::stripe::{Shard, Stripe};
use crate::{StoreError, cpu};

/// What a node said to a question about one object.
pub(super) type Answer<T> = Result<T, NodeError>;

/// The gravest failure so far of a read of one object.
struct Failures {
    kind: RecordKind,
    id: Hash,
    worst: Option<StoreError>,
}

impl Failures {
    fn add(&mut self, holder: &Holder, error: NodeError) {
        let (node, id) = (holder.link.address(), self.id);
        tracing::debug!(node, %id, ?error, "asking another node");
        self.note(error.into_store_error(node, self.kind, id));
    }

    fn note(&mut self, error: StoreError) {
        self.worst = Some(match self.worst.take() {
            Some(worst) => graver(worst, error),
            None => error,
        });
    }

    fn tell(self) -> StoreError {
        self.worst.unwrap_or(StoreError::Missing { kind: self.kind, id: self.id })
    }
}

impl RemotePool {
    /// Records of one object from one node, in the order of `keys`.
    async fn ask(&self, link: &NodeLink, keys: &[RecordKey]) -> Answer<Vec<v1::Found>> {
        let refs = keys.iter().map(|key| key.to_ref()).collect();
        let (pool, table_version) = (self.pool.id, self.table_version());
        let answer = link.get(v1::GetRequest { pool, refs, table_version }).await;
        self.links.noted(link, &answer);
        let answer = answer?;
        self.heard_of(answer.newest_table);
        Ok(answer.found)
    }

    /// Counts how long an answer took that was of use.
    pub(super) fn timed<T>(&self, kind: RecordKind, begun: Instant, answer: &Answer<T>) {
        if answer.is_ok() {
            self.pace_of(kind).took(begun.elapsed());
        }
    }

    async fn ask_whole(&self, link: &NodeLink, kind: RecordKind, id: Hash) -> Answer<Bytes> {
        let begun = Instant::now();
        let found = self.ask(link, &[RecordKey::whole(kind, id)]).await?;
        let found = found.into_iter().next().ok_or(NodeError::Absent)?;
        let answer = opened(found, kind, id).await;
        self.timed(kind, begun, &answer);
        answer
    }

    /// The shards of an object that a node holds of those that `keys` name.
    async fn ask_shards(
        &self,
        stripe: &Stripe,
        link: &NodeLink,
        keys: &[RecordKey],
    ) -> Answer<Vec<Shard>> {
        let found = self.ask(link, keys).await?;
        let mut shards = Vec::new();
        let mut failure = NodeError::Absent;
        for (found, key) in found.into_iter().zip(keys) {
            match shard_of(stripe, found, *key) {
                Ok(shard) => shards.push(shard),
                Err(NodeError::Absent) => {}
                Err(error) => failure = error,
            }
        }
        if shards.is_empty() { Err(failure) } else { Ok(shards) }
    }

    pub(super) async fn get_under(
        &self,
        placement: &Placement,
        kind: RecordKind,
        id: Hash,
    ) -> Result<Bytes, StoreError> {
        let choices = self.choices(placement, kind, &id)?;
        match self.stripe_of(kind) {
            None => self.get_whole(choices, kind, id).await,
            Some(stripe) => self.get_shards(stripe, choices, kind, id).await,
        }
    }

    fn patience(&self, kind: RecordKind) -> Duration {
        self.pace_of(kind).patience()
    }

    async fn get_whole(
        &self,
        choices: Vec<Holder>,
        kind: RecordKind,
        id: Hash,
    ) -> Result<Bytes, StoreError> {
        let mut race =
            Race::new(&self.links, self.patience(kind), choices, |holder: Holder| async move {
                let answer = self.ask_whole(&holder.link, kind, id).await;
                (holder, answer)
            });
        let mut failures = Failures { kind, id, worst: None };
        race.ask(1);
        while let Some((holder, answer)) = race.next().await {
            match answer {
                Ok(plain) => return Ok(plain),
                Err(error) => {
                    failures.add(&holder, error);
                    race.ask(1);
                }
            }
        }
        Err(failures.tell())
    }

    /// Asks each holder for the shard of its place; and, when that does not give the object, each
    /// for any other, which it may have from a time when its place was another.
    async fn get_shards(
        &self,
        stripe: &Arc<Stripe>,
        choices: Vec<Holder>,
        kind: RecordKind,
        id: Hash,
    ) -> Result<Bytes, StoreError> {
        let mut pile = Pile::new(Arc::clone(stripe));
        let mut failures = Failures { kind, id, worst: None };
        for own in [true, false] {
            let keys = |holder: &Holder| -> Vec<RecordKey> {
                (0..stripe.shards())
                    .filter(|place| (*place == holder.place) == own)
                    .map(|place| self.key_at(kind, id, place))
                    .collect()
            };
            let mut race = Race::new(
                &self.links,
                self.patience(kind),
                choices.iter().filter(|holder| !keys(holder).is_empty()).cloned().collect(),
                |holder: Holder| async move {
                    let begun = Instant::now();
                    let answer = self.ask_shards(stripe, &holder.link, &keys(&holder)).await;
                    self.timed(kind, begun, &answer);
                    (holder, answer)
                },
            );
            race.ask(stripe.needed());
            while let Some((holder, answer)) = race.next().await {
                match answer {
                    Ok(shards) => {
                        for shard in shards {
                            if let Some(plain) = pile.add(shard).await {
                                return Ok(plain);
                            }
                        }
                        // Enough of them would have given it: one of them is of no use.
                        if pile.len() >= stripe.needed() {
                            race.ask(1);
                        }
                    }
                    Err(error) => {
                        failures.add(&holder, error);
                        race.ask(1);
                    }
                }
            }
        }
        if pile.len() > 0 {
            let (there, needed) = (pile.len(), stripe.needed());
            let detail = format!(
                "{there} of its {} shards were found, and no {needed} of them give it back",
                stripe.shards()
            );
            failures.note(StoreError::Damaged { kind, id, detail });
        }
        Err(failures.tell())
    }
}

/// What a node found, as a record; and why not, when it is none.
fn record_in(found: v1::Found) -> Answer<v1::Record> {
    found.record.ok_or_else(|| match found.damaged {
        true => NodeError::Damaged("the node could not read it whole".into()),
        false => NodeError::Absent,
    })
}

/// Takes a whole object out of a node's answer, checked down to its identity.
pub(super) async fn opened(found: v1::Found, kind: RecordKind, id: Hash) -> Answer<Bytes> {
    let record = record_in(found)?;
    let bytes = record.plain_len as usize;
    match cpu::read(bytes, move || record::open(&record)).await {
        Ok((key, plain)) if key == RecordKey::whole(kind, id) => Ok(plain),
        Ok((key, _)) => Err(NodeError::Damaged(format!("the node gave {} instead", key.id))),
        Err(error) => Err(NodeError::Damaged(error.to_string())),
    }
}

fn shard_of(stripe: &Stripe, found: v1::Found, key: RecordKey) -> Answer<Shard> {
    let record = record_in(found)?;
    let damaged = |detail: String| NodeError::Damaged(format!("shard {}: {detail}", key.shard));
    let shard = stripe.open(&record).map_err(|error| damaged(error.to_string()))?;
    if shard.key() == key { Ok(shard) } else { Err(damaged("the node gave another".into())) }
}
