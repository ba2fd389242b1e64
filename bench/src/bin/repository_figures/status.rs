//! What `blobcr status` costs when there are many images and snapshots.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use blobcr_proto::v1;
use blobcr_repository::client::RemoteCatalog;
use blobcr_repository::{Catalog, ConnectOptions};
use blobcr_tests::cluster::{Cluster, json};
use blobcr_tests::disk_file::{noise, sparse};
use tokio::task::JoinSet;

use crate::{MIB, Options};

const SAMPLES: usize = 15;
/// Images that get their snapshots at the same time.
const AT_ONCE: u64 = 64;

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let (images, snapshots) = (options.scaled(1000), options.scaled(100).max(2));
    let cluster = Cluster::start_in(options.scratch()?, &["--nodes", "3"])?;
    let raw = sparse(&cluster.scratch().join("raw"), MIB, &[(0, &noise(1, MIB as usize))])?;
    cluster.import(&raw, "base")?;
    let few = status(&cluster)?;
    let endpoint = std::fs::read_to_string(cluster.dir().join("endpoint"))?.trim().to_owned();
    tokio::runtime::Runtime::new()?.block_on(fill(endpoint, images, snapshots))?;
    let many = status(&cluster)?;
    println!("\n`status`, median of {SAMPLES}");
    println!("  1 image, 1 snapshot:                {:>8.1} ms", few.as_secs_f64() * 1e3);
    println!(
        "  {images} images of {snapshots} snapshots: {:>8.1} ms, {:.2} times as much",
        many.as_secs_f64() * 1e3,
        many.as_secs_f64() / few.as_secs_f64()
    );
    Ok(())
}

fn status(cluster: &Cluster) -> anyhow::Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..SAMPLES {
        let begun = Instant::now();
        json(cluster.dir().as_os_str(), &["status"])?;
        times.push(begun.elapsed());
    }
    times.sort();
    Ok(times[SAMPLES / 2])
}

/// Clones `base`, and publishes its root again and again.
async fn fill(endpoint: String, images: u64, snapshots: u64) -> anyhow::Result<()> {
    let catalog = Arc::new(RemoteCatalog::new(&[endpoint], &ConnectOptions::default())?);
    let mut tasks = JoinSet::new();
    for image in 0..images {
        if tasks.len() as u64 >= AT_ONCE {
            tasks.join_next().await.context("a task")???;
        }
        let catalog = Arc::clone(&catalog);
        tasks.spawn(async move { fill_one(&*catalog, image, snapshots).await });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

async fn fill_one(catalog: &dyn Catalog, image: u64, snapshots: u64) -> anyhow::Result<()> {
    let base = v1::ImageRef { name: "base".to_owned(), id: 0 };
    let source = Some(v1::SnapshotRef { image: Some(base), number: 1 });
    let root = catalog.get_snapshot(source.clone().context("a source")?).await?.root;
    let name = format!("image-{image}");
    let request = v1::CloneImageRequest { source, name, ..Default::default() };
    let image_id = catalog.clone_image(request).await?.image.context("an image")?.id;
    let request = v1::AcquireLeaseRequest { holder: "figures".to_owned(), ttl_ms: 600_000 };
    let lease_id = catalog.acquire_lease(request).await?.id;
    for _ in 1..snapshots {
        let begin = v1::BeginSnapshotRequest { image_id, lease_id, ..Default::default() };
        let number = catalog.begin_snapshot(begin).await?.number;
        let (root, stats) = (root.clone(), None);
        let publish = v1::PublishSnapshotRequest {
            image_id,
            number,
            lease_id,
            root,
            stats,
            ..Default::default()
        };
        catalog.publish_snapshot(publish).await?;
    }
    catalog.release_lease(v1::ReleaseLeaseRequest { lease_id }).await?;
    Ok(())
}
