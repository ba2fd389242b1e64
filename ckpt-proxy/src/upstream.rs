//! The mirror of this host, and the metadata service that it names.
//!
//! Every call has a deadline. While the other side cannot be reached a call is tried again, because
//! a mirror that restarts is back within seconds and every call here may be repeated.

use std::collections::VecDeque;
use std::error::Error as _;
use std::future::Future;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use blobcr_proto::v1::directory_client::DirectoryClient;
use blobcr_proto::v1::metadata_client::MetadataClient;
use blobcr_proto::v1::mirror_client::MirrorClient;
use blobcr_proto::v1::{
    AddToSetRequest, BeginSetRequest, CheckpointDisksRequest, CheckpointSet, DescribeRequest, Disk,
    DiskRef, DiskSnapshot, GetSetRequest, ImageRef, LatestSetRequest, Snapshot, SnapshotRef,
    WaitSnapshotRequest,
};
use blobcr_proto::{DiskName, MESSAGE_BYTES_MAX};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::error::ProxyError;
use crate::limits::Limits;

/// The first pause between two attempts; it doubles up to [`RETRY_MAX`].
const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// A host that is there answers a connection attempt well within this.
const CONNECT: Duration = Duration::from_secs(3);
/// A call that waits in the other side is given this much more than it asked for.
const GRACE: Duration = Duration::from_secs(5);

pub(crate) struct Upstream {
    address: String,
    mirror: MirrorClient<Channel>,
    directory: DirectoryClient<Channel>,
    /// One client for each metadata server, the one in use first. Found by asking the mirror, and
    /// asked for again when none of them can be reached.
    metadata: Mutex<VecDeque<MetadataClient<Channel>>>,
    limits: Limits,
}

fn endpoint(address: &str) -> Result<Endpoint, ProxyError> {
    let uri =
        if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let bad = |detail: String| ProxyError::BadAddress { address: address.to_owned(), detail };
    let endpoint = Endpoint::from_shared(uri).map_err(|e| bad(e.to_string()))?;
    if endpoint.uri().host().is_none_or(str::is_empty) || endpoint.uri().port().is_none() {
        return Err(bad("it has no host and port".to_owned()));
    }
    Ok(endpoint
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5)))
}

impl Upstream {
    /// Connects when first used, and again whenever the connection is gone.
    pub(crate) fn new(address: &str, limits: Limits) -> Result<Self, ProxyError> {
        let channel = endpoint(address)?.connect_lazy();
        Ok(Self {
            address: address.to_owned(),
            mirror: MirrorClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            directory: DirectoryClient::new(channel),
            metadata: Mutex::default(),
            limits,
        })
    }

    pub(crate) async fn disk(&self, name: &DiskName) -> Result<Disk, Status> {
        self.retry("asking the mirror for a disk", self.limits.call, |limit| {
            let mut mirror = self.mirror.clone();
            let request = timed(DiskRef { disk: name.to_string() }, limit);
            async move { mirror.get_disk(request).await }
        })
        .await
    }

    /// Commits all the disks behind one barrier; the key makes repeating it harmless.
    pub(crate) async fn checkpoint_disks(
        &self,
        disks: &[DiskName],
        key: &str,
    ) -> Result<Vec<DiskSnapshot>, Status> {
        let names: Vec<String> = disks.iter().map(ToString::to_string).collect();
        let reply = self
            .retry("asking the mirror for a checkpoint", self.limits.call, |limit| {
                let mut mirror = self.mirror.clone();
                let request = CheckpointDisksRequest {
                    disks: names.clone(),
                    idempotency_key: key.to_owned(),
                };
                async move { mirror.checkpoint_disks(timed(request, limit)).await }
            })
            .await?;
        Ok(reply.snapshots)
    }

    /// Waits until the snapshot is no longer pending; DEADLINE_EXCEEDED when it still is then.
    pub(crate) async fn wait_snapshot(
        &self,
        image: &str,
        number: u64,
        wait: Duration,
    ) -> Result<Snapshot, Status> {
        let until = Instant::now() + wait;
        self.retry("waiting for a snapshot", wait + GRACE, |limit| {
            let left = until.saturating_duration_since(Instant::now()).as_millis() as u64;
            let image = Some(ImageRef { name: image.to_owned(), id: 0 });
            let request = WaitSnapshotRequest {
                snapshot: Some(SnapshotRef { image, number }),
                // Zero may mean "for ever" to the other side.
                timeout_ms: left.max(1),
            };
            async move {
                let mut metadata = self.metadata().await?;
                metadata.wait_snapshot(timed(request, limit)).await
            }
        })
        .await
    }

    pub(crate) async fn add_to_set(
        &self,
        request: AddToSetRequest,
    ) -> Result<CheckpointSet, Status> {
        self.retry("adding to a checkpoint set", self.limits.call, |limit| {
            let request = timed(request.clone(), limit);
            async move { self.metadata().await?.add_to_set(request).await }
        })
        .await
    }

    pub(crate) async fn begin_set(
        &self,
        request: BeginSetRequest,
    ) -> Result<CheckpointSet, Status> {
        // Repeated after a lost answer, it leaves a set that nobody joins.
        self.retry("beginning a checkpoint set", self.limits.call, |limit| {
            let request = timed(request.clone(), limit);
            async move { self.metadata().await?.begin_set(request).await }
        })
        .await
    }

    pub(crate) async fn get_set(&self, request: GetSetRequest) -> Result<CheckpointSet, Status> {
        self.retry("asking for a checkpoint set", self.limits.call, |limit| {
            let request = timed(request.clone(), limit);
            async move { self.metadata().await?.get_set(request).await }
        })
        .await
    }

    pub(crate) async fn latest_set(
        &self,
        request: LatestSetRequest,
    ) -> Result<CheckpointSet, Status> {
        self.retry("asking for the latest checkpoint set", self.limits.call, |limit| {
            let request = timed(request.clone(), limit);
            async move { self.metadata().await?.latest_set(request).await }
        })
        .await
    }

    async fn metadata(&self) -> Result<MetadataClient<Channel>, Status> {
        if let Some(client) = self.known_metadata().front() {
            return Ok(client.clone());
        }
        let described = self.directory.clone().describe(DescribeRequest {}).await;
        let mut addresses = match described {
            Ok(reply) => reply.into_inner().metadata,
            Err(status) if status.code() == Code::Unimplemented => Vec::new(),
            Err(status) => return Err(status),
        };
        if addresses.is_empty() {
            // A mirror that names no metadata service passes the calls on itself.
            addresses.push(self.address.clone());
        }
        tracing::debug!(?addresses, "found the metadata service");
        let mut clients = VecDeque::new();
        for address in &addresses {
            let endpoint = endpoint(address).map_err(|e| {
                Status::internal(format!("the mirror names a bad metadata address: {e}"))
            })?;
            let client = MetadataClient::new(endpoint.connect_lazy());
            clients.push_back(client.max_decoding_message_size(MESSAGE_BYTES_MAX));
        }
        let first = clients.front().expect("there is at least one address").clone();
        *self.known_metadata() = clients;
        Ok(first)
    }

    fn known_metadata(&self) -> MutexGuard<'_, VecDeque<MetadataClient<Channel>>> {
        self.metadata.lock().expect("nothing panics while it holds this")
    }

    /// Turns to the next metadata server. After the last one the mirror is asked for them anew.
    fn next_metadata(&self) {
        self.known_metadata().pop_front();
    }

    /// Repeats a call while nobody answers, for as long as [`Limits::unreachable`] allows.
    async fn retry<T, F, C>(&self, what: &str, limit: Duration, mut call: C) -> Result<T, Status>
    where
        C: FnMut(Duration) -> F,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let began = Instant::now();
        let mut pause = RETRY_FIRST;
        loop {
            let left = limit.saturating_sub(began.elapsed()).max(RETRY_FIRST);
            // Reaching the other side at all is bounded by `unreachable` below; a call that was
            // taken may use all of its time.
            let status = match timeout(left, call(left)).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => {
                    return Err(Status::deadline_exceeded(format!(
                        "{what} took longer than {} s; the host may be overloaded: try again with \
                         the same key",
                        limit.as_secs()
                    )));
                }
            };
            if !is_unreachable(&status) {
                return Err(status);
            }
            self.next_metadata();
            if began.elapsed() + pause > self.limits.unreachable.min(limit) {
                return Err(self.give_up(what, &status));
            }
            tracing::debug!(what, error = %status.message(), "nobody answers, trying again");
            sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    fn give_up(&self, what: &str, status: &Status) -> Status {
        if status.source().is_none() {
            // The other side said so itself and knows better what to do about it.
            return Status::unavailable(status.message());
        }
        Status::unavailable(format!(
            "{what} failed because nobody answers (mirror {}): {}; see that `blobcr up` or \
             `blobcr mirror` runs, then try again",
            self.address,
            status.message()
        ))
    }
}

fn timed<T>(message: T, limit: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

/// Nobody was there, or the connection broke: the call may be repeated.
fn is_unreachable(status: &Status) -> bool {
    // A status that the other side sent has no source; one made here from a transport error has.
    let broken = status.source().is_some()
        && matches!(status.code(), Code::Unknown | Code::Internal | Code::Cancelled);
    status.code() == Code::Unavailable || broken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        for good in ["127.0.0.1:7000", "http://[::1]:7000", "host.example:1"] {
            endpoint(good).unwrap();
        }
        for bad in ["", "host", "http://", ":70", "a b:1"] {
            assert!(endpoint(bad).is_err(), "{bad:?}");
        }
    }
}
