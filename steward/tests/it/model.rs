//! Random writers, clones and removals beside collections that are broken off anywhere. Every stable
//! snapshot reads back at any time; when all writers have ended, exactly what is reachable remains.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blobcr_proto::v1;
use blobcr_repository::{ChunkSource, Identified, PersistJob, PersistLimits, SourceError, persist};
use blobcr_steward::collect;
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::fixture::{CHUNK, Fixture, POOL, at, disk, named, small};

/// Runs of the test, each of so many steps. Every step syncs files: more take too long.
const SEEDS: u64 = 3;
const STEPS: usize = 50;

/// A disk that takes its time, so that collections come in between.
struct Slow<'a> {
    bytes: &'a [u8],
    pause: Duration,
}

#[async_trait]
impl ChunkSource for Slow<'_> {
    async fn chunk(&self, index: u64) -> Result<Option<Identified>, SourceError> {
        tokio::time::sleep(self.pause).await;
        let from = index as usize * CHUNK;
        let piece = &self.bytes[from..from + CHUNK];
        Ok(Identified::of(Bytes::copy_from_slice(piece)))
    }
}

/// Stores what of `bytes` differs from a snapshot, under a lease. Returns the root.
pub(crate) async fn persist_over(
    fixture: &Fixture,
    image: &str,
    number: u64,
    bytes: &[u8],
    lease: &v1::Lease,
) -> v1::TreeRoot {
    let repository = fixture.repository();
    let (_, _, reader) = repository.open(at(image, number)).await.unwrap();
    let (store, nodes) =
        (repository.pool(POOL).await.unwrap(), repository.nodes(POOL).await.unwrap());
    let mut old = vec![0; bytes.len()];
    reader.read(0, &mut old).await.unwrap();
    let range = |index: &u64| *index as usize * CHUNK..(*index as usize + 1) * CHUNK;
    let chunks = (0..(bytes.len() / CHUNK) as u64)
        .filter(|index| old[range(index)] != bytes[range(index)])
        .collect();
    let job = PersistJob {
        base: *reader.root(),
        geometry: reader.root().geometry,
        chunks,
        generation: lease.generation,
        source: &Slow { bytes, pause: Duration::from_micros(300) },
        progress: &|_| (),
        limits: PersistLimits::default(),
    };
    persist(&*store, &*nodes, job).await.unwrap().root.to_wire()
}

/// A snapshot on its way.
struct Writer {
    image_id: u64,
    number: u64,
    lease: v1::Lease,
    letters: Vec<u8>,
    root: v1::TreeRoot,
}

struct Model {
    /// What replays a failure, about: the interleaving is the scheduler's.
    seed: u64,
    fixture: Arc<Fixture>,
    rng: StdRng,
    /// What each stable snapshot holds.
    stable: BTreeMap<(String, u64), Vec<u8>>,
    writers: BTreeMap<String, Writer>,
    names: u64,
    collection: Option<tokio::task::JoinHandle<()>>,
}

impl Model {
    fn letters(&mut self) -> Vec<u8> {
        (0..16).map(|_| self.rng.random_range(0..12u8)).collect()
    }

    fn name(&mut self) -> String {
        self.names += 1;
        format!("image-{}", self.names)
    }

    fn latest(&mut self) -> Option<(String, u64)> {
        let images: BTreeSet<&String> = self.stable.keys().map(|(name, _)| name).collect();
        if images.is_empty() {
            return None;
        }
        let name = (*images.iter().nth(self.rng.random_range(0..images.len()))?).clone();
        let number = self.stable.keys().filter(|(of, _)| *of == name).map(|(_, n)| *n).max()?;
        Some((name, number))
    }

    async fn import(&mut self) {
        let (name, letters) = (self.name(), self.letters());
        self.fixture.import(&name, &disk(&letters)).await;
        self.stable.insert((name, 1), letters);
    }

    async fn clone_image(&mut self) {
        let Some((source, number)) = self.latest() else { return };
        let name = self.name();
        let request = v1::CloneImageRequest {
            source: Some(at(&source, number)),
            name: name.clone(),
            ..Default::default()
        };
        self.fixture.service.manager().clone_image(request).await.unwrap();
        let letters = self.stable[&(source, number)].clone();
        self.stable.insert((name, 1), letters);
    }

    /// Stores a snapshot, and leaves it pending.
    async fn write(&mut self) {
        let Some((name, number)) = self.latest() else { return };
        if self.writers.contains_key(&name) {
            return;
        }
        let mut letters = self.stable[&(name.clone(), number)].clone();
        for _ in 0..self.rng.random_range(1..6) {
            let at = self.rng.random_range(0..letters.len());
            letters[at] = self.rng.random_range(0..12);
        }
        let manager = self.fixture.service.manager();
        let lease = self.fixture.lease().await;
        let image_id = manager.get_image(named(&name)).await.unwrap().id;
        let begin = v1::BeginSnapshotRequest { image_id, lease_id: lease.id, ..Default::default() };
        let begun = manager.begin_snapshot(begin).await.unwrap().number;
        let root = persist_over(&self.fixture, &name, number, &disk(&letters), &lease).await;
        self.writers.insert(name, Writer { image_id, number: begun, lease, letters, root });
    }

    async fn publish(&mut self) {
        let Some((name, writer)) = self.writers.pop_first() else { return };
        let Writer { image_id, number, lease, letters, root } = writer;
        let request = v1::PublishSnapshotRequest {
            image_id,
            number,
            lease_id: lease.id,
            root: Some(root),
            ..Default::default()
        };
        // Refused when its lease has ended, or the image is gone.
        if self.fixture.service.manager().publish_snapshot(request).await.is_ok() {
            self.stable.insert((name, number), letters);
        }
        self.fixture.release(lease.id).await;
    }

    async fn remove(&mut self) {
        let Some((name, latest)) = self.latest() else { return };
        let manager = self.fixture.service.manager();
        if self.rng.random_bool(0.3) {
            manager.remove_image(named(&name)).await.unwrap();
            self.stable.retain(|(of, _), _| *of != name);
            return;
        }
        let older = self.stable.keys().find(|(of, number)| *of == name && *number < latest);
        if let Some((name, number)) = older.cloned() {
            manager.remove_snapshot(at(&name, number)).await.unwrap();
            self.stable.remove(&(name, number));
        }
    }

    /// Begins a collection, or breaks off the one that runs.
    async fn collect(&mut self) {
        if let Some(running) = self.collection.take() {
            if self.rng.random_bool(0.5) {
                running.abort();
            }
            // Aborted, or done.
            let _ = running.await;
        }
        let fixture = Arc::clone(&self.fixture);
        self.collection = Some(tokio::spawn(async move {
            collect(&fixture.repository(), small()).await.unwrap();
        }));
    }

    async fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..12 => self.import().await,
            12..22 => self.clone_image().await,
            22..45 => self.write().await,
            45..65 => self.publish().await,
            65..80 => self.remove().await,
            80..97 => self.collect().await,
            _ => {
                self.fixture.end_leases().await;
            }
        }
    }

    async fn check(&self) {
        for ((name, number), letters) in &self.stable {
            let found = self.fixture.read(name, *number).await;
            assert!(found == disk(letters), "seed {}: {name}@{number}", self.seed);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_reachable_stays_and_nothing_else_does() {
    for seed in 0..SEEDS {
        let mut model = Model {
            seed,
            fixture: Arc::new(Fixture::new(2, "replica:1").await),
            rng: StdRng::seed_from_u64(seed),
            stable: BTreeMap::new(),
            writers: BTreeMap::new(),
            names: 0,
            collection: None,
        };
        for step in 0..STEPS {
            model.step().await;
            if step % 25 == 24 {
                model.check().await;
            }
        }
        if let Some(running) = model.collection.take() {
            running.await.unwrap();
        }
        model.check().await;
        model.fixture.end_leases().await;
        model.fixture.collect().await;
        model.check().await;
        let mut reachable = BTreeSet::new();
        for (name, number) in model.stable.keys() {
            let root = model.fixture.root(name, *number).await;
            reachable.extend(model.fixture.reached(&root).await);
        }
        assert_eq!(model.fixture.all_held(), reachable, "seed {seed}");
    }
}
