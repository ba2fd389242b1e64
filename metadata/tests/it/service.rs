//! The service as its clients see it: over gRPC, on a directory of its own.

use std::net::SocketAddr;
use std::path::Path;

use blobcr_metadata::{MetadataService, Options};
use blobcr_proto::v1;
use blobcr_proto::v1::metadata_client::MetadataClient;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Code;
use tonic::transport::Channel;

struct Server {
    service: MetadataService,
    shutdown: oneshot::Sender<()>,
    serving: JoinHandle<()>,
    client: MetadataClient<Channel>,
}

impl Server {
    async fn start(dir: &Path) -> Self {
        let service = blobcr_metadata::open(dir, Options::default()).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let mounted = blobcr_metadata::service(service.clone());
        let (shutdown, asked) = oneshot::channel::<()>();
        let serving = tokio::spawn(async move {
            tonic::transport::Server::builder()
                .add_service(mounted)
                .serve_with_incoming_shutdown(incoming, async { drop(asked.await) })
                .await
                .unwrap();
        });
        let client = MetadataClient::connect(format!("http://{address}")).await.unwrap();
        Self { service, shutdown, serving, client }
    }

    /// Returns when every connection, and with it every user of the service, has gone.
    async fn stop(self) {
        drop(self.client);
        self.shutdown.send(()).unwrap();
        self.serving.await.unwrap();
        self.service.close().await;
    }
}

fn named(name: &str) -> v1::ImageRef {
    v1::ImageRef { name: name.to_owned(), id: 0 }
}

fn root(byte: u8) -> v1::TreeRoot {
    let node = vec![byte; 32].into();
    v1::TreeRoot { size_bytes: 1 << 30, chunk_size: 256 << 10, fan_out: 64, node }
}

async fn publish_first(client: &mut MetadataClient<Channel>, image: &str) -> v1::Snapshot {
    let lease = v1::AcquireLeaseRequest { holder: "test".into(), ttl_ms: 0 };
    let lease = client.acquire_lease(lease).await.unwrap().into_inner();
    let image = v1::CreateImageRequest {
        name: image.into(),
        pool: "default".into(),
        chunk_size: 0,
        writer: "w".into(),
    };
    let image = client.create_image(image).await.unwrap().into_inner();
    let begin = v1::BeginSnapshotRequest {
        image_id: image.id,
        number: 0,
        lease_id: lease.id,
        writer: "w".into(),
    };
    let begun = client.begin_snapshot(begin).await.unwrap().into_inner();
    assert_eq!(begun.state(), v1::SnapshotState::Pending);
    let publish = v1::PublishSnapshotRequest {
        image_id: image.id,
        number: begun.number,
        lease_id: lease.id,
        writer: "w".into(),
        root: Some(root(1)),
        stats: None,
    };
    client.publish_snapshot(publish).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_from_creation_to_clone_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path()).await;
    let pool = server.service.ensure_pool("default", "replica:1").await.unwrap();
    assert_eq!((pool.id, pool.partitions, pool.compression.as_str()), (1, 1024, "adaptive"));
    let snapshot = publish_first(&mut server.client, "base").await;
    assert_eq!((snapshot.state(), snapshot.number), (v1::SnapshotState::Stable, 1));
    server.stop().await;

    let mut server = Server::start(dir.path()).await;
    assert_eq!(server.service.ensure_pool("default", "replica:1").await.unwrap(), pool);
    let source = v1::SnapshotRef { image: Some(named("base")), number: 0 };
    let clone = v1::CloneImageRequest {
        source: Some(source.clone()),
        name: "copy".into(),
        writer: "disk-7".into(),
    };
    let cloned = server.client.clone_image(clone.clone()).await.unwrap().into_inner();
    let (image, first) = (cloned.image.unwrap(), cloned.snapshot.unwrap());
    assert_eq!((image.latest, image.parent_snapshot), (1, 1));
    assert_eq!((first.number, first.root), (1, Some(root(1))));
    assert_eq!(server.client.clone_image(clone).await.unwrap_err().code(), Code::AlreadyExists);
    let found = server.client.get_snapshot(source).await.unwrap().into_inner();
    assert_eq!(found, snapshot);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_has_its_code_and_names_the_object() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path()).await;
    server.service.ensure_pool("default", "replica:2").await.unwrap();
    publish_first(&mut server.client, "base").await;
    let client = &mut server.client;
    let check = |status: tonic::Status, code: Code, part: &str| {
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(part), "{:?} does not say {part:?}", status.message());
    };

    let missing = client.get_image(named("none")).await.unwrap_err();
    check(missing, Code::NotFound, "\"none\"");
    let bad = client.get_image(named("../etc")).await.unwrap_err();
    check(bad, Code::InvalidArgument, "../etc");
    let create = v1::CreateImageRequest {
        name: "base".into(),
        pool: "default".into(),
        chunk_size: 0,
        writer: String::new(),
    };
    check(client.create_image(create).await.unwrap_err(), Code::AlreadyExists, "\"base\"");
    let begin =
        v1::BeginSnapshotRequest { image_id: 1, number: 0, lease_id: 5, writer: "other".into() };
    check(client.begin_snapshot(begin).await.unwrap_err(), Code::FailedPrecondition, "\"base\"");
    let pool = v1::GetPlacementRequest { name: "default".into(), ..Default::default() };
    check(client.get_placement(pool).await.unwrap_err(), Code::FailedPrecondition, "2 nodes");
    let begin = v1::BeginSnapshotRequest {
        image_id: 1,
        number: 0,
        lease_id: client
            .acquire_lease(v1::AcquireLeaseRequest::default())
            .await
            .unwrap()
            .into_inner()
            .id,
        writer: "w".into(),
    };
    client.begin_snapshot(begin).await.unwrap();
    let wait = v1::WaitSnapshotRequest {
        snapshot: Some(v1::SnapshotRef { image: Some(named("base")), number: 2 }),
        timeout_ms: 20,
    };
    check(client.wait_snapshot(wait).await.unwrap_err(), Code::DeadlineExceeded, "base@2");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_service_on_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = blobcr_metadata::open(dir.path(), Options::default()).await.unwrap();
    let second = blobcr_metadata::open(dir.path(), Options::default()).await.unwrap_err();
    let message = second.to_string();
    assert!(message.contains(&dir.path().display().to_string()), "{message}");
    assert!(message.contains("in use by process"), "{message}");
    first.close().await;
    blobcr_metadata::open(dir.path(), Options::default()).await.unwrap().close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_cannot_be_used_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "not a directory").unwrap();
    let error = blobcr_metadata::open(&file.join("meta"), Options::default()).await.unwrap_err();
    assert!(error.to_string().contains(&file.display().to_string()), "{error}");
}

/// The service fails what a dead writer left by itself, in real time.
#[tokio::test(flavor = "multi_thread")]
async fn the_service_ends_leases_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path()).await;
    server.service.ensure_pool("default", "replica:1").await.unwrap();
    publish_first(&mut server.client, "base").await;
    let client = &mut server.client;
    // The shortest there is.
    let lease = v1::AcquireLeaseRequest { holder: "dying".into(), ttl_ms: 1 };
    let lease_id = client.acquire_lease(lease).await.unwrap().into_inner().id;
    let begin = v1::BeginSnapshotRequest { image_id: 1, number: 2, lease_id, writer: "w".into() };
    client.begin_snapshot(begin).await.unwrap();
    let wait = v1::WaitSnapshotRequest {
        snapshot: Some(v1::SnapshotRef { image: Some(named("base")), number: 2 }),
        timeout_ms: 60_000,
    };
    let failed = client.wait_snapshot(wait).await.unwrap().into_inner();
    assert_eq!(failed.state(), v1::SnapshotState::Failed);
    assert!(failed.reason.contains("lease ran out"), "{}", failed.reason);
    server.stop().await;
}
