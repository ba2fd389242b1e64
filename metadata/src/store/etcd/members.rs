//! The members of an etcd, which are asked in turn until one answers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tokio::time::{Instant, sleep, timeout};

use super::failure::Failure;
use crate::store::StoreError;

/// For a connection to come about: members are near.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// For one member to answer. An answer takes milliseconds, but a disk that is busy with other
/// writers may take a second for a sync, and so does the election of a new leader.
const ATTEMPT: Duration = Duration::from_secs(3);
/// For one call with all its attempts: every member once, and time for an election.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);
/// The wait after every member has failed, at first and at most.
const WAIT_FIRST: Duration = Duration::from_millis(20);
const WAIT_MAX: Duration = Duration::from_millis(500);
/// How often a connection is asked whether it lives, and how long it may take: a member whose host
/// lost its power is found out by this alone where only a watch is open.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// Whether a request may be made again when nobody knows whether the first one was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// Twice is the same as once, or the second one is refused.
    Safe,
    /// Only a request that was certainly not carried out is made again.
    Unsafe,
}

/// What a member answered.
#[derive(Debug)]
pub(super) struct Answer<T> {
    pub(super) value: T,
    /// An attempt before this one may have been carried out.
    pub(super) in_doubt: bool,
}

struct Member {
    url: String,
    client: Client,
}

/// See the module. The member that answered is asked first the next time.
pub(super) struct Members {
    members: Vec<Member>,
    preferred: AtomicUsize,
}

impl std::fmt::Debug for Members {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.members.iter().map(|member| &member.url)).finish()
    }
}

impl Members {
    /// Connects to none before it is asked. `urls` is not empty.
    pub(super) async fn new(urls: &[String]) -> Result<Self, StoreError> {
        let mut members = Vec::with_capacity(urls.len());
        for url in urls {
            // A member that has lost the others refuses, instead of keeping who asks it waiting.
            let options = ConnectOptions::new()
                .with_require_leader(true)
                .with_connect_timeout(CONNECT_TIMEOUT)
                .with_keep_alive(KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT)
                .with_keep_alive_while_idle(true);
            let client = Client::connect([url], Some(options))
                .await
                .map_err(|error| StoreError::Invalid { detail: format!("{url}: {error}") })?;
            members.push(Member { url: url.clone(), client });
        }
        Ok(Self { members, preferred: AtomicUsize::new(0) })
    }

    /// Asks the members in turn, until one answers or the deadline is over.
    pub(super) async fn ask<T, F>(
        &self,
        repeat: Repeat,
        mut request: impl FnMut(Client) -> F,
    ) -> Result<Answer<T>, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let until = Instant::now() + DEADLINE;
        let mut wait = WAIT_FIRST;
        let mut in_doubt = false;
        let mut attempts = 0;
        loop {
            let at = self.preferred.load(Ordering::Relaxed) % self.members.len();
            let Member { url, client } = &self.members[at];
            let patience = ATTEMPT.min(until - Instant::now());
            let failure = match timeout(patience, request(client.clone())).await {
                Ok(Ok(value)) => return Ok(Answer { value, in_doubt }),
                Ok(Err(error)) => Failure::of(url, &error),
                Err(_) => Failure::Unknown(format!("{url}: no answer within {patience:?}")),
            };
            let detail = match failure {
                Failure::Refused(error) => return Err(error),
                Failure::NotDone(detail) => detail,
                Failure::Unknown(detail) if repeat == Repeat::Safe => {
                    in_doubt = true;
                    detail
                }
                Failure::Unknown(detail) => {
                    self.leave(at);
                    return Err(StoreError::Unavailable { detail });
                }
            };
            tracing::debug!(detail, "an etcd member did not do what it was asked");
            self.leave(at);
            attempts += 1;
            let pause = if attempts % self.members.len() == 0 { wait } else { Duration::ZERO };
            if Instant::now() + pause >= until {
                return Err(StoreError::Unavailable { detail });
            }
            if !pause.is_zero() {
                sleep(pause).await;
                wait = (wait * 2).min(WAIT_MAX);
            }
        }
    }

    /// Whoever else saw the same failure has moved on already.
    fn leave(&self, at: usize) {
        let next = (at + 1) % self.members.len();
        let _ = self.preferred.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}
