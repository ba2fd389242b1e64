use std::sync::Arc;
use std::time::{Duration, Instant};

use blobcr_proto::v1;

use super::impatient;
use super::servers::{closed_port, metadata_server};
use crate::client::RemoteCatalog;
use crate::testing::MemoryCatalog;
use crate::{Catalog, CatalogError, LEASE_TTL, LeaseKeeper, Repository};

fn client(addresses: &[std::net::SocketAddr]) -> RemoteCatalog {
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    RemoteCatalog::new(&addresses, &impatient()).unwrap()
}

fn named(name: &str) -> v1::ImageRef {
    v1::ImageRef { name: name.into(), id: 0 }
}

fn new_image(name: &str) -> v1::CreateImageRequest {
    v1::CreateImageRequest { name: name.into(), ..Default::default() }
}

fn away() -> CatalogError {
    CatalogError::Unavailable("busy just now".into())
}

#[tokio::test]
async fn every_kind_of_error_arrives_as_itself() {
    let catalog = MemoryCatalog::default();
    let server = metadata_server(&catalog);
    let client = client(&[server.address]);
    for error in [
        CatalogError::NotFound("there is no such".into()),
        CatalogError::AlreadyExists("there is one".into()),
        CatalogError::Invalid("nonsense".into()),
        CatalogError::Precondition("not now".into()),
        CatalogError::Timeout("too late".into()),
    ] {
        catalog.faults().reset_calls();
        catalog.faults().fail_next("get_image", 1, error.clone());
        assert_eq!(client.get_image(named("a")).await.unwrap_err(), error);
        assert_eq!(catalog.faults().calls("get_image"), 1, "{error:?} is not tried again");
    }
}

#[tokio::test]
async fn a_catalog_over_the_wire_is_the_catalog() {
    let catalog = MemoryCatalog::default();
    let server = metadata_server(&catalog);
    let client = client(&[server.address]);
    let image = client.create_image(new_image("debian")).await.unwrap();
    assert_eq!(client.get_image(named("debian")).await.unwrap(), image);
    let lease = client
        .acquire_lease(v1::AcquireLeaseRequest { holder: "t".into(), ttl_ms: 60_000 })
        .await
        .unwrap();
    assert_eq!(
        client.renew_lease(v1::RenewLeaseRequest { lease_id: lease.id }).await.unwrap(),
        lease
    );
    let begin =
        v1::BeginSnapshotRequest { image_id: image.id, lease_id: lease.id, ..Default::default() };
    let snapshot = client.begin_snapshot(begin).await.unwrap();
    assert_eq!((snapshot.number, snapshot.state()), (1, v1::SnapshotState::Pending));
    let twice = client.create_image(new_image("debian")).await.unwrap_err();
    assert!(matches!(twice, CatalogError::AlreadyExists(_)), "{twice:?}");
}

#[tokio::test]
async fn calls_that_may_be_repeated_are_and_others_never() {
    let catalog = MemoryCatalog::default();
    let server = metadata_server(&catalog);
    let client = client(&[server.address]);
    catalog.faults().fail_next("create_image", 1, away());
    let error = client.create_image(new_image("debian")).await.unwrap_err();
    assert!(matches!(&error, CatalogError::Unavailable(text) if text.contains("busy")), "{error}");
    assert_eq!(catalog.faults().calls("create_image"), 1, "nobody knows whether it was done");
    client.create_image(new_image("debian")).await.unwrap();

    catalog.faults().fail_next("get_image", 3, away());
    client.get_image(named("debian")).await.unwrap();
    assert_eq!(catalog.faults().calls("get_image"), 4);

    // A lost race left no trace, so even this is tried again.
    catalog.faults().fail_next("create_image", 2, CatalogError::Conflict("lost a race".into()));
    client.create_image(new_image("second")).await.unwrap();
}

/// What the mirror of a disk says names its writer, and so may be said twice.
#[tokio::test]
async fn what_names_its_writer_is_repeated_at_the_next_server() {
    let catalog = MemoryCatalog::default();
    let (a, b) = (metadata_server(&catalog), metadata_server(&catalog));
    let client = client(&[a.address, b.address]);
    let image = v1::CreateImageRequest { writer: "w".into(), ..new_image("i") };
    let image = client.create_image(image).await.unwrap();
    let lease = v1::AcquireLeaseRequest { holder: "w".into(), ttl_ms: 60_000 };
    let lease = client.acquire_lease(lease).await.unwrap();
    let begin = |number, writer: &str| v1::BeginSnapshotRequest {
        image_id: image.id,
        number,
        lease_id: lease.id,
        writer: writer.into(),
    };
    catalog.faults().fail_next("begin_snapshot", 1, away());
    client.begin_snapshot(begin(1, "w")).await.unwrap();
    assert_eq!(catalog.faults().calls("begin_snapshot"), 2);
    // Without a number, each call would begin another one.
    catalog.faults().fail_next("begin_snapshot", 1, away());
    client.begin_snapshot(begin(0, "w")).await.unwrap_err();
    assert_eq!(catalog.faults().calls("begin_snapshot"), 3);
}

#[tokio::test]
async fn a_dead_server_is_passed_over_and_then_left_alone() {
    let catalog = MemoryCatalog::default();
    let (a, b) = (metadata_server(&catalog), metadata_server(&catalog));
    let client = client(&[closed_port(), a.address, b.address]);
    // Even a call that must not happen twice: the first server cannot have got it.
    client.create_image(new_image("debian")).await.unwrap();
    for _ in 0..50 {
        client.get_image(named("debian")).await.unwrap();
    }
    drop(a);
    client.get_image(named("debian")).await.unwrap();
    client.create_image(new_image("another")).await.unwrap();
}

#[tokio::test]
async fn a_server_that_hangs_is_left_for_the_next() {
    let (stuck, good) = (MemoryCatalog::default(), MemoryCatalog::default());
    good.create_image(new_image("debian")).await.unwrap();
    let _held = stuck.faults().hold_next("get_image", 10);
    let (a, b) = (metadata_server(&stuck), metadata_server(&good));
    let client = client(&[a.address, b.address]);
    let begin = Instant::now();
    client.get_image(named("debian")).await.unwrap();
    assert!(begin.elapsed() >= impatient().metadata_attempt);
    assert!(begin.elapsed() < impatient().metadata_deadline);
}

#[tokio::test]
async fn every_call_ends_by_its_deadline() {
    let catalog = MemoryCatalog::default();
    let _held = catalog.faults().hold_next("get_image", 100);
    let server = metadata_server(&catalog);
    for address in [server.address, closed_port()] {
        let begin = Instant::now();
        let error = client(&[address]).get_image(named("debian")).await.unwrap_err();
        assert!(matches!(error, CatalogError::Unavailable(_)), "{error}");
        assert!(error.to_string().contains(&address.to_string()), "{error}");
        assert!(error.is_transient());
        assert!(begin.elapsed() < impatient().metadata_deadline + Duration::from_secs(2));
    }
    let _held = catalog.faults().hold_next("create_image", 1);
    client(&[server.address]).create_image(new_image("a")).await.unwrap_err();
    assert_eq!(catalog.faults().calls("create_image"), 1);
}

async fn pending(catalog: &MemoryCatalog) -> (v1::Image, v1::Lease) {
    let image = catalog.create_image(new_image("debian")).await.unwrap();
    let lease = catalog
        .acquire_lease(v1::AcquireLeaseRequest { holder: "t".into(), ttl_ms: 600_000 })
        .await
        .unwrap();
    let begin =
        v1::BeginSnapshotRequest { image_id: image.id, lease_id: lease.id, ..Default::default() };
    catalog.begin_snapshot(begin).await.unwrap();
    (image, lease)
}

fn first_of(image: &v1::Image, timeout_ms: u64) -> v1::WaitSnapshotRequest {
    let image = Some(v1::ImageRef { id: image.id, name: String::new() });
    v1::WaitSnapshotRequest { snapshot: Some(v1::SnapshotRef { image, number: 1 }), timeout_ms }
}

#[tokio::test]
async fn a_wait_outlives_the_server_that_it_began_with() {
    let catalog = MemoryCatalog::default();
    let (image, lease) = pending(&catalog).await;
    let mut a = metadata_server(&catalog);
    let b = metadata_server(&catalog);
    let client = Arc::new(client(&[a.address, b.address]));
    let waiting = tokio::spawn({
        let (client, request) = (Arc::clone(&client), first_of(&image, 60_000));
        async move { client.wait_snapshot(request).await }
    });
    while catalog.faults().calls("wait_snapshot") == 0 {
        tokio::task::yield_now().await;
    }
    a.kill();
    let publish = v1::PublishSnapshotRequest {
        image_id: image.id,
        number: 1,
        lease_id: lease.id,
        root: Some(v1::TreeRoot {
            size_bytes: 1 << 30,
            chunk_size: image.chunk_size,
            fan_out: 64,
            node: Default::default(),
        }),
        ..Default::default()
    };
    catalog.publish_snapshot(publish).await.unwrap();
    let snapshot = waiting.await.unwrap().unwrap();
    assert_eq!(snapshot.state(), v1::SnapshotState::Stable);
}

#[tokio::test]
async fn a_wait_for_what_does_not_happen_ends_in_its_time() {
    let catalog = MemoryCatalog::default();
    let (image, _) = pending(&catalog).await;
    let server = metadata_server(&catalog);
    let begin = Instant::now();
    let error = client(&[server.address]).wait_snapshot(first_of(&image, 300)).await.unwrap_err();
    assert!(matches!(error, CatalogError::Timeout(_)), "{error}");
    assert!((0.3..5.0).contains(&begin.elapsed().as_secs_f64()));
    catalog.faults().fail_next("wait_snapshot", 1, CatalogError::NotFound("gone".into()));
    let for_ever = client(&[server.address]).wait_snapshot(first_of(&image, u64::MAX)).await;
    assert!(matches!(for_ever, Err(CatalogError::NotFound(_))), "{for_ever:?}");
}

#[tokio::test]
async fn connecting_needs_no_server_but_sound_addresses() {
    let nobody = closed_port().to_string();
    let repository = Repository::connect(&[nobody], impatient()).await.unwrap();
    let error = repository.pool(1).await.err().unwrap();
    assert!(matches!(error, CatalogError::Unavailable(_)), "{error}");
    for bad in [vec![], vec!["nonsense".to_owned()]] {
        let error = Repository::connect(&bad, impatient()).await.unwrap_err();
        assert!(matches!(error, CatalogError::Invalid(_)), "{error}");
    }
}

#[tokio::test]
async fn a_lease_is_kept_over_the_wire() {
    let catalog = MemoryCatalog::default();
    let server = metadata_server(&catalog);
    let keeper = LeaseKeeper::start(Arc::new(client(&[server.address])), "a host", LEASE_TTL);
    assert_eq!(keeper.current().await.unwrap().generation, 1);
    keeper.shutdown().await;
    assert_eq!(catalog.faults().calls("release_lease"), 1);
}
