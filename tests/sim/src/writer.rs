//! A host with one disk, which is written and checkpointed: the real client, persist pipeline and
//! leases, as the mirror has them.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blobcr_mirror_fuse::disk::{SnapshotChunks, SnapshotKey, Upstream, UpstreamError, Work};
use blobcr_mirror_fuse::upstream::RepositoryUpstream;
use blobcr_proto::v1;
use blobcr_repository::{Identified, PersistLimits, Repository};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::content::Content;
use crate::world::World;

/// Different contents of chunks: few, so that images share some.
const CONTENTS: u64 = 24;
/// Short, so that the collector has something to do after a writer died.
const LEASE_TTL: Duration = Duration::from_secs(20);
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(700);

/// What survives the host's death: its disk.
#[derive(Debug)]
pub struct Disk {
    /// Name of its checkpoint image.
    pub image: String,
    /// What that is a clone of.
    pub base: Base,
    /// What the guest sees.
    pub content: Content,
}

/// A snapshot to clone.
#[derive(Clone, Debug)]
pub struct Base {
    /// Id of its image.
    pub image: u64,
    /// Its number.
    pub number: u64,
    /// What it holds.
    pub content: Content,
}

impl Base {
    fn snapshot(&self) -> v1::SnapshotRef {
        let image = v1::ImageRef { id: self.image, name: String::new() };
        v1::SnapshotRef { image: Some(image), number: self.number }
    }
}

/// One life of a host with a disk.
pub struct Writer {
    world: World,
    host: String,
    repository: Repository,
    upstream: RepositoryUpstream,
    stop: watch::Receiver<bool>,
}

struct Chunks<'a>(&'a Content);

#[async_trait]
impl SnapshotChunks for Chunks<'_> {
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, String> {
        Ok(self.0.chunk(index as usize).and_then(Identified::of))
    }
}

/// The image that is written, and where it stands.
struct Image {
    id: u64,
    pool: u32,
    base: v1::TreeRoot,
    content: Content,
    number: u64,
}

/// Something cannot go on; why is in the trace.
struct GaveUp;

impl Writer {
    /// A process on `host`, which ends soon after `stop` says so.
    ///
    /// # Errors
    /// Never, for addresses of a run.
    pub async fn start(
        world: &World,
        host: &str,
        metadata: &[String],
        stop: watch::Receiver<bool>,
    ) -> anyhow::Result<Self> {
        let repository = Repository::connect(metadata, crate::options(world, host)).await?;
        let limits = PersistLimits { puts: 3, put_bytes: 1, touch_batch: 3, ..Default::default() };
        let upstream =
            RepositoryUpstream::new(repository.clone(), limits).with_lease_ttl(LEASE_TTL);
        Ok(Self { world: world.clone(), host: host.to_owned(), repository, upstream, stop })
    }

    fn note(&self, what: std::fmt::Arguments<'_>) {
        self.world.note(format_args!("{}: {what}", self.host));
    }

    /// Tries until it works, or is refused, or this is to stop.
    async fn insist<T, F: Future<Output = Result<T, UpstreamError>>>(
        &self,
        what: &str,
        mut call: impl FnMut() -> F,
    ) -> Result<Result<T, UpstreamError>, GaveUp> {
        loop {
            match call().await {
                Err(error) if error.is_transient() => {
                    self.note(format_args!("{what}: {error}"));
                    if *self.stop.borrow() {
                        return Err(GaveUp);
                    }
                    sleep(AGAIN).await;
                }
                done => return Ok(done),
            }
        }
    }

    /// Writes and checkpoints until it is to stop.
    pub async fn run(&self, disk: &mut Disk, origin: &Base) {
        while !*self.stop.borrow() {
            let Ok(mut image) = self.attach(disk, origin).await else { return };
            while !*self.stop.borrow() {
                sleep(self.world.dice.ms(10..2500)).await;
                for _ in 0..self.world.dice.of(1..5) {
                    let at = self.world.dice.index(disk.content.chunks());
                    disk.content = disk.content.with(at, self.world.dice.of(0..CONTENTS));
                }
                if self.checkpoint(&mut image, disk.content.clone()).await.is_err() {
                    return;
                }
                self.tidy(&image).await;
                if self.world.dice.chance(0.03) {
                    break;
                }
            }
            if self.world.dice.chance(0.5) && !*self.stop.borrow() {
                self.move_on(disk, image.pool).await;
            }
        }
    }

    /// CLONE, or the same image again, with what a life before left behind.
    async fn attach(&self, disk: &mut Disk, origin: &Base) -> Result<Image, GaveUp> {
        let source = disk.base.snapshot();
        let clone = || self.upstream.clone_image(&disk.image, &source, &self.host);
        let cloned = match self.insist("clone", clone).await? {
            Ok(cloned) => cloned,
            Err(error) => {
                // Somebody has removed what it comes from.
                self.note(format_args!("cannot clone {}: {error}", disk.image));
                disk.image.push('y');
                disk.base = origin.clone();
                return Err(GaveUp);
            }
        };
        let image = cloned.image.unwrap_or_default();
        let pending = self.insist("pending", || self.upstream.pending(image.id)).await?;
        for number in pending.unwrap_or_default() {
            let key = self.key(image.id, number);
            let failed = || self.upstream.fail(&key, "its host died");
            drop(self.insist("fail", failed).await?);
        }
        let newest = || self.upstream.snapshot(image.id, 0);
        let Ok(newest) = self.insist("newest", newest).await? else { return Err(GaveUp) };
        let root = newest.root.unwrap_or_default();
        let Some(content) = self.world.oracle.content_of(&root) else {
            self.world.oracle.violation(format!("{} reads a root that nobody made", self.host));
            return Err(GaveUp);
        };
        let highest = image.highest_number.max(newest.number);
        Ok(Image { id: image.id, pool: image.pool, base: root, content, number: highest })
    }

    fn key(&self, image_id: u64, number: u64) -> SnapshotKey {
        SnapshotKey { image_id, number, writer: self.host.clone() }
    }

    /// COMMIT, and what follows it.
    async fn checkpoint(&self, image: &mut Image, content: Content) -> Result<(), GaveUp> {
        image.number += 1;
        let key = self.key(image.id, image.number);
        match self.insist("begin", || self.upstream.begin(&key)).await? {
            Ok(()) => {}
            Err(error) => {
                // The number was taken by a life before.
                self.note(format_args!("{} is not begun: {error}", key.number));
                return Ok(());
            }
        }
        let chunks = content.differing(&image.content);
        let stalled = |why: Option<String>| {
            if let Some(why) = why {
                self.note(format_args!("{} stalls: {why}", key.number));
            }
        };
        let work = Work {
            pool: image.pool,
            base: image.base.clone(),
            size_bytes: content.bytes(),
            chunks,
            source: &Chunks(&content),
            stalled: &stalled,
        };
        let mut stop = self.stop.clone();
        let persisted = tokio::select! {
            biased;
            persisted = self.upstream.persist(&key, work) => persisted,
            () = stopped(&mut stop) => return Err(GaveUp),
        };
        let done = match persisted {
            Ok(persisted) => {
                self.world.oracle.made(&persisted.root, &content);
                let publish = || self.upstream.publish(&key, &persisted);
                self.insist("publish", publish).await?.map(|_| persisted.root)
            }
            Err(error) => Err(error),
        };
        match done {
            Ok(root) => {
                self.note(format_args!("{}@{} is published", image.id, key.number));
                (image.base, image.content) = (root, content);
            }
            Err(error) => {
                self.note(format_args!("{}@{} fails: {error}", image.id, key.number));
                let failed = || self.upstream.fail(&key, "refused");
                drop(self.insist("fail", failed).await?);
            }
        }
        Ok(())
    }

    /// Removes an old snapshot now and then.
    async fn tidy(&self, image: &Image) {
        if !self.world.dice.chance(0.3) {
            return;
        }
        let of_image: Vec<_> =
            self.world.oracle.stable().into_iter().filter(|one| one.image == image.id).collect();
        let Some((_, older)) = of_image.split_last() else { return };
        if older.is_empty() {
            return;
        }
        let number = older[self.world.dice.index(older.len())].number;
        self.world.oracle.leaving(image.id, number);
        let id = v1::ImageRef { id: image.id, name: String::new() };
        let of = v1::SnapshotRef { image: Some(id), number };
        let removed = self.repository.catalog().remove_snapshot(of).await;
        self.note(format_args!("{}@{number} removed: {}", image.id, removed.is_ok()));
    }

    /// Goes on with another image, of the same base or of any other snapshot, as after a rollback;
    /// and removes the one before.
    async fn move_on(&self, disk: &mut Disk, pool: u32) {
        let by_name = v1::ImageRef { id: 0, name: disk.image.clone() };
        let Ok(old) = self.repository.catalog().get_image(by_name).await else { return };
        if self.world.dice.chance(0.7) {
            self.world.oracle.image_leaving(old.id);
            let by_id = v1::ImageRef { id: old.id, name: String::new() };
            let removed = self.repository.catalog().remove_image(by_id).await;
            self.note(format_args!("image {} removed: {}", old.id, removed.is_ok()));
        }
        disk.image.push('x');
        let stable: Vec<_> =
            self.world.oracle.stable().into_iter().filter(|one| one.pool == pool).collect();
        if !stable.is_empty() && self.world.dice.chance(0.6) {
            let one = &stable[self.world.dice.index(stable.len())];
            let (image, number) = (one.image, one.number);
            self.note(format_args!("{} begins as {image}@{number}", disk.image));
            disk.base = Base { image, number, content: one.content.clone() };
            disk.content = one.content.clone();
        }
    }
}

/// Some time after `stop` says so.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that whoever says it is gone: the same.
    drop(stop.wait_for(|stop| *stop).await);
    sleep(Duration::from_secs(30)).await;
}

/// Makes the image that others clone. Tries until it is there.
pub async fn import_base(
    world: &World,
    metadata: &[String],
    name: &str,
    pool: &str,
    chunks: usize,
) -> Option<Base> {
    let repository = Repository::connect(metadata, crate::options(world, "admin")).await.ok()?;
    let mut content = Content::holes(chunks);
    for at in 0..chunks {
        if world.dice.chance(0.7) {
            content = content.with(at, world.dice.of(1..CONTENTS));
        }
    }
    let image = crate::importing::import(world, &repository, name, pool, &content).await?;
    Some(Base { image, number: 1, content })
}

/// A disk before its first start.
#[must_use]
pub fn fresh(host: &str, base: &Base) -> Disk {
    let (image, content) = (format!("{host}-checkpoints"), base.content.clone());
    Disk { image, base: base.clone(), content }
}

/// Shared by those who hold a disk: one life after the other has it.
pub type SharedDisk = Arc<tokio::sync::Mutex<Disk>>;
