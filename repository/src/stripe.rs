//! A record as K data and M parity shards: any K of them give it back.
//!
//! A shard is a record of its own whose payload begins with a header, so that whoever holds it can
//! tell what it belongs to. Of all fields, little-endian: magic 4 · version 1 · K 1 · M 1 · shard
//! number 1 · bytes of the whole payload 4 · CRC-32C of the whole payload 4. Then follows the
//! shard's part, padded with zeros. Codec and plain length are those of the whole record.
//!
//! *Invariant:* one record gives the same shards whoever cuts it, else the shards that two writers
//! left on different nodes would not fit together. So a writer's codec must depend on nothing but
//! the plain bytes.

mod recover;

use blobcr_proto::codec::{PLAIN_LEN_MAX, crc32c};
use blobcr_proto::policy::Policy;
use blobcr_proto::record::{RecordError, RecordKey, check_payload};
use blobcr_proto::{Hash, v1};
use bytes::{BufMut, Bytes};
use reed_solomon_erasure::galois_8::ReedSolomon;

const MAGIC: [u8; 4] = *b"BLSH";
const VERSION: u8 = 1;
/// Bytes in front of a shard's part.
pub const HEADER_LEN: usize = 16;

/// Why shards do not give a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// The record that holds the shard is not what it says.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The header in front of the shard makes no sense, or contradicts the record around it.
    #[error("shard {shard} of {id} is malformed: {detail}")]
    Malformed {
        /// Identity of the whole record.
        id: Hash,
        /// The shard's number.
        shard: u8,
        /// What is wrong.
        detail: &'static str,
    },
    /// The shards are too few, or one lies: together they do not give what their headers say.
    #[error("shards {shards:?} of {id} do not fit together")]
    Misfit {
        /// Identity of the whole record.
        id: Hash,
        /// Their numbers.
        shards: Vec<u8>,
    },
}

/// What the shards of one encoding of one record have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Whole {
    kind: v1::RecordKind,
    id: Hash,
    codec: v1::Codec,
    plain_len: u32,
    /// Length and checksum of the payload that was cut.
    len: u32,
    crc32c: u32,
}

impl Whole {
    /// Bytes that come out in the end.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.plain_len as usize
    }
}

/// One shard, checked as far as it can be by itself.
#[derive(Debug, Clone)]
pub struct Shard {
    /// What it is a part of.
    pub whole: Whole,
    /// 1 to K+M.
    pub number: u8,
    part: Bytes,
}

/// Cuts records into shards and puts them together again.
pub struct Stripe {
    data: u8,
    parity: u8,
    /// Kept, because it holds the matrices of what was rebuilt lately.
    code: ReedSolomon,
}

impl Shard {
    /// The key of the record that holds it.
    #[must_use]
    pub const fn key(&self) -> RecordKey {
        RecordKey { kind: self.whole.kind, id: self.whole.id, shard: self.number }
    }
}

impl std::fmt::Debug for Stripe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stripe({}+{})", self.data, self.parity)
    }
}

impl Stripe {
    /// For a pool of this policy; `None` when it keeps whole copies.
    #[must_use]
    pub fn of(policy: Policy) -> Option<Self> {
        let Policy::Erasure { data, parity } = policy else { return None };
        // No policy has no data or no parity, or more shards than the code has symbols.
        let code = ReedSolomon::new(usize::from(data), usize::from(parity)).ok()?;
        Some(Self { data, parity, code })
    }

    /// Shards that give a record back.
    #[must_use]
    pub fn needed(&self) -> usize {
        usize::from(self.data)
    }

    /// Shards of a record.
    #[must_use]
    pub fn shards(&self) -> usize {
        usize::from(self.data) + usize::from(self.parity)
    }

    /// The code knows no empty shards.
    fn part_len(&self, len: usize) -> usize {
        len.div_ceil(self.needed()).max(1)
    }

    /// The shards of a whole record, in order of their numbers.
    ///
    /// # Errors
    /// When the record is not whole or its checksum does not match.
    pub fn cut(&self, record: &v1::Record) -> Result<Vec<v1::Record>, ShardError> {
        let key = check_payload(record)?;
        if key.shard != 0 {
            return Err(RecordError::Malformed("a shard where a whole record is needed").into());
        }
        let part_len = self.part_len(record.payload.len());
        let mut payloads: Vec<Vec<u8>> = (1..=self.data + self.parity)
            .map(|number| {
                let mut payload = Vec::with_capacity(HEADER_LEN + part_len);
                payload.put_slice(&MAGIC);
                payload.put_slice(&[VERSION, self.data, self.parity, number]);
                payload.put_u32_le(record.payload.len() as u32);
                payload.put_u32_le(record.payload_crc32c);
                payload
            })
            .collect();
        let mut rest = &record.payload[..];
        for payload in &mut payloads[..self.needed()] {
            let (part, behind) = rest.split_at(part_len.min(rest.len()));
            payload.put_slice(part);
            rest = behind;
        }
        payloads.iter_mut().for_each(|payload| payload.resize(HEADER_LEN + part_len, 0));
        let mut parts: Vec<&mut [u8]> =
            payloads.iter_mut().map(|payload| &mut payload[HEADER_LEN..]).collect();
        // It refuses nothing but parts of unequal length or of another number.
        let coded = self.code.encode(&mut parts);
        debug_assert!(coded.is_ok(), "{coded:?}");
        let shard = |(number, payload): (u8, Vec<u8>)| v1::Record {
            r#ref: Some(RecordKey { shard: number, ..key }.to_ref()),
            codec: record.codec,
            plain_len: record.plain_len,
            payload_crc32c: crc32c(&payload),
            payload: payload.into(),
        };
        Ok((1..).zip(payloads).map(shard).collect())
    }

    /// Takes a shard out of the record that holds it, and checks all that a shard by itself tells.
    ///
    /// # Errors
    /// When its checksum does not match, or it is no shard of this pool's policy.
    pub fn open(&self, record: &v1::Record) -> Result<Shard, ShardError> {
        let key = check_payload(record)?;
        let malformed = |detail| ShardError::Malformed { id: key.id, shard: key.shard, detail };
        let (header, _) = record
            .payload
            .split_first_chunk::<HEADER_LEN>()
            .ok_or_else(|| malformed("it is shorter than its header"))?;
        let [m0, m1, m2, m3, version, data, parity, number, l0, l1, l2, l3, c0, c1, c2, c3] =
            *header;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(malformed("its header has another magic"));
        }
        if version != VERSION {
            return Err(malformed("its header is of a later version"));
        }
        if (data, parity) != (self.data, self.parity) {
            return Err(malformed("it was cut for another policy"));
        }
        if number != key.shard || number == 0 || usize::from(number) > self.shards() {
            return Err(malformed("its header has another number"));
        }
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let part = record.payload.slice(HEADER_LEN..);
        if len as usize > PLAIN_LEN_MAX || part.len() != self.part_len(len as usize) {
            return Err(malformed("its length is not what its header says"));
        }
        let whole = Whole {
            kind: key.kind,
            id: key.id,
            codec: record.codec(),
            plain_len: record.plain_len,
            len,
            crc32c: u32::from_le_bytes([c0, c1, c2, c3]),
        };
        Ok(Shard { whole, number, part })
    }

    /// Puts a whole record together from K shards of it. Its checksum is right; whether it is what
    /// its identity says, only its plain bytes tell.
    ///
    /// # Errors
    /// When they are not K different shards of one encoding, or one of them lies.
    pub fn join(&self, shards: &[&Shard]) -> Result<v1::Record, ShardError> {
        let Some(first) = shards.first() else {
            return Err(ShardError::Misfit { id: Hash([0; Hash::LEN]), shards: Vec::new() });
        };
        let whole = first.whole;
        let misfit = || ShardError::Misfit {
            id: whole.id,
            shards: shards.iter().map(|shard| shard.number).collect(),
        };
        let mut by_number: Vec<Option<&Shard>> = vec![None; self.shards()];
        for shard in shards {
            if shard.whole != whole {
                return Err(misfit());
            }
            by_number[usize::from(shard.number) - 1] = Some(*shard);
        }
        if by_number.iter().flatten().count() < self.needed() {
            return Err(misfit());
        }
        let payload = self.joined(&by_number, whole.len as usize).ok_or_else(misfit)?;
        if crc32c(&payload) != whole.crc32c {
            return Err(misfit());
        }
        Ok(v1::Record {
            r#ref: Some(RecordKey::whole(whole.kind, whole.id).to_ref()),
            codec: whole.codec.into(),
            plain_len: whole.plain_len,
            payload_crc32c: whole.crc32c,
            payload,
        })
    }

    fn joined(&self, by_number: &[Option<&Shard>], len: usize) -> Option<Bytes> {
        let mut payload = Vec::with_capacity(self.part_len(len) * self.needed());
        let (data, _) = by_number.split_at(self.needed());
        if data.iter().all(Option::is_some) {
            data.iter().flatten().for_each(|shard| payload.extend_from_slice(&shard.part));
        } else {
            let part = |shard: &Option<&Shard>| shard.map(|shard| shard.part.to_vec());
            let mut parts: Vec<Option<Vec<u8>>> = by_number.iter().map(part).collect();
            self.code.reconstruct_data(&mut parts).ok()?;
            parts.iter().take(self.needed()).flatten().for_each(|part| payload.extend(part));
        }
        payload.truncate(len);
        Some(payload.into())
    }
}

#[cfg(test)]
mod tests;
