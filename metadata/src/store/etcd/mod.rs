//! The backend for several servers: an etcd, which several repositories may share.
//!
//! # Keys
//! `blobcr/NAME/format` is the marker of a repository, one line of [`crate::format`]: `etcd`, or
//! `migrating` while `blobcr metadata migrate` fills it. `blobcr/NAME/k` + key → value, as it is. A
//! version is etcd's `mod_revision`, which all keys of one transaction share and which only grows.
//!
//! # How the contract is kept
//! * **Linearizable**: no read asks for a serializable answer. A page that needs several requests
//!   reads all of them at the revision of the first.
//! * **All or nothing**: a swap is one transaction. The limits of a swap are below etcd's own.
//! * **Fenced**: every swap also expects the marker as it was when the store was opened, so that a
//!   repository which was filled again is never written by who knew the old one.
//! * **Watch**: it begins behind the revision of a linearizable read, whichever member serves it.
//!
//! # When a member fails
//! The next one is asked ([`members`]). A swap whose answer was lost is made again only if it cannot
//! happen twice: if it changes a key whose version it expects, for no version comes back. Should the
//! second attempt find that another change came first, that may have been the first attempt: the
//! outcome is unknown and [`StoreError::Unavailable`] says so.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{GetOptions, GetResponse, KeyValue};

use self::marker::Marker;
use self::members::{Members, Repeat};
use super::{Entry, Key, MetaStore, Page, StoreError, Swap, Version, Watch, check_key, page_limit};

mod failure;
mod marker;
mod members;
mod target;
mod transaction;
mod watch;

pub use marker::{Claim, EtcdOpenError};
pub use target::{EtcdTarget, TargetError};

/// Entries asked for at once: with values of [`super::VALUE_BYTES_MAX`] an answer stays below the
/// 4 MiB that a gRPC message may have.
const PIECE_ENTRIES: usize = 64;

/// Where a repository is in the keys of an etcd.
#[derive(Clone, Debug)]
struct Area {
    base: Vec<u8>,
}

impl Area {
    fn new(name: &str) -> Self {
        Self { base: format!("blobcr/{name}/").into_bytes() }
    }

    fn marker(&self) -> Vec<u8> {
        [&self.base, &b"format"[..]].concat()
    }

    /// A key or a prefix of keys, as etcd knows it.
    fn outer(&self, inner: &[u8]) -> Vec<u8> {
        [&self.base, &b"k"[..], inner].concat()
    }

    /// A key as it was before [`Self::outer`].
    fn inner(&self, outer: &[u8]) -> Result<Key, StoreError> {
        let inner = outer.strip_prefix(&self.base[..]).and_then(|key| key.strip_prefix(b"k"));
        let inner = inner.ok_or_else(|| StoreError::Damaged {
            detail: format!("etcd answered with the key \"{}\"", outer.escape_ascii()),
        })?;
        Ok(Key::new(inner.to_vec()))
    }

    fn entry(&self, found: &KeyValue) -> Result<Entry, StoreError> {
        Ok(Entry {
            key: self.inner(found.key())?,
            value: Bytes::copy_from_slice(found.value()),
            version: version(found.mod_revision()),
        })
    }
}

/// Revisions are never negative.
fn version(revision: i64) -> Version {
    Version(revision.unsigned_abs())
}

/// The first key behind all that begin with `prefix`, which is not all `0xff`.
fn end_of(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end
}

/// See the module.
#[derive(Debug)]
pub struct EtcdStore {
    members: Arc<Members>,
    area: Area,
    marker: Marker,
}

impl EtcdStore {
    /// Opens the repository that `target` names; it is made where it is missing.
    ///
    /// # Errors
    /// When no member answers, or what is there is not a repository that may be used.
    pub async fn open(target: &EtcdTarget) -> Result<Self, EtcdOpenError> {
        marker::open(target).await
    }

    async fn get_range(
        &self,
        first: &[u8],
        options: GetOptions,
    ) -> Result<GetResponse, StoreError> {
        get_range(&self.members, first, options).await
    }
}

async fn get_range(
    members: &Members,
    first: &[u8],
    options: GetOptions,
) -> Result<GetResponse, StoreError> {
    let ask = |mut client: etcd_client::Client| {
        let (first, options) = (first.to_vec(), options.clone());
        async move { client.get(first, Some(options)).await }
    };
    Ok(members.ask(Repeat::Safe, ask).await?.value)
}

/// The revision that an answer was given at.
fn revision(header: Option<&etcd_client::ResponseHeader>) -> Result<i64, StoreError> {
    let header = header.ok_or_else(|| StoreError::Damaged {
        detail: "etcd answered without a header".to_owned(),
    })?;
    Ok(header.revision())
}

#[async_trait]
impl MetaStore for EtcdStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        check_key(key)?;
        let found = self.get_range(&self.area.outer(key.as_slice()), GetOptions::new()).await?;
        found.kvs().first().map(|found| self.area.entry(found)).transpose()
    }

    async fn swap(&self, swap: Swap) -> Result<Version, StoreError> {
        swap.check()?;
        transaction::run(&self.members, &self.area, &self.marker, &swap).await
    }

    async fn list(
        &self,
        prefix: &[u8],
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        let limit = page_limit(limit)?;
        let outer = self.area.outer(prefix);
        let end = end_of(&outer);
        let mut first = match after {
            Some(after) if after.as_slice() >= prefix => behind(&self.area.outer(after.as_slice())),
            _ => outer,
        };
        let mut page = Page { entries: Vec::new(), more: true };
        let mut at = 0;
        while page.more && page.entries.len() < limit && first < end {
            let piece = PIECE_ENTRIES.min(limit - page.entries.len());
            let options = GetOptions::new()
                .with_range(end.clone())
                // At most PIECE_ENTRIES.
                .with_limit(piece as i64)
                .with_revision(at);
            let found = self.get_range(&first, options).await?;
            if at == 0 {
                at = revision(found.header())?;
            }
            for found in found.kvs() {
                page.entries.push(self.area.entry(found)?);
                first = behind(found.key());
            }
            page.more = found.more();
        }
        page.more &= first < end;
        Ok(page)
    }

    async fn watch(&self, prefix: &[u8]) -> Result<Watch, StoreError> {
        watch::start(&self.members, &self.area, prefix).await
    }
}

/// The first key behind `key`.
fn behind(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_two_repositories_never_meet() {
        let (a, ab) = (Area::new("a"), Area::new("ab"));
        let key = Key::new(&b"\x01\xff"[..]);
        let outer = a.outer(key.as_slice());
        assert_eq!(outer, b"blobcr/a/k\x01\xff");
        assert_eq!(a.inner(&outer), Ok(key));
        assert!(ab.inner(&outer).is_err() && a.inner(&a.marker()).is_err());
        assert!(!a.marker().starts_with(&a.outer(b"")));
    }

    #[test]
    fn a_prefix_ends_before_the_next() {
        assert_eq!(end_of(b"ab"), b"ac");
        assert_eq!(end_of(b"a\xff\xff"), b"b");
        assert_eq!(behind(b"a"), b"a\0");
    }
}
