//! The marker of a repository: what its keys are, and who may write them.

use std::sync::Arc;

use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp};

use super::members::{Members, Repeat};
use super::{Area, EtcdStore, EtcdTarget, get_range, revision};
use crate::format::{self, LineError, VERSION};
use crate::store::{Expect, MetaStore, StoreError, Swap};

/// What the marker says of a repository that servers may use.
const USABLE: &str = "etcd";
/// What it says while records are copied into the repository.
const MIGRATING: &str = "migrating";

/// Keys removed by one swap when a copy that was broken off is done again.
const CLEARED_PER_SWAP: usize = crate::store::SWAP_KEYS_MAX;

/// A marker as it was read or written.
#[derive(Clone, Debug)]
pub(super) struct Marker {
    pub(super) revision: i64,
    target: String,
}

impl Marker {
    /// It is not what it was.
    pub(super) fn gone(&self) -> StoreError {
        let target = &self.target;
        let detail = format!("{target} was emptied or filled anew; restart the service");
        StoreError::Damaged { detail }
    }
}

/// Why a repository in an etcd was not opened.
#[derive(Debug, thiserror::Error)]
pub enum EtcdOpenError {
    /// No member answered, or it refused.
    #[error("cannot open {target}: {source}")]
    Store {
        /// Which one.
        target: String,
        /// What was seen.
        source: StoreError,
    },
    /// Its records are being copied into it.
    #[error(
        "{target} is being filled by `blobcr metadata migrate`, or that was broken off; let it end, \
         or run it again"
    )]
    Migrating {
        /// Which one.
        target: String,
    },
    /// It holds records already.
    #[error("{target} holds a repository already; name another with #NAME behind the addresses")]
    NotEmpty {
        /// Which one.
        target: String,
    },
    /// It was made by a newer program.
    #[error(
        "{target} has format {version}, and this program reads up to {VERSION}; use a newer program"
    )]
    Newer {
        /// Which one.
        target: String,
        /// Its format.
        version: u32,
    },
    /// It is not what it should be.
    #[error("{target} is damaged: {detail}; restore it from a copy")]
    Damaged {
        /// Which one.
        target: String,
        /// What is wrong.
        detail: String,
    },
}

/// What the marker said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Missing,
    Usable,
    Migrating,
}

/// A repository that may be opened or claimed.
struct Opening<'a> {
    target: &'a EtcdTarget,
    members: Arc<Members>,
    area: Area,
}

impl<'a> Opening<'a> {
    async fn new(target: &'a EtcdTarget) -> Result<Self, EtcdOpenError> {
        let members = Members::new(target.urls()).await;
        let members = members
            .map_err(|source| EtcdOpenError::Store { target: target.to_string(), source })?;
        Ok(Self { target, members: Arc::new(members), area: Area::new(target.name()) })
    }

    fn failed(&self, source: StoreError) -> EtcdOpenError {
        EtcdOpenError::Store { target: self.target.to_string(), source }
    }

    fn damaged(&self, detail: String) -> EtcdOpenError {
        EtcdOpenError::Damaged { target: self.target.to_string(), detail }
    }

    /// What the marker says, and its revision.
    async fn read(&self) -> Result<(State, i64), EtcdOpenError> {
        let found = get_range(&self.members, &self.area.marker(), GetOptions::new()).await;
        let found = found.map_err(|error| self.failed(error))?;
        let Some(found) = found.kvs().first() else { return Ok((State::Missing, 0)) };
        match format::read(found.value()) {
            Ok(USABLE) => Ok((State::Usable, found.mod_revision())),
            Ok(MIGRATING) => Ok((State::Migrating, found.mod_revision())),
            Ok(other) => Err(self.damaged(format!("its marker says {other:?}"))),
            Err(LineError::Newer(version)) => {
                Err(EtcdOpenError::Newer { target: self.target.to_string(), version })
            }
            Err(LineError::Damaged(detail)) => Err(self.damaged(format!("its marker {detail}"))),
        }
    }

    /// Writes the marker, when it has not changed since it had `revision` (0: was missing).
    /// Returns its new revision; `None` when somebody else was first, or perhaps this one.
    async fn write(&self, what: &str, expected: i64) -> Result<Option<i64>, EtcdOpenError> {
        let key = self.area.marker();
        let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, expected);
        let put = TxnOp::put(key, format::line(what), None);
        let transaction = Txn::new().when([unchanged]).and_then([put]);
        let ask = |mut client: Client| {
            let transaction = transaction.clone();
            async move { client.txn(transaction).await }
        };
        // A marker is never removed, so no attempt that is late can be carried out as well.
        let answer = self.members.ask(Repeat::Safe, ask).await.map_err(|e| self.failed(e))?.value;
        if !answer.succeeded() {
            return Ok(None);
        }
        Ok(Some(revision(answer.header()).map_err(|error| self.failed(error))?))
    }

    fn store(&self, revision: i64) -> EtcdStore {
        let marker = Marker { revision, target: self.target.to_string() };
        EtcdStore { members: Arc::clone(&self.members), area: self.area.clone(), marker }
    }

    async fn is_empty(&self) -> Result<bool, EtcdOpenError> {
        let first = self.store(0).list(b"", None, 1).await.map_err(|error| self.failed(error))?;
        Ok(first.entries.is_empty())
    }
}

pub(super) async fn open(target: &EtcdTarget) -> Result<EtcdStore, EtcdOpenError> {
    let opening = Opening::new(target).await?;
    loop {
        match opening.read().await? {
            (State::Usable, revision) => return Ok(opening.store(revision)),
            (State::Migrating, _) => {
                return Err(EtcdOpenError::Migrating { target: target.to_string() });
            }
            (State::Missing, _) if !opening.is_empty().await? => {
                return Err(opening.damaged("there are records but no marker".to_owned()));
            }
            // Whoever made it, it is there when it is read again.
            (State::Missing, _) => drop(opening.write(USABLE, 0).await?),
        }
    }
}

/// An empty repository that nobody but its owner may write, until it is finished.
#[derive(Debug)]
pub struct Claim {
    store: EtcdStore,
    target: EtcdTarget,
}

impl Claim {
    /// Claims the repository that `target` names, and removes what a claim that was broken off had
    /// copied into it. Whoever held it before can write it no more.
    ///
    /// # Errors
    /// [`EtcdOpenError::NotEmpty`] when a repository is there.
    pub async fn new(target: &EtcdTarget) -> Result<Self, EtcdOpenError> {
        let opening = Opening::new(target).await?;
        loop {
            let (state, revision) = opening.read().await?;
            // A server may be using it, even if there is no record yet.
            if state == State::Usable || state == State::Missing && !opening.is_empty().await? {
                return Err(EtcdOpenError::NotEmpty { target: target.to_string() });
            }
            let Some(revision) = opening.write(MIGRATING, revision).await? else { continue };
            let store = opening.store(revision);
            clear(&store).await.map_err(|error| opening.failed(error))?;
            return Ok(Self { store, target: target.clone() });
        }
    }

    /// Its records.
    #[must_use]
    pub const fn store(&self) -> &EtcdStore {
        &self.store
    }

    /// Lets servers use it.
    ///
    /// # Errors
    /// When it was claimed by somebody else meanwhile, or etcd cannot be reached: it can be claimed
    /// again then.
    pub async fn finish(self) -> Result<(), EtcdOpenError> {
        let opening = Opening {
            target: &self.target,
            members: Arc::clone(&self.store.members),
            area: self.store.area.clone(),
        };
        match opening.write(USABLE, self.store.marker.revision).await? {
            Some(_) => Ok(()),
            // An attempt whose answer was lost may have written it.
            None if opening.read().await?.0 == State::Usable => Ok(()),
            None => Err(opening.failed(self.store.marker.gone())),
        }
    }
}

async fn clear(store: &EtcdStore) -> Result<(), StoreError> {
    loop {
        let page = store.list(b"", None, CLEARED_PER_SWAP).await?;
        if page.entries.is_empty() {
            return Ok(());
        }
        let swap = page.entries.into_iter().fold(Swap::new(), |swap, entry| {
            swap.delete(entry.key, Expect::Version(entry.version))
        });
        store.swap(swap).await?;
    }
}
