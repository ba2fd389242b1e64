//! A scripted host to test a proxy against: a mirror, its directory, and the two calls of the
//! metadata service that a proxy makes. It runs in a runtime of its own, so that it can be killed
//! like a process, and its state outlives it, like a mirror's on disk.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use blobcr_proto::v1;
use blobcr_proto::v1::SnapshotState;
use blobcr_proto::v1::directory_server::{Directory, DirectoryServer};
use blobcr_proto::v1::metadata_server::{Metadata, MetadataServer};
use blobcr_proto::v1::mirror_server::{Mirror, MirrorServer};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// How a snapshot ends that can be restarted from.
pub const STABLE: SnapshotState = SnapshotState::Stable;

#[derive(Default)]
struct Facts {
    disks: BTreeMap<String, v1::Disk>,
    answers: BTreeMap<String, Vec<v1::DiskSnapshot>>,
    snapshots: BTreeMap<(String, u64), v1::Snapshot>,
    sets: Vec<v1::AddToSetRequest>,
    begun: u64,
    /// The keys of all checkpoint calls, in order.
    calls: Vec<String>,
    failures: Vec<Status>,
    running: usize,
    most_running: usize,
    /// The metadata service has not been told of pending snapshots yet.
    unborn: bool,
}

/// What the host remembers and what it was told to do; it outlives the host.
#[derive(Clone)]
pub struct Script {
    facts: Arc<Mutex<Facts>>,
    held: watch::Sender<bool>,
    changed: watch::Sender<()>,
}

impl Script {
    /// A host with these disks, none of which has a checkpoint.
    #[must_use]
    pub fn new(disks: &[&str]) -> Self {
        let disk = |name: &&str| {
            let disk = v1::Disk {
                name: (*name).to_owned(),
                image: "debian".to_owned(),
                snapshot: 1,
                path: format!("/mnt/disks/{name}.raw"),
                size_bytes: 1 << 30,
                ..v1::Disk::default()
            };
            ((*name).to_owned(), disk)
        };
        let facts = Facts { disks: disks.iter().map(disk).collect(), ..Facts::default() };
        Self {
            facts: Arc::new(Mutex::new(facts)),
            held: watch::Sender::new(false),
            changed: watch::Sender::new(()),
        }
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().expect("nothing panics while it holds this")
    }

    /// From now on a checkpoint is taken but its answer held back.
    pub fn hold(&self) {
        self.held.send_replace(true);
    }

    /// Whether the metadata service knows nothing of pending snapshots, as it is for a moment after
    /// each checkpoint and for as long as the mirror cannot reach it.
    pub fn set_unborn(&self, unborn: bool) {
        self.facts().unborn = unborn;
    }

    /// Lets the answers go.
    pub fn release(&self) {
        self.held.send_replace(false);
    }

    /// The next checkpoint call fails like this; several wait in line.
    pub fn fail_next(&self, status: Status) {
        self.facts().failures.push(status);
    }

    /// The keys of all checkpoint calls so far.
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        self.facts().calls.clone()
    }

    /// Checkpoint calls that are being held, and the most there ever were at a time.
    #[must_use]
    pub fn running(&self) -> (usize, usize) {
        let facts = self.facts();
        (facts.running, facts.most_running)
    }

    /// The sets that were reported.
    #[must_use]
    pub fn sets(&self) -> Vec<v1::AddToSetRequest> {
        self.facts().sets.clone()
    }

    /// Ends the persisting of every pending snapshot like this.
    pub fn settle(&self, state: SnapshotState, reason: &str) {
        let mut facts = self.facts();
        for snapshot in facts.snapshots.values_mut() {
            if snapshot.state() == SnapshotState::Pending {
                snapshot.set_state(state);
                snapshot.reason = reason.to_owned();
            }
        }
        for disk in facts.disks.values_mut() {
            if let Some(last) = disk.pending.last() {
                disk.last_stable = *last;
            }
            disk.pending.clear();
        }
        drop(facts);
        self.changed.send_replace(());
    }

    fn take_checkpoint(
        &self,
        request: &v1::CheckpointDisksRequest,
    ) -> Result<Vec<v1::DiskSnapshot>, Status> {
        let mut facts = self.facts();
        facts.calls.push(request.idempotency_key.clone());
        if !facts.failures.is_empty() {
            return Err(facts.failures.remove(0));
        }
        if let Some(first) = facts.answers.get(&request.idempotency_key) {
            return Ok(first.clone());
        }
        let mut taken = Vec::new();
        for name in &request.disks {
            let disk = facts.disks.get_mut(name).ok_or_else(|| no_disk(name))?;
            disk.checkpoint_image = format!("{name}-ckpt");
            let number = disk.pending.last().copied().unwrap_or(disk.last_stable) + 1;
            disk.pending.push(number);
            taken.push(v1::DiskSnapshot {
                disk: name.clone(),
                image: disk.checkpoint_image.clone(),
                image_id: 7,
                number,
                dirty_bytes: 4096,
                downtime_ns: 1234,
            });
        }
        for snapshot in &taken {
            let mut record = v1::Snapshot {
                image: snapshot.image.clone(),
                number: snapshot.number,
                ..v1::Snapshot::default()
            };
            record.set_state(SnapshotState::Pending);
            facts.snapshots.insert((snapshot.image.clone(), snapshot.number), record);
        }
        facts.answers.insert(request.idempotency_key.clone(), taken.clone());
        Ok(taken)
    }

    /// Counts the call as running until it is dropped, even when its caller goes away.
    fn run(&self) -> Running {
        let mut facts = self.facts();
        facts.running += 1;
        facts.most_running = facts.most_running.max(facts.running);
        Running(self.clone())
    }
}

struct Running(Script);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.facts().running -= 1;
    }
}

fn no_disk(name: &str) -> Status {
    Status::not_found(format!("there is no disk {name} here; attach it first"))
}

/// A host that answers by a [`Script`].
pub struct ScriptedHost {
    runtime: Option<Runtime>,
    address: SocketAddr,
}

impl ScriptedHost {
    /// Starts on a free port, or on the port of a host that was killed.
    ///
    /// # Panics
    /// When the port cannot be had.
    #[must_use]
    pub fn start(script: &Script, address: Option<SocketAddr>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a test may start a thread");
        let wanted = address.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
        let listener = std::net::TcpListener::bind(wanted).expect("the port is free");
        listener.set_nonblocking(true).expect("a socket can be non-blocking");
        let address = listener.local_addr().expect("it is bound");
        let server = Server::builder()
            .add_service(MirrorServer::new(script.clone()))
            .add_service(DirectoryServer::new(script.clone()))
            .add_service(MetadataServer::new(script.clone()));
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("in a runtime");
            server.serve_with_incoming(TcpListenerStream::new(listener)).await
        });
        Self { runtime: Some(runtime), address }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it at once, in the middle of whatever it does, and returns where it was.
    pub fn kill(mut self) -> SocketAddr {
        self.end();
        self.address
    }

    fn end(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // On a thread of its own: a runtime must not be ended inside another one.
            std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(5)))
                .join()
                .expect("ending a runtime does not panic");
        }
    }
}

impl Drop for ScriptedHost {
    fn drop(&mut self) {
        self.end();
    }
}

#[tonic::async_trait]
impl Directory for Script {
    async fn describe(
        &self,
        _: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::Description>, Status> {
        // It names no metadata service, so the proxy asks this address itself.
        Ok(Response::new(v1::Description { role: "mirror".to_owned(), ..Default::default() }))
    }

    async fn announce_proxy(
        &self,
        _: Request<v1::AnnounceProxyRequest>,
    ) -> Result<Response<v1::AnnounceProxyResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }
}

#[tonic::async_trait]
impl Mirror for Script {
    async fn get_disk(&self, request: Request<v1::DiskRef>) -> Result<Response<v1::Disk>, Status> {
        let name = request.into_inner().disk;
        self.facts().disks.get(&name).cloned().map(Response::new).ok_or_else(|| no_disk(&name))
    }

    async fn checkpoint_disks(
        &self,
        request: Request<v1::CheckpointDisksRequest>,
    ) -> Result<Response<v1::CheckpointDisksResponse>, Status> {
        let running = self.run();
        let snapshots = self.take_checkpoint(&request.into_inner())?;
        let mut held = self.held.subscribe();
        held.wait_for(|held| !held).await.map_err(|e| Status::internal(e.to_string()))?;
        drop(running);
        Ok(Response::new(v1::CheckpointDisksResponse { snapshots }))
    }

    async fn attach_disk(
        &self,
        _: Request<v1::AttachDiskRequest>,
    ) -> Result<Response<v1::Disk>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn fork_disks(
        &self,
        _: Request<v1::ForkDisksRequest>,
    ) -> Result<Response<v1::ForkDisksResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn detach_disk(
        &self,
        _: Request<v1::DetachDiskRequest>,
    ) -> Result<Response<v1::DetachDiskResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn list_disks(
        &self,
        _: Request<v1::ListDisksRequest>,
    ) -> Result<Response<v1::ListDisksResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn rollback_disk(
        &self,
        _: Request<v1::RollbackDiskRequest>,
    ) -> Result<Response<v1::Disk>, Status> {
        Err(Status::unimplemented("not scripted"))
    }
}

impl Script {
    async fn wait(&self, request: v1::WaitSnapshotRequest) -> Result<v1::Snapshot, Status> {
        let reference = request.snapshot.unwrap_or_default();
        let key = (reference.image.unwrap_or_default().name, reference.number);
        let mut changed = self.changed.subscribe();
        let settled = async {
            loop {
                let found = {
                    let facts = self.facts();
                    let found = facts.snapshots.get(&key).cloned();
                    found.filter(|s| !facts.unborn || s.state() != SnapshotState::Pending)
                };
                let found = found.ok_or_else(|| Status::not_found("no such snapshot"))?;
                if found.state() != SnapshotState::Pending {
                    return Ok(found);
                }
                changed.changed().await.map_err(|e| Status::internal(e.to_string()))?;
            }
        };
        let time = Duration::from_millis(request.timeout_ms);
        tokio::time::timeout(time, settled)
            .await
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("it is still pending")))
    }
}

/// The metadata service of [`Script`]: two calls, and all others unimplemented.
macro_rules! metadata {
    ($($call:ident: $request:ident => $response:ident,)*) => {
        #[tonic::async_trait]
        impl Metadata for Script {
            async fn wait_snapshot(
                &self,
                request: Request<v1::WaitSnapshotRequest>,
            ) -> Result<Response<v1::Snapshot>, Status> {
                self.wait(request.into_inner()).await.map(Response::new)
            }

            async fn add_to_set(
                &self,
                request: Request<v1::AddToSetRequest>,
            ) -> Result<Response<v1::CheckpointSet>, Status> {
                let request = request.into_inner();
                let set = v1::CheckpointSet {
                    group: request.group.clone(),
                    sequence: request.sequence,
                    ..v1::CheckpointSet::default()
                };
                self.facts().sets.push(request);
                Ok(Response::new(set))
            }

            async fn begin_set(
                &self,
                request: Request<v1::BeginSetRequest>,
            ) -> Result<Response<v1::CheckpointSet>, Status> {
                let v1::BeginSetRequest { group, expected_vms } = request.into_inner();
                let mut facts = self.facts();
                facts.begun += 1;
                let sequence = facts.begun;
                Ok(Response::new(v1::CheckpointSet {
                    group,
                    sequence,
                    expected_vms,
                    state: v1::SetState::Incomplete.into(),
                    ..v1::CheckpointSet::default()
                }))
            }

            async fn get_set(
                &self,
                request: Request<v1::GetSetRequest>,
            ) -> Result<Response<v1::CheckpointSet>, Status> {
                let v1::GetSetRequest { group, sequence } = request.into_inner();
                let members = {
                    let facts = self.facts();
                    let sets = facts.sets.iter();
                    let joined = sets.filter(|s| s.group == group && s.sequence == sequence);
                    joined.flat_map(|s| s.members.clone()).collect()
                };
                let expected_vms = 1;
                Ok(Response::new(v1::CheckpointSet {
                    group,
                    sequence,
                    expected_vms,
                    members,
                    state: v1::SetState::Pending.into(),
                    ..v1::CheckpointSet::default()
                }))
            }

            $(async fn $call(
                &self,
                _: Request<v1::$request>,
            ) -> Result<Response<v1::$response>, Status> {
                Err(Status::unimplemented("not scripted"))
            })*
        }
    };
}

metadata! {
    create_image: CreateImageRequest => Image,
    get_image: ImageRef => Image,
    list_images: ListImagesRequest => ListImagesResponse,
    clone_image: CloneImageRequest => CloneImageResponse,
    remove_image: ImageRef => RemoveImageResponse,
    begin_snapshot: BeginSnapshotRequest => Snapshot,
    publish_snapshot: PublishSnapshotRequest => Snapshot,
    fail_snapshot: FailSnapshotRequest => Snapshot,
    get_snapshot: SnapshotRef => Snapshot,
    list_snapshots: ListSnapshotsRequest => ListSnapshotsResponse,
    remove_snapshot: SnapshotRef => Snapshot,
    pin_snapshot: PinSnapshotRequest => Pin,
    pin_snapshots: PinSnapshotsRequest => PinSnapshotsResponse,
    unpin_snapshot: UnpinSnapshotRequest => UnpinSnapshotResponse,
    list_pins: ListPinsRequest => ListPinsResponse,
    get_read_trace: SnapshotRef => GetReadTraceResponse,
    put_read_trace: PutReadTraceRequest => PutReadTraceResponse,
    get_collection_bound: CollectionBoundRequest => CollectionBound,
    list_roots: ListRootsRequest => ListRootsResponse,
    acquire_lease: AcquireLeaseRequest => Lease,
    renew_lease: RenewLeaseRequest => Lease,
    release_lease: ReleaseLeaseRequest => ReleaseLeaseResponse,
    create_pool: CreatePoolRequest => Pool,
    get_pool: PoolRef => Pool,
    list_pools: ListPoolsRequest => ListPoolsResponse,
    register_node: RegisterNodeRequest => Node,
    list_nodes: ListNodesRequest => ListNodesResponse,
    get_placement: GetPlacementRequest => PlacementTable,
    report_debt: ReportDebtRequest => ReportDebtResponse,
    list_debt: ListDebtRequest => ListDebtResponse,
    settle_debts: SettleDebtsRequest => SettleDebtsResponse,
    list_sets: ListSetsRequest => ListSetsResponse,
    latest_set: LatestSetRequest => CheckpointSet,
    pin_set: PinSetRequest => CheckpointSet,
    unpin_set: PinSetRequest => CheckpointSet,
    list_groups: ListGroupsRequest => ListGroupsResponse,
    keep_sets: KeepSetsRequest => Group,
    retire_sets: RetireSetsRequest => RetireSetsResponse,
    drain_node: DrainNodeRequest => Node,
    remove_node: RemoveNodeRequest => Node,
    settle_partitions: SettlePartitionsRequest => SettlePartitionsResponse,
    lead_steward: LeadStewardRequest => Steward,
    get_steward: GetStewardRequest => Steward,
}
