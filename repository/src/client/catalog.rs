//! The catalog over gRPC: several servers, one deadline for each call.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use blobcr_proto::v1::metadata_client::MetadataClient;
use blobcr_proto::{MESSAGE_BYTES_MAX, v1};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::status::{catalog_error, never_sent};
use super::{ConnectOptions, channel, timed};
use crate::{Catalog, CatalogError};

/// The wait after every server has failed, at first and at most.
const WAIT_FIRST: Duration = Duration::from_millis(20);
const WAIT_MAX: Duration = Duration::from_secs(1);

/// One question of a long wait: a server that died is found out after so long at the latest.
const WAIT_SLICE: Duration = Duration::from_secs(20);
/// The longest wait: what is longer is meant to be for ever, and would not fit a clock.
const WAIT_TIME_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// What an answer to such a question may take beyond the time that it names.
const WAIT_MARGIN: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Server {
    address: String,
    client: MetadataClient<Channel>,
}

/// Whether a call may be made again when nobody knows whether the first one arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repeat {
    /// Twice is the same as once.
    Safe,
    /// Twice is not the same: only a call that cannot have arrived is made again.
    Unsafe,
}

impl Repeat {
    const fn safe_if(safe: bool) -> Self {
        if safe { Self::Safe } else { Self::Unsafe }
    }
}

/// A [`Catalog`] served by one or several metadata servers, which are asked in turn until one
/// answers. The one that answered is asked first the next time.
#[derive(Debug)]
pub struct RemoteCatalog {
    servers: Vec<Server>,
    preferred: AtomicUsize,
    deadline: Duration,
    attempt: Duration,
}

impl RemoteCatalog {
    /// A client of the servers at `addresses`. Connects to none before it is used.
    ///
    /// # Errors
    /// When there is no address, or one makes no sense.
    pub fn new(addresses: &[String], options: &ConnectOptions) -> Result<Self, CatalogError> {
        if addresses.is_empty() {
            return Err(CatalogError::Invalid("no address of a metadata server was given".into()));
        }
        let connect = |address: &String| {
            let channel = channel(address, options)
                .map_err(|error| CatalogError::Invalid(error.to_string()))?;
            let client = MetadataClient::new(channel)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            Ok(Server { address: address.clone(), client })
        };
        Ok(Self {
            servers: addresses.iter().map(connect).collect::<Result<_, CatalogError>>()?,
            preferred: AtomicUsize::new(0),
            deadline: options.metadata_deadline,
            attempt: options.metadata_attempt,
        })
    }

    /// Asks the servers in turn, until one answers or the deadline is over.
    async fn call<T, F>(
        &self,
        repeat: Repeat,
        limits: Limits,
        mut ask: impl FnMut(MetadataClient<Channel>, Duration) -> F,
    ) -> Result<T, CatalogError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let until = Instant::now() + limits.deadline;
        let mut wait = WAIT_FIRST;
        let mut attempts = 0;
        loop {
            let at = (self.preferred.load(Ordering::Relaxed)) % self.servers.len();
            let server = &self.servers[at];
            let patience = limits.attempt.min(until - Instant::now());
            let (error, again) = match timeout(patience, ask(server.client.clone(), patience)).await
            {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) => {
                    let error = catalog_error(&server.address, &status);
                    let sure = repeat == Repeat::Safe || never_sent(&status);
                    // A lost race left no trace, whatever the call.
                    let again = match error {
                        CatalogError::Conflict(_) => true,
                        CatalogError::Unavailable(_) => sure,
                        _ => false,
                    };
                    (error, again)
                }
                Err(_) => {
                    let text = format!("{}: no answer within {patience:?}", server.address);
                    (CatalogError::Unavailable(text), repeat == Repeat::Safe)
                }
            };
            if matches!(error, CatalogError::Unavailable(_)) {
                let next = (at + 1) % self.servers.len();
                // Whoever else saw the same failure has moved on already.
                let _ =
                    self.preferred.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
            }
            attempts += 1;
            let pause = if attempts % self.servers.len() == 0 { wait } else { Duration::ZERO };
            if !again || Instant::now() + pause >= until {
                return Err(error);
            }
            if !pause.is_zero() {
                sleep(pause).await;
                wait = (wait * 2).min(WAIT_MAX);
            }
        }
    }

    fn limits(&self) -> Limits {
        Limits { deadline: self.deadline, attempt: self.attempt }
    }

    /// Waits in several questions, so that a server that died is found out.
    async fn wait_in_slices(
        &self,
        request: v1::WaitSnapshotRequest,
    ) -> Result<v1::Snapshot, CatalogError> {
        let wait = Duration::from_millis(request.timeout_ms).min(WAIT_TIME_MAX);
        let until = Instant::now() + wait;
        loop {
            let left = until - Instant::now();
            let slice = left.min(WAIT_SLICE);
            let limits = Limits { deadline: slice + self.deadline, attempt: slice + WAIT_MARGIN };
            let answer = self
                .call(Repeat::Safe, limits, |mut client, patience| {
                    let timeout_ms = u64::try_from(slice.as_millis()).unwrap_or(u64::MAX);
                    let asked = v1::WaitSnapshotRequest { timeout_ms, ..request.clone() };
                    let asked = timed(asked, patience);
                    async move { client.wait_snapshot(asked).await }
                })
                .await;
            match answer {
                Err(CatalogError::Timeout(_)) if Instant::now() < until => {}
                answer => return answer,
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    deadline: Duration,
    attempt: Duration,
}

/// The implementation with one method per RPC, and those that are not like the others.
/// (The attribute does not see methods that a macro makes inside of the block.)
macro_rules! catalog_of {
    ($($name:ident($request:ty) -> $answer:ty, $repeat:ident;)*) => {
        #[async_trait]
        impl Catalog for RemoteCatalog {
            $(async fn $name(&self, request: $request) -> Result<$answer, CatalogError> {
                self.call(Repeat::$repeat, self.limits(), |mut client, patience| {
                    let request = timed(request.clone(), patience);
                    async move { client.$name(request).await }
                })
                .await
            })*

            /// A pending snapshot is handed out again to the writer who began it under that number.
            async fn begin_snapshot(
                &self,
                request: v1::BeginSnapshotRequest,
            ) -> Result<v1::Snapshot, CatalogError> {
                let repeat =
                    Repeat::safe_if(request.number != 0 && !request.writer.is_empty());
                self.call(repeat, self.limits(), |mut client, patience| {
                    let request = timed(request.clone(), patience);
                    async move { client.begin_snapshot(request).await }
                })
                .await
            }

            /// A second one finds the name taken, and the image says by which writer.
            async fn clone_image(
                &self,
                request: v1::CloneImageRequest,
            ) -> Result<v1::CloneImageResponse, CatalogError> {
                let repeat = Repeat::safe_if(!request.writer.is_empty());
                self.call(repeat, self.limits(), |mut client, patience| {
                    let request = timed(request.clone(), patience);
                    async move { client.clone_image(request).await }
                })
                .await
            }

            async fn wait_snapshot(
                &self,
                request: v1::WaitSnapshotRequest,
            ) -> Result<v1::Snapshot, CatalogError> {
                self.wait_in_slices(request).await
            }
        }
    };
}

catalog_of! {
    create_image(v1::CreateImageRequest) -> v1::Image, Unsafe;
    get_image(v1::ImageRef) -> v1::Image, Safe;
    list_images(v1::ListImagesRequest) -> v1::ListImagesResponse, Safe;
    remove_image(v1::ImageRef) -> v1::RemoveImageResponse, Unsafe;
    publish_snapshot(v1::PublishSnapshotRequest) -> v1::Snapshot, Safe;
    fail_snapshot(v1::FailSnapshotRequest) -> v1::Snapshot, Safe;
    get_snapshot(v1::SnapshotRef) -> v1::Snapshot, Safe;
    list_snapshots(v1::ListSnapshotsRequest) -> v1::ListSnapshotsResponse, Safe;
    remove_snapshot(v1::SnapshotRef) -> v1::Snapshot, Safe;
    pin_snapshot(v1::PinSnapshotRequest) -> v1::Pin, Safe;
    pin_snapshots(v1::PinSnapshotsRequest) -> v1::PinSnapshotsResponse, Safe;
    unpin_snapshot(v1::UnpinSnapshotRequest) -> v1::UnpinSnapshotResponse, Safe;
    list_pins(v1::ListPinsRequest) -> v1::ListPinsResponse, Safe;
    get_read_trace(v1::SnapshotRef) -> v1::GetReadTraceResponse, Safe;
    put_read_trace(v1::PutReadTraceRequest) -> v1::PutReadTraceResponse, Safe;
    acquire_lease(v1::AcquireLeaseRequest) -> v1::Lease, Unsafe;
    renew_lease(v1::RenewLeaseRequest) -> v1::Lease, Safe;
    release_lease(v1::ReleaseLeaseRequest) -> v1::ReleaseLeaseResponse, Safe;
    get_collection_bound(v1::CollectionBoundRequest) -> v1::CollectionBound, Safe;
    list_roots(v1::ListRootsRequest) -> v1::ListRootsResponse, Safe;
    create_pool(v1::CreatePoolRequest) -> v1::Pool, Unsafe;
    get_pool(v1::PoolRef) -> v1::Pool, Safe;
    list_pools(v1::ListPoolsRequest) -> v1::ListPoolsResponse, Safe;
    register_node(v1::RegisterNodeRequest) -> v1::Node, Safe;
    list_nodes(v1::ListNodesRequest) -> v1::ListNodesResponse, Safe;
    drain_node(v1::DrainNodeRequest) -> v1::Node, Safe;
    remove_node(v1::RemoveNodeRequest) -> v1::Node, Safe;
    settle_partitions(v1::SettlePartitionsRequest) -> v1::SettlePartitionsResponse, Safe;
    get_placement(v1::GetPlacementRequest) -> v1::PlacementTable, Safe;
    report_debt(v1::ReportDebtRequest) -> v1::ReportDebtResponse, Safe;
    list_debt(v1::ListDebtRequest) -> v1::ListDebtResponse, Safe;
    settle_debts(v1::SettleDebtsRequest) -> v1::SettleDebtsResponse, Safe;
    lead_steward(v1::LeadStewardRequest) -> v1::Steward, Safe;
    get_steward(v1::GetStewardRequest) -> v1::Steward, Safe;
    add_to_set(v1::AddToSetRequest) -> v1::CheckpointSet, Safe;
    list_sets(v1::ListSetsRequest) -> v1::ListSetsResponse, Safe;
    latest_set(v1::LatestSetRequest) -> v1::CheckpointSet, Safe;
    begin_set(v1::BeginSetRequest) -> v1::CheckpointSet, Safe;
    get_set(v1::GetSetRequest) -> v1::CheckpointSet, Safe;
    pin_set(v1::PinSetRequest) -> v1::CheckpointSet, Safe;
    unpin_set(v1::PinSetRequest) -> v1::CheckpointSet, Safe;
    list_groups(v1::ListGroupsRequest) -> v1::ListGroupsResponse, Safe;
    keep_sets(v1::KeepSetsRequest) -> v1::Group, Safe;
    retire_sets(v1::RetireSetsRequest) -> v1::RetireSetsResponse, Safe;
}
